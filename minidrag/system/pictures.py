"""Image and mask files of any kind to RGB images."""

import functools
import io
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from minidrag.images import BLACK, WHITE
from minidrag.system.files import check_regular

Color = tuple[int, int, int]
# Formats whose decoders start no program (EPS does) and open no other file.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "TGA")
MAX_BYTES = 1_000_000_000
MAX_PIXELS = 64_000_000  # a larger image is a mistake or an attack
MIN_SIDE = 64
SAME_COLOR = 32  # largest difference, in levels of 255, between pixels of one color
GRAY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L")
SRGB = functools.cache(lambda: ImageCms.createProfile("sRGB"))
PngImagePlugin.MAX_TEXT_CHUNK = 2**24  # bytes; Pillow refuses an image with a profile above 1 MB


def load_image(path: Path) -> Image.Image:
    """Load the first frame of an image as RGB, upright by its EXIF orientation, transparency on white.

    Colors of another profile become those of sRGB; `info["transparent"]` says that it was not all opaque.
    Raises ValueError, one sentence, for a file that is missing, damaged, not an image, too large or small.
    """
    image = read(path, to_srgb)
    if min(image.size) < MIN_SIDE:
        size = f"{image.width}x{image.height}"
        raise ValueError(f"{path} is {size} pixels: each side must be at least {MIN_SIDE}")
    opaque = flatten(image, WHITE)
    # Nothing else: Pillow would write a profile that stays here into every file made of this image.
    opaque.info = {"transparent": True} if image.mode == "RGBA" and opacity(image).min() < 255 else {}
    return opaque


def load_mask(path: Path, size: tuple[int, int]) -> Tensor | None:
    """Load the mask of an image of `size`: (H, W), bool, True in the editable region; None if all black.

    White is editable, transparent counts as black, gray as the nearer of the two. If all paint has one color,
    it is the paint that is editable, whichever color it has.
    Raises ValueError for an unreadable mask, one of another size, or one whose marks are all dark gray.
    """
    image = read(path, brighten_labels)
    if image.size != size:
        sizes = f"{image.width}x{image.height} pixels, the image {size[0]}x{size[1]}"
        raise ValueError(f"the mask {path} is {sizes}: make them the same size")
    levels = np.asarray(flatten(image, BLACK).convert("L"))
    if image.mode == "RGBA" and levels.max() < 128 and is_one_color(image):
        levels = opacity(image)
    if 0 < levels.max() < 128:
        raise ValueError(f"the mask {path} has no white: its lightest gray is {int(levels.max())} of 255")
    return torch.from_numpy(levels >= 128) if levels.any() else None


def brighten_labels(image: Image.Image) -> Image.Image:
    """Make every nonzero value of a 16-bit mask visible in 8 bits: labels may be as small as 1 of 65535."""
    if not image.mode.startswith("I"):
        return image
    levels = np.asarray(image)
    return Image.fromarray(np.where(levels > 0, levels.clip(257), levels))


def opacity(image: Image.Image) -> np.ndarray:
    """Alpha of an RGBA image, (H, W), uint8."""
    return np.asarray(image.getchannel("A"))


def is_one_color(image: Image.Image) -> bool:
    """True for an RGBA layer that is partly transparent and elsewhere has hardly more than one color."""
    alpha = opacity(image)
    paint = np.asarray(image)[..., :3][alpha >= max(1, alpha.max() // 2)]  # a soft brush's edge may be off
    return len(paint) > 0 and alpha.min() < alpha.max() and bool(np.ptp(paint, axis=0).max() <= SAME_COLOR)


def read(path: Path, convert: Callable[[Image.Image], Image.Image] = lambda image: image) -> Image.Image:
    """Read any image as upright RGB or RGBA, after `convert`; raise ValueError if that is not possible."""
    check_regular(path, MAX_BYTES)
    try:
        # From an open file: given a path, Pillow maps a plain TIFF into memory and garbles it when rotating.
        with path.open("rb") as file, silence():
            image = Image.open(file, formats=known_formats())
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if image.mode == "F":
                raise OSError("it has floating-point values: save it with 8 or 16 bits")
            return to_8_bits(convert(ImageOps.exif_transpose(image)))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{path} is too large, more than {MAX_PIXELS:,} pixels: make it smaller first"
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not an image in a known format: save it as PNG or JPEG") from error
    except MemoryError:
        raise
    except Exception as error:  # decoders raise almost anything for a damaged file
        raise ValueError(f"{path} cannot be read: {explain(error)}") from error


def known_formats() -> list[str]:
    """The formats of FORMATS that this Pillow reads."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def explain(error: Exception) -> str:
    """The decoder's message if it is readable, else a general one."""
    text = getattr(error, "strerror", None) or str(error)
    plain = isinstance(error, OSError) and re.fullmatch(r"[A-Za-z][\w ,:()-]*", text)
    return text if plain else "it is damaged, or of an unusual kind: save it again as PNG or JPEG"


@contextmanager
def silence() -> Iterator[None]:
    """Silence decoders within a context, even libtiff, which writes to the standard error by its number."""
    logger = logging.getLogger("PIL")
    level = logger.level
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        logger.setLevel(level)
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def to_8_bits(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, or to RGBA if it may be partly transparent."""
    if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion would clip at 255
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise OSError("it has values of more than 16 bits: save it with 8 or 16 bits")
        image = Image.fromarray(np.rint(levels / 257).astype(np.uint8))
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def flatten(image: Image.Image, background: Color) -> Image.Image:
    """Put RGB or RGBA on a background."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def to_srgb(image: Image.Image) -> Image.Image:
    """Convert colors from the image's profile to sRGB, the networks' color space.

    Returns RGB or RGBA, or the image itself if its profile is missing, broken, or of another kind of image.
    """
    try:
        profile: Any = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        space = profile.profile.xcolor_space.strip()
        colors = image if image.mode == "CMYK" else to_8_bits(image)
        if space == "GRAY" and image.mode in GRAY_MODES:
            mode = "L"
        elif space == "RGB" and image.mode != "CMYK":
            mode = "RGB"
        elif space == image.mode == "CMYK":
            mode = "CMYK"
        else:
            return image
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
        transform = ImageCms.buildTransform(profile, SRGB(), mode, "RGB", intent, flags)
        if mode == "RGB" and is_identity(transform):  # the profile is sRGB itself, up to rounding
            return image
        converted = ImageCms.applyTransform(colors.convert(mode), transform)
    except Exception:  # no profile, or a broken one
        return image
    if converted is not None and colors.mode == "RGBA":
        converted.putalpha(colors.getchannel("A"))
    return converted or image


def is_identity(transform: ImageCms.ImageCmsTransform) -> bool:
    """True if an RGB transform changes no color by more than rounding."""
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(64, 64, 3)
    changed = ImageCms.applyTransform(Image.fromarray(cube), transform)
    return bool(np.abs(np.asarray(changed).astype(int) - cube).max() <= 2)
