"""Pictures, masks and points on their way in; pictures, drawings and files on their way out.

Sizes are (width, height) and points (x, y) where Pillow or a person is meant, (rows, columns) and
(row, column) where a tensor is. Pixel (0, 0) is a small square, and the coordinates name its centre.
"""

import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

Point = tuple[float, float]
Color = tuple[int, int, int]

MOST_PIXELS = 64_000_000  # above this a picture is a mistake or an attack
MOST_WORKING = 16_000_000  # of the picture that a model works on; Stable Diffusion 1.5 is made for 262,144
LEAST_SIDE = 64
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def load_picture(path: Path) -> Image.Image:
    """Reads the first frame of a picture as RGB, upright as its EXIF data say, on white where transparent.

    Raises ValueError, one sentence, for a file that is missing, no picture, damaged, too large or too small.
    """
    picture = read(path, WHITE)
    if min(picture.size) < LEAST_SIDE:
        found = f"{picture.width}x{picture.height}"
        raise ValueError(f"{path} is {found} pixels: each side needs {LEAST_SIDE} or more")
    return picture


def load_mask(path: Path, size: tuple[int, int]) -> Tensor | None:
    """Reads where a picture of `size` may change: (H, W) of 0 and 1, float32; None where nothing is marked.

    White marks; transparent counts as black, grey as the nearer of the two.
    Raises ValueError for an unreadable mask, one of another size, or one with marks too dark to count.
    """
    picture = read(path, BLACK)
    if picture.size != size:
        found, wanted = (f"{width}x{height}" for width, height in (picture.size, size))
        raise ValueError(f"the mask {path} is {found} pixels and the picture {wanted}: they must be the same")
    levels = torch.from_numpy(np.array(picture.convert("L")))
    if 0 < levels.max() < 128:
        raise ValueError(f"the mask {path} has no white: its lightest grey is {int(levels.max())} of 255")
    return (levels >= 128).float() if levels.any() else None


def read(path: Path, ground: Color) -> Image.Image:
    """Reads any picture as upright RGB before a ground; ValueError where that is not possible."""
    if not path.is_file():
        raise ValueError(f"{path} is a folder" if path.is_dir() else f"there is no file {path}")
    try:
        # Not by its path: then Pillow maps a plain TIFF into memory, and scrambles it if it is to be turned.
        with path.open("rb") as file:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = Image.open(file)
            if image.width * image.height > MOST_PIXELS:
                raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
            return flatten(ImageOps.exif_transpose(image), ground)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{path} is too large, more than {MOST_PIXELS:,} pixels: {error}") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no picture of a known format: save it as PNG or JPEG") from error
    except Exception as error:  # a broken file makes the decoders raise almost anything
        raise ValueError(f"{path} cannot be read: {error}") from error


def flatten(image: Image.Image, ground: Color) -> Image.Image:
    """Turns a picture of any mode into RGB."""
    if image.mode == "F":
        raise ValueError("it holds floating-point values, save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion would cut off at 255
        image = Image.fromarray(np.rint(np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, ground), image.convert("RGBA"))
    return image.convert("RGB")


def to_tensor(picture: Image.Image) -> Tensor:
    """RGB picture to (1, 3, H, W), float32, from -1 to 1, as the VAE takes it."""
    pixels = torch.from_numpy(np.array(picture))
    return (pixels.float() / 127.5 - 1).permute(2, 0, 1)[None]  # (H, W, 3) -> (1, 3, H, W)


def to_picture(image: Tensor) -> Image.Image:
    """The first of (B, 3, H, W), from -1 to 1 and clamped to it, to an RGB picture.

    Rounds, where the official code truncates: that would darken every picture by half a level on average,
    and a picture that nobody changed would not come back as it was.
    """
    pixels = (image[0].detach().float() / 2 + 0.5).clamp(0, 1) * 255
    return Image.fromarray(pixels.round().byte().permute(1, 2, 0).cpu().numpy())  # (3, H, W) -> (H, W, 3)


def working_size(width: int, height: int, short_side: int, multiple: int) -> tuple[int, int]:
    """The size nearest to the picture's shape with about this shorter side and both sides whole multiples.

    Raises ValueError for more pixels than any memory holds the networks' features of: many systems end a
    program that asks for too much without a word.
    """
    scale = short_side / min(width, height)
    fitted = [max(multiple, multiple * math.floor(side * scale / multiple + 0.5)) for side in (width, height)]
    if math.prod(fitted) > MOST_WORKING:
        found = f"{fitted[0]}x{fitted[1]}"
        raise ValueError(
            f"the working size {found} is too large, more than {MOST_WORKING:,} pixels: "
            "choose a smaller --size"
        )
    return fitted[0], fitted[1]


def resize(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Another size, (width, height), smooth and free of aliasing, border on border."""
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def to_grid(points: Sequence[Point], size: tuple[int, int], grid: tuple[int, int]) -> list[Point]:
    """Maps (x, y) in a picture of `size` (width, height) to (row, column) on a grid of (rows, columns).

    Borders lie on borders, as when a picture or a feature map is resized, so a pixel's centre goes to
    (x + 1/2) s - 1/2; the official code's x s is off by (1 - s) / 2 grid units. Whole pixels, rounded
    afterwards, are always on the grid.
    """
    down, across = grid[0] / size[1], grid[1] / size[0]
    return [((y + 0.5) * down - 0.5, (x + 0.5) * across - 0.5) for x, y in points]


def to_pixels(points: Sequence[Point], size: tuple[int, int], grid: tuple[int, int]) -> list[Point]:
    """Maps (row, column) on a grid back to (x, y) in the picture: the inverse of `to_grid`."""
    down, across = size[1] / grid[0], size[0] / grid[1]
    return [((column + 0.5) * across - 0.5, (row + 0.5) * down - 0.5) for row, column in points]


def mask_to_grid(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Brings a mask, (H, W) of 0 and 1, to the latent's (rows, columns): a cell is 1 if half of it is marked.

    The nearest pixel alone, as in the official code, would let a thin line come and go with its position.
    Where no cell is half covered, those that are covered most stay, so that a mask never vanishes.
    """
    share = interpolate(mask[None, None], size=grid, mode="area")[0, 0]  # (H, W) -> (rows, columns)
    return (share >= share.max().clamp(max=0.5)).to(mask) * (share > 0)


def write_whole(path: Path, writer: Callable[[Path], object]) -> None:
    """Lets `writer` fill a temporary file beside `path`, then renames it: whole or not at all.

    The temporary name ends as `path` does, for writers that choose a format by it.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        writer(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
