"""Drag instructions: their checks, and the way from pixels to the feature grid and back."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from minidrag.method.drag import Cell, Size, rescale, snap
from minidrag.method.dragdiffusion import Task

MAX_ASPECT = 8  # a longer strip would take very much memory


class Pixel(NamedTuple):
    """Point of an image, from its upper left corner; whole numbers are pixel centers."""

    x: float
    y: float


def to_task(
    handles: Sequence[Pixel],
    targets: Sequence[Pixel],
    mask: Tensor | None,
    size: Size,
    working_size: Size,
    factor: int,
) -> Task:
    """Bring a checked drag instruction on an image of `size` (width, height) to the feature grid.

    mask: (height, width), bool, True in the editable region; None: everything. working_size: (width, height)
    of the image for the networks; the grid has half of it, the latent a `factor`th.
    """
    width, height = working_size
    grid = height // 2, width // 2
    starts = [snap(cell, grid) for cell in to_cells(handles, size, grid)]
    cells = None if mask is None else mask_to_latent(mask.float(), (height // factor, width // factor))
    return Task(starts, to_cells(targets, size, grid), cells, grid)


def check_instruction(
    size: Size, handles: Sequence[Pixel], targets: Sequence[Pixel], mask: Tensor | None
) -> None:
    """Raise ValueError for points or a mask that do not fit an image of `size` (width, height)."""
    width, height = size
    if max(size) > MAX_ASPECT * min(size):
        raise ValueError(f"the image is {width}x{height} pixels, longer than {MAX_ASPECT} to 1: crop it")
    if len(handles) != len(targets) or not handles:
        raise ValueError(f"got {len(handles)} handles and {len(targets)} targets: give one or more pairs")
    for name, points in (("handle", handles), ("target", targets)):
        for x, y in points:
            if not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5):
                raise ValueError(f"{name} {x:g},{y:g} is outside the image of {width}x{height} pixels")
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise ValueError(f"the mask has dtype {mask.dtype}: give bool, True in the editable region")
    if mask.shape != (height, width):
        raise ValueError(f"the mask is {mask.shape[1]}x{mask.shape[0]} pixels, the image {width}x{height}")
    outside = [handle for handle in handles if not is_editable(mask, handle)]
    if len(outside) == len(handles) and 0.5 < mask.float().mean() < 0.99:
        raise ValueError(
            "the mask seems to be inverted, as no handle is in its white part, which is most of it: "
            "paint white what may change, not what stays"
        )
    for x, y in outside[:1]:
        raise ValueError(f"handle {x:g},{y:g} is outside the mask: mark what it drags as editable too")


def is_editable(mask: Tensor, point: Pixel, reach: float = 0) -> bool:
    """True if a mask, (height, width), bool, is editable at a point and `reach` pixels around it."""
    x, y = (min(round(at), full - 1) for at, full in zip(point, reversed(mask.shape), strict=True))
    around = round(reach)
    rows = slice(max(0, y - around), y + around + 1)
    columns = slice(max(0, x - around), x + around + 1)
    return bool(mask[rows, columns].all())


def to_cells(pixels: Sequence[Pixel], size: Size, grid: Size) -> list[Cell]:
    """Map points of an image of `size` (width, height) to a grid of (rows, columns)."""
    rows, columns = grid
    return [Cell(y, x) for x, y in rescale(pixels, size, (columns, rows))]


def to_pixels(cells: Sequence[Cell], size: Size, grid: Size) -> list[Pixel]:
    """Inverse of `to_cells`."""
    width, height = size
    return [Pixel(x, y) for y, x in rescale(cells, grid, (height, width))]


def mask_to_latent(mask: Tensor, shape: Size) -> Tensor:
    """Bring a mask, (height, width) of 0 and 1, to the latent's (rows, columns): 1 where half is covered.

    The official code takes the nearest pixel, so that a thin line comes and goes with its position. If no
    cell is half covered, the most covered ones count: a mask never vanishes.
    """
    # (height, width) -> (rows, columns)
    covered = interpolate(mask[None, None], size=shape, mode="area")[0, 0]
    return (covered >= covered.max().clamp(max=0.5)).to(mask) * (covered > 0)
