"""Images and masks: Pillow images to tensors and back.

Sizes are (width, height) for Pillow and people, (rows, columns) for tensors.
"""

import math

import numpy as np
import torch
from PIL import Image, ImageChops, ImageFilter
from torch import Tensor

MAX_WORKING_PIXELS = 16_000_000  # Stable Diffusion 1.5 is made for 262,144
MAX_PSNR = 100.0  # dB, for equal images instead of infinity
WHITE = (255, 255, 255)
BLACK = (0, 0, 0)


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

    Raises ValueError for more pixels than any memory holds: many systems kill such a process without a word.
    """
    scale = short_side / min(width, height)
    fitted = [max(multiple, multiple * math.floor(side * scale / multiple + 0.5)) for side in (width, height)]
    if math.prod(fitted) > MAX_WORKING_PIXELS:
        raise ValueError(
            f"the working size {fitted[0]}x{fitted[1]} has more than {MAX_WORKING_PIXELS:,} pixels: "
            "choose a smaller --size"
        )
    return fitted[0], fitted[1]


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize to (width, height) without aliasing; borders stay on borders."""
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def psnr(one: Image.Image, other: Image.Image, region: np.ndarray | None = None) -> float:
    """PSNR in dB, at most MAX_PSNR. region: (H, W), bool, the pixels to compare."""
    squares = (np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)) ** 2
    error = squares.mean() if region is None else squares[region].mean()
    return MAX_PSNR if error == 0 else min(MAX_PSNR, float(10 * np.log10(255**2 / error)))


def paste(edited: Image.Image, original: Image.Image, mask: Tensor, seam: float) -> Image.Image:
    """Put the original's pixels back outside the mask, with a soft seam on the inside.

    edited, original: the same size. mask: (H, W), bool, True in the editable region. seam: standard deviation
    of its blur in pixels.
    """
    hard = Image.fromarray(mask.cpu().numpy()).convert("L")
    blurred = hard.filter(ImageFilter.GaussianBlur(seam))
    soft = blurred.point([max(0, 2 * level - 255) for level in range(256)])  # 0 at the edge, 255 well inside
    return Image.composite(edited, original, ImageChops.multiply(soft, hard))
