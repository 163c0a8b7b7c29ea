"""An image to test with, and how far two are apart."""

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 100, 72


def color_image() -> Image.Image:
    """A smooth image without any symmetry."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    pixels = np.stack([2 * x + 20, 3 * y + 10, 200 - x - y // 2], axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def max_difference(one: Image.Image, other: Image.Image) -> int:
    """Largest difference between two RGB images of the same size, in levels of 255."""
    assert one.mode == other.mode == "RGB" and one.size == other.size
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())
