"""Latent optimization, the loop of DragDiffusion (arXiv 2306.14435, section 3.3).

The loop knows no network: `observe` looks at a latent and `supervise` scores the look, so another image
generator needs only another `observe`. Points, radii, and distances are in cells of the feature grid.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minidrag.config import EditConfig


class Cell(NamedTuple):
    """Point on the feature grid; whole numbers are cell centers."""

    row: float
    column: float


Cells = Sequence[Cell]


class View(NamedTuple):
    """A look at a latent; latents are (1, 4, H, W)."""

    features: Tensor  # (C, R, S) on the feature grid
    previous: Tensor  # z_{t-1}, the latent one DDIM step down
    predicted: Tensor  # the finished latent as foreseen from here, detached
    level: int  # denoising steps left


class Origin(NamedTuple):
    """The image before the drag, seen at the level of the latent."""

    handles: Cells
    view: View


class Step(NamedTuple):
    """State of a drag."""

    latent: Tensor
    handles: Cells
    previous: Tensor  # as in View, detached
    predicted: Tensor  # as in View
    level: int  # as in View
    loss: float | None  # of the update that led here


Observe = Callable[[Tensor], View]
Supervise = Callable[[View, Cells, Origin], Tensor]


@torch.enable_grad()
def drag(
    latent: Tensor,
    handles: Cells,
    targets: Cells,
    observe: Observe,
    supervise: Supervise,
    config: EditConfig,
    origin: Origin | None = None,
) -> Iterator[Step]:
    """Optimize a latent until the content of every handle point lies at its target point.

    latent: (1, 4, H, W); the optimized copy is float32 or wider. handles: whole cells.
    origin: the image before the drag; None: `latent` is that image.
    Yields the state before the first update and after each, until every handle has arrived and has been held
    there for the rest of `config.hold_steps` updates.
    """
    latent = latent.detach().to(torch.promote_types(latent.dtype, torch.float32), copy=True).requires_grad_()
    optimizer = torch.optim.Adam([latent], lr=config.drag_lr)
    view = observe(latent)
    if origin is None:
        origin = Origin(handles, View(view.features.detach(), view.previous.detach(), *view[2:]))
    else:
        handles = track(view.features, handles, origin, config.track_radius)
    yield step_of(latent, handles, view, None)
    for update in range(config.drag_steps):
        if update >= config.hold_steps and all_arrived(handles, targets, config.tolerance):
            return
        loss = supervise(view, handles, origin)  # eq. 3
        (latent.grad,) = torch.autograd.grad(loss, latent)
        optimizer.step()  # eq. 4
        view = observe(latent)
        handles = track(view.features, handles, origin, config.track_radius)  # eq. 5
        yield step_of(latent, handles, view, loss.item())


def step_of(latent: Tensor, handles: Cells, view: View, loss: float | None) -> Step:
    return Step(latent.detach().clone(), handles, view.previous.detach(), view.predicted, view.level, loss)


def motion_loss(
    features: Tensor, handles: Cells, targets: Cells, config: EditConfig, origin: Origin | None = None
) -> Tensor:
    """Motion supervision, the first term of eq. 3: each patch is pulled d_i ahead.

        sum_i sum_{q in Omega(h_i, r_1)} || F_{q + d_i}(z_t) - sg(F_q(z_t)) ||_1
        d_i = (g_i - h_i) / || g_i - h_i ||_2

    origin: compare with the image before the drag, F_q(z_t^0) around h_i^0, instead of the stop-gradient
    term (GoodDrag, arXiv 2404.07206). `config.motion_step` is the length of d_i, at most to the target.
    What has arrived is left alone or, with `config.hold_steps`, held at its target.
    """
    total = features.sum() * 0
    source = origin.view.features if origin else features.detach()
    for handle, target, start in zip(handles, targets, origin.handles if origin else handles, strict=True):
        near = arrived(handle, target, config.tolerance)
        if near and not config.hold_steps:
            continue
        distance = math.dist(handle, target) or 1.0
        # The paper's one cell may lead past the target; what has arrived is held there.
        length = distance if near else min(config.motion_step, max(distance, 1.0))
        direction = [length * (to - at) / distance for at, to in zip(handle, target, strict=True)]
        cells = patch(handle, config.motion_radius, features)
        ahead = sample(features, cells + cells.new_tensor(direction))
        held = sample(source, cells + (cells.new_tensor(start) - cells.new_tensor(handle)))
        difference = (ahead - held).abs()  # (C, P)
        area = (2 * config.motion_radius + 1) ** 2
        total = total + (difference.sum() if config.motion_loss == "sum" else difference.mean() * area)
    return total


def background_loss(previous: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """Second term of eq. 3 without lambda, || (z_{t-1} - sg(z_{t-1}^0)) (1 - M) ||_1. mask: M, (H, W)."""
    return ((previous - original) * (1 - mask.to(previous))).abs().sum()


def track(features: Tensor, handles: Cells, origin: Origin, radius: int) -> list[Cell]:
    """Point tracking, eq. 5: move each handle to the best match of its original feature nearby.

        h_i^{k+1} = argmin_{q in Omega(h_i^k, r_2)} || F_q(z_t^{k+1}) - F_{h_i^0}(z_t) ||_1

    features: (C, R, S). Returns whole cells; the window is clipped at the border.
    """
    found = []
    for handle, (row, column) in zip(handles, origin.handles, strict=True):
        cells = patch(handle, radius, features)
        reference = origin.view.features[:, int(row), int(column)]
        distances = (sample(features.detach(), cells) - reference[:, None]).abs().sum(0)  # (P,)
        found.append(Cell(*cells[distances.argmin()].tolist()))
    return found


def arrived(handle: Cell, target: Cell, tolerance: float) -> bool:
    """True for a handle nearer to its target than the tolerance, or on it."""
    distance = math.dist(handle, target)
    return distance < tolerance or distance == 0


def all_arrived(handles: Cells, targets: Cells, tolerance: float) -> bool:
    return all(arrived(*pair, tolerance) for pair in zip(handles, targets, strict=True))


def snap(cell: Cell, grid: tuple[int, int]) -> Cell:
    """Nearest whole cell on the grid."""
    return Cell(*(float(min(max(round(at), 0), size - 1)) for at, size in zip(cell, grid, strict=True)))


def patch(center: Cell, radius: int, features: Tensor) -> Tensor:
    """Cells of the grid within `radius` of a whole cell, Omega, row by row: (P, 2), P <= (2 radius + 1)^2."""
    spans = [
        torch.arange(max(int(at) - radius, 0), min(int(at) + radius, size - 1) + 1)
        for at, size in zip(center, features.shape[1:], strict=True)
    ]
    return torch.cartesian_prod(*spans).to(features)


def sample(features: Tensor, points: Tensor) -> Tensor:
    """Bilinear features (C, P) at points (P, 2), row and column; beyond the border, those of the border."""
    last = points.new_tensor(features.shape[1:]) - 1
    points = torch.minimum(points.clamp(min=0), last)
    corner = points.floor()
    (row, column), (next_row, next_column) = corner.long().T, torch.minimum(corner + 1, last).long().T
    down, right = (points - corner).T
    upper = (1 - right) * features[:, row, column] + right * features[:, row, next_column]
    lower = (1 - right) * features[:, next_row, column] + right * features[:, next_row, next_column]
    return (1 - down) * upper + down * lower
