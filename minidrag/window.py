"""The part of a large image that is edited, and its way back at the image's full resolution.

A drag in a photo moves something small. Shrunk whole to the size that the model works at, it would be lost;
in a window around mask and points it is large enough to be edited.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from minidrag import images
from minidrag.config import EditConfig
from minidrag.points import Pixel

MARGIN = 0.75  # of the longer side of what is edited: least surroundings, both sides together
NEAR = 0.125  # of the longer side of the image: least surroundings, both sides together
LARGEST = 0.64  # of the image's area: a larger window is the whole image, as its surroundings are worth more
ENLARGE = 2  # working pixels per image pixel, at most
# A window snaps, so that it stays, and its LoRA with it, while points and mask move a little.
SIZES = 8  # of windows in an octave
PLACES = 16  # for a window along its own side
SEAM = 1 / 128  # of the window's shorter side: standard deviation of the seam's blur


class Window(NamedTuple):
    """Rectangle of an image, in whole pixels."""

    left: int
    top: int
    width: int
    height: int

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    def crop(self, image: Image.Image) -> Image.Image:
        return image.crop((self.left, self.top, self.left + self.width, self.top + self.height))

    def crop_mask(self, mask: Tensor) -> Tensor:
        """Part of a mask, (height, width)."""
        return mask[self.top : self.top + self.height, self.left : self.left + self.width]

    def enter(self, points: Sequence[Pixel]) -> list[Pixel]:
        """Points of the image as points of the window."""
        return [Pixel(x - self.left, y - self.top) for x, y in points]

    def leave(self, points: Sequence[Pixel]) -> list[Pixel]:
        """Points of the window as points of the image; inverse of `enter`."""
        return [Pixel(x + self.left, y + self.top) for x, y in points]

    def insert(self, part: Image.Image, image: Image.Image) -> Image.Image:
        """A copy of the image with the window's content replaced. part: of any size."""
        whole = image.copy()
        whole.paste(images.resize(part, self.size), (self.left, self.top))
        return whole

    def paste(self, part: Image.Image, image: Image.Image, mask: Tensor | None) -> Image.Image:
        """Like `insert`, with the image's own pixels outside the mask and a soft seam on the inside.

        mask: (H, W) of the image, bool, True in the editable region; None: all of the window.
        """
        edited = self.insert(part, image)
        if mask is None and self.size == image.size:
            return edited
        if mask is None:
            mask = torch.zeros(image.height, image.width, dtype=torch.bool)
            self.crop_mask(mask).fill_(True)
        return images.paste(edited, image, mask, max(1.0, SEAM * min(self.size)))


def choose_window(
    size: tuple[int, int],
    handles: Sequence[Pixel],
    targets: Sequence[Pixel],
    mask: Tensor | None,
    working: int,
    config: EditConfig,
) -> Window:
    """Choose the part of an image of `size` (width, height) to edit: mask and points with surroundings.

    It is a square, so that both axes have one scale; where the image is narrower, it ends at the borders.
    Its size and place are rounded, so that most small changes of mask and points leave it as it is.
    working: shorter side in pixels at which the model works. The window is at least half of it, and without
    a mask, which would tell how large the object is, at least all of it.
    """
    whole = Window(0, 0, *size)
    if not config.window:
        return whole
    across, down = bounds(size, handles, targets, mask, working)
    longer = max(high - low for low, high in (across, down))
    grown = longer + max(MARGIN * longer, NEAR * max(size))
    least = max(grown, working if mask is None else working / ENLARGE)
    octaves = math.ceil(SIZES * math.log2(least / working)) / SIZES
    width, height = fit(math.ceil(working * 2**octaves), size)
    if width * height > LARGEST * math.prod(size):
        return whole
    return Window(center(across, width, size[0]), center(down, height, size[1]), width, height)


Span = tuple[float, float]  # of edges of pixels: the first pixel has the edges 0 and 1


def bounds(
    size: tuple[int, int],
    handles: Sequence[Pixel],
    targets: Sequence[Pixel],
    mask: Tensor | None,
    working: int,
) -> list[Span]:
    """Columns and rows of what is edited.

    Without a mask the points stand for their objects, about as large as the longest drag.
    """
    longest = max(map(math.dist, handles, targets))
    around = max(0.75 * longest, working / 8) if mask is None else 0
    spans = []
    for axis, points in enumerate(zip(*handles, *targets, strict=True)):
        covered = [] if mask is None else mask.any(axis).nonzero().flatten().tolist()
        low = min([min(points) + 0.5 - around, *covered[:1]])
        high = max([max(points) + 0.5 + around, *[at + 1 for at in covered[-1:]]])
        spans.append((max(low, 0.0), min(high, float(size[axis]))))
    return spans


def center(span: Span, extent: int, full: int) -> int:
    """First pixel of an extent around a span, shifted into an image of `full` pixels."""
    low, high = span
    step = extent / PLACES
    snapped = step * round((low + high - extent) / 2 / step)
    return min(max(round(snapped), 0), full - extent)


def fit(side: int, size: tuple[int, int]) -> tuple[int, int]:
    """Largest width and height up to `side` that an image of `size` (width, height) has.

    Where one is less, the other is a multiple of an eighth of it, as are the sizes that the model works at.
    """
    shorter = min(side, *size)
    longer = round(math.ceil(8 * side / shorter) * shorter / 8)
    width, height = (shorter if full <= shorter else min(longer, full) for full in size)
    return width, height
