"""Scenes in another look: fixed changes of a whole image that the small model has not seen.

The true result stays known, as the same change is made to the image, to its true result, and to the
renderings that the placement fit compares with the edit. The autoencoder returns each style at 26 dB or more.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image

from minidrag.tiny.objects import Array
from minidrag.tiny.renderer import SIDE, Scene, render

LUMA = np.array([0.299, 0.587, 0.114])
GRAIN = np.random.default_rng(0).normal(0, 10, (SIDE, SIDE, 1))
ROW, COLUMN = np.mgrid[0:SIDE, 0:SIDE]
HATCHES = ((ROW + COLUMN) % 12 < 5)[..., None]


def hue(image: Array) -> Array:
    """Rotate all colors by 20 degrees around gray (Rodrigues' formula)."""
    cos = np.cos(np.radians(20))
    sin = np.sin(np.radians(20)) / np.sqrt(3)
    gray = image.mean(axis=-1, keepdims=True)
    across = np.roll(image, 1, axis=-1) - np.roll(image, -1, axis=-1)
    return cos * image + (1 - cos) * gray + sin * across


STYLES: dict[str, Callable[[Array], Array]] = {  # (SIDE, SIDE, 3), 0 to 255, in and out
    "plain": lambda image: image,
    "hue": hue,
    "pale": lambda image: 0.6 * image + 0.4 * (image @ LUMA)[..., None],
    "grain": lambda image: image + GRAIN,
    "hatched": lambda image: image * (1 - 0.1 * HATCHES),
}


def styled(style: str, scene: Scene, side: int = SIDE) -> Image.Image:
    """A scene in a style, (side, side)."""
    if style == "plain":
        return render(scene, side)
    changed = STYLES[style](np.asarray(render(scene), dtype=float))
    image = Image.fromarray(np.rint(changed.clip(0, 255)).astype(np.uint8))
    return image if side == SIDE else image.resize((side, side), Image.Resampling.BOX)
