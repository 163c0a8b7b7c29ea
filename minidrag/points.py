"""From pixels to the feature grid and back: drag instructions, their checks, and masks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from minidrag.config import EditConfig
from minidrag.method.drag import Cell, snap
from minidrag.method.dragdiffusion import Task
from minidrag.model import Model, working_size

MAX_ASPECT = 8  # a longer strip would take very much memory


class Pixel(NamedTuple):
    """Point of an image, from its upper left corner; whole numbers are pixel centers."""

    x: float
    y: float


def to_task(
    model: Model,
    size: tuple[int, int],
    handles: Sequence[Pixel],
    targets: Sequence[Pixel],
    mask: Tensor | None,
    config: EditConfig,
) -> Task:
    """Check a drag instruction on an image of `size` (width, height) and bring it to the feature grid.

    mask: (height, width), 1 in the editable region; None: all of it.
    Raises ValueError, one sentence, for an instruction or a model that cannot be used.
    """
    check_instruction(size, handles, targets, mask)
    model.schedule.pairs(config.steps)
    unet = model.unet.config
    if model.prediction != "epsilon" or unet.in_channels != 4 or unet.use_linear_projection:
        other = model.prediction != "epsilon"
        predicts = f" that predicts the noise, not {model.prediction}" if other else ""
        raise ValueError(
            f"{model.source} is not a Stable Diffusion 1.x model: use one or a fine-tune{predicts}"
        )
    factor = model.vae.config.factor
    width, height = working_size(model, size, config)
    grid = height // 2, width // 2
    cells = None
    if mask is not None:
        dtype = torch.promote_types(model.dtype, torch.float32)
        cells = mask_to_latent(mask.float(), (height // factor, width // factor)).to(model.device, dtype)
    starts = [snap(cell, grid) for cell in to_cells(handles, size, grid)]
    return Task(starts, to_cells(targets, size, grid), cells, grid)


def check_instruction(
    size: tuple[int, int], handles: Sequence[Pixel], targets: Sequence[Pixel], mask: Tensor | None
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
    if mask.shape != (height, width):
        raise ValueError(f"the mask is {mask.shape[1]}x{mask.shape[0]} pixels, the image {width}x{height}")
    places = [(min(round(y), height - 1), min(round(x), width - 1)) for x, y in handles]
    outside = [handle for handle, place in zip(handles, places, strict=True) if mask[place] < 0.5]
    if len(outside) == len(handles) and 0.5 < mask.mean() < 0.99:
        what = "no handle is in its white part, which is most of it"
        raise ValueError(
            f"the mask seems to be inverted, as {what}: paint white what may change, not what stays"
        )
    for x, y in outside[:1]:
        raise ValueError(f"handle {x:g},{y:g} is outside the mask: mark what it drags as editable too")


def to_cells(pixels: Sequence[Pixel], size: tuple[int, int], grid: tuple[int, int]) -> list[Cell]:
    """Map points of an image of `size` (width, height) to a grid of (rows, columns).

    Borders map to borders, as in resizing, so a pixel center goes to (x + 1/2) s - 1/2. The official code's
    x s is off by (1 - s) / 2 cells.
    """
    down, right = grid[0] / size[1], grid[1] / size[0]
    return [Cell((y + 0.5) * down - 0.5, (x + 0.5) * right - 0.5) for x, y in pixels]


def to_pixels(cells: Sequence[Cell], size: tuple[int, int], grid: tuple[int, int]) -> list[Pixel]:
    """Inverse of `to_cells`."""
    down, right = size[1] / grid[0], size[0] / grid[1]
    return [Pixel((column + 0.5) * right - 0.5, (row + 0.5) * down - 0.5) for row, column in cells]


def mask_to_latent(mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """Bring a mask, (height, width) of 0 and 1, to the latent's (rows, columns): 1 where half is marked.

    The official code takes the nearest pixel, so that a thin line comes and goes with its position. If no
    cell is half covered, the most covered ones count: a mask never vanishes.
    """
    # (height, width) -> (rows, columns)
    covered = interpolate(mask[None, None], size=shape, mode="area")[0, 0]
    return (covered >= covered.max().clamp(max=0.5)).to(mask) * (covered > 0)
