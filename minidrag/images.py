"""Images and masks: files to Pillow images to tensors, and back.

Sizes are (width, height) for Pillow and people, (rows, columns) for tensors.
"""

import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageFilter, ImageOps, UnidentifiedImageError
from torch import Tensor

Color = tuple[int, int, int]

MAX_PIXELS = 64_000_000  # a larger image is a mistake or an attack
MAX_WORKING_PIXELS = 16_000_000  # Stable Diffusion 1.5 is made for 262,144
MIN_SIDE = 64
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def load_image(path: Path) -> Image.Image:
    """Load the first frame of an image as RGB, upright by its EXIF orientation, transparency on white.

    Raises ValueError, one sentence, for a file that is missing, damaged, not an image, too large or small.
    """
    image = read(path, WHITE)
    if min(image.size) < MIN_SIDE:
        found = f"{image.width}x{image.height}"
        raise ValueError(f"{path} is {found} pixels: each side must be at least {MIN_SIDE}")
    return image


def load_mask(path: Path, size: tuple[int, int]) -> Tensor | None:
    """Load the mask of an image of `size`: (H, W), float32, 1 in the editable region; None if all black.

    White is editable, transparent counts as black, gray as the nearer of the two.
    Raises ValueError for an unreadable mask, one of another size, or one whose marks are all dark gray.
    """
    image = read(path, BLACK)
    if image.size != size:
        found, wanted = (f"{width}x{height}" for width, height in (image.size, size))
        raise ValueError(f"the mask {path} is {found} pixels, the image {wanted}: make them the same size")
    levels = torch.from_numpy(np.array(image.convert("L")))
    if 0 < levels.max() < 128:
        raise ValueError(f"the mask {path} has no white: its lightest gray is {int(levels.max())} of 255")
    return (levels >= 128).float() if levels.any() else None


def read(path: Path, background: Color) -> Image.Image:
    """Read any image as upright RGB on a background; raise ValueError if that is not possible."""
    if not path.is_file():
        raise ValueError(f"{path} is a folder" if path.is_dir() else f"there is no file {path}")
    try:
        # From an open file: given a path, Pillow maps a plain TIFF into memory and garbles it when rotating.
        with path.open("rb") as file:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = Image.open(file)
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
            return flatten(ImageOps.exif_transpose(image), background)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{path} is too large, more than {MAX_PIXELS:,} pixels: {error}") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not an image in a known format: save it as PNG or JPEG") from error
    except Exception as error:  # decoders raise almost anything for a damaged file
        raise ValueError(f"{path} cannot be read: {error}") from error


def flatten(image: Image.Image, background: Color) -> Image.Image:
    """Convert an image of any mode to RGB."""
    if image.mode == "F":
        raise ValueError("it has floating-point values: save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion would clip at 255
        image = Image.fromarray(np.rint(np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image.convert("RGBA"))
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image to (1, 3, H, W), float32, -1 to 1, as the VAE takes it."""
    pixels = torch.from_numpy(np.array(image))
    return (pixels.float() / 127.5 - 1).permute(2, 0, 1)[None]  # (H, W, 3) -> (1, 3, H, W)


def to_image(pixels: Tensor) -> Image.Image:
    """First of (B, 3, H, W), clamped to -1 to 1, to an RGB image.

    Rounds where the official code truncates: truncation darkens an image by half a level on average, and an
    unedited one would not come back exactly.
    """
    levels = ((pixels[0].detach().float() / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())  # (3, H, W) -> (H, W, 3)


def working_size(width: int, height: int, short_side: int, multiple: int) -> tuple[int, int]:
    """Size closest to the image's aspect with about this shorter side, both sides multiples of `multiple`.

    Raises ValueError for more pixels than the networks' features fit into any memory: many systems kill a
    process that asks for too much without a word.
    """
    scale = short_side / min(width, height)
    fitted = [max(multiple, multiple * math.floor(side * scale / multiple + 0.5)) for side in (width, height)]
    if math.prod(fitted) > MAX_WORKING_PIXELS:
        found = f"{fitted[0]}x{fitted[1]}"
        raise ValueError(
            f"the working size {found} has more than {MAX_WORKING_PIXELS:,} pixels: choose a smaller --size"
        )
    return fitted[0], fitted[1]


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize to (width, height) without aliasing; borders stay on borders."""
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def paste(edited: Image.Image, original: Image.Image, mask: Tensor) -> Image.Image:
    """Put the original's pixels back outside the mask, with a soft seam on the inside.

    edited, original: the same size. mask: (H, W), 1 in the editable region.
    """
    hard = Image.fromarray((mask >= 0.5).cpu().numpy()).convert("L")
    blurred = hard.filter(ImageFilter.GaussianBlur(max(1, min(hard.size) // 128)))
    soft = blurred.point([max(0, 2 * level - 255) for level in range(256)])  # 0 at the edge, 255 well inside
    return Image.composite(edited, original, ImageChops.multiply(soft, hard))


def write_whole(path: Path, writer: Callable[[Path], object]) -> None:
    """Let `writer` fill a temporary file beside `path`, then rename it: all of it is there or nothing.

    The temporary name has the suffix of `path`, for writers that pick a format by it.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        writer(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
