"""Latent optimization, the loop of DragDiffusion (arXiv 2306.14435, section 3.3).

The loop knows no network: `observe` shows the features of a latent and `supervise` computes the loss, so
another image generator needs only another `observe`. Motion supervision and point tracking are DragGAN's
(arXiv 2305.10973). Points, radii, and distances are in cells of the feature grid.
"""

import math
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minidrag.config import EditConfig


class Cell(NamedTuple):
    """Point on the feature grid; whole numbers are cell centers."""

    row: float
    column: float


Cells = Sequence[Cell]
Size = tuple[int, int]  # of a grid or image; rows and columns for cells, width and height for pixels


class View(NamedTuple):
    """Result of one UNet call on a latent; latents are (1, 4, H, W)."""

    features: Tensor  # (C, R, S) on the feature grid
    previous: Tensor  # z_{t-1}, the latent one DDIM step down
    predicted: Tensor  # the finished latent, predicted from here, detached
    level: int  # denoising steps left

    def detach(self) -> "View":
        return View(self.features.detach(), self.previous.detach(), self.predicted, self.level)


class Origin(NamedTuple):
    """The image before the drag, at the level of the latent."""

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
) -> Generator[Step, None, Step]:
    """Optimize a latent until the content of every handle point lies at its target point.

    latent: (1, 4, H, W); the optimized copy is float32 or wider. handles: whole cells.
    origin: the image before the drag; None: `latent` is that image.
    Yields the state before the first update and after each, and returns the last. Ends when every handle has
    arrived, but not before `config.hold_steps` updates.
    """
    latent = latent.detach().to(torch.promote_types(latent.dtype, torch.float32), copy=True).requires_grad_()
    optimizer = torch.optim.Adam([latent], lr=config.drag_lr)
    view = observe(latent)
    if origin is None:
        origin = Origin(handles, view.detach())
    else:
        handles = track(view.features, handles, origin, config.track_radius)
    step = step_of(latent, handles, view, None)
    yield step
    for update in range(config.drag_steps):
        if update >= config.hold_steps and all_arrived(handles, targets, config.tolerance):
            break
        loss = supervise(view, handles, origin)  # eq. 3
        (latent.grad,) = torch.autograd.grad(loss, latent)
        optimizer.step()  # eq. 4
        view = observe(latent)
        handles = track(view.features, handles, origin, config.track_radius)  # eq. 5
        step = step_of(latent, handles, view, loss.item())
        yield step
    return step


def step_of(latent: Tensor, handles: Cells, view: View, loss: float | None) -> Step:
    """State of a drag, detached from its graph."""
    return Step(latent.detach().clone(), handles, view.previous.detach(), view.predicted, view.level, loss)


def motion_loss(
    features: Tensor, handles: Cells, targets: Cells, reference: Origin, config: EditConfig
) -> Tensor:
    """Motion supervision, the first term of eq. 3: each patch is pulled d_i ahead.

        sum_i sum_{q in Omega(h_i, r_1)} || F_{q + d_i}(z_t) - sg(F_q(z_t)) ||_1

    features: F(z_t), (C, R, S). reference: the view that F_q is read from, and its handles: of z_t itself, as
    in the paper, or of the image before the drag (GoodDrag, arXiv 2404.07206). sg: the stop-gradient.
    """
    total = features.sum() * 0  # has a gradient even if no patch is pulled
    source = reference.view.features.detach()
    for handle, target, start in zip(handles, targets, reference.handles, strict=True):
        offset = pull(handle, target, config)
        if offset is None:
            continue
        cells = patch(handle, config.motion_radius, features)
        ahead = sample(features, cells + cells.new_tensor(offset))
        before = sample(source, cells + (cells.new_tensor(start) - cells.new_tensor(handle)))
        difference = (ahead - before).abs()  # (C, P)
        area = (2 * config.motion_radius + 1) ** 2
        total = total + (difference.sum() if config.motion_loss == "sum" else difference.mean() * area)
    return total


def pull(handle: Cell, target: Cell, config: EditConfig) -> list[float] | None:
    """d_i of eq. 3, the cells down and right by which the patch of a handle is pulled; None: it is not.

        d_i = (g_i - h_i) / || g_i - h_i ||_2, times `config.motion_step`

    A handle that has arrived is held at its target, or left alone without `config.hold_steps`.
    """
    distance = math.dist(handle, target)
    if not arrived(handle, target, config.tolerance):
        length = min(config.motion_step, max(distance, 1.0))  # the paper's one cell may lead past the target
    elif config.hold_steps:
        length = distance
    else:
        return None
    return [length * (to - at) / (distance or 1.0) for at, to in zip(handle, target, strict=True)]


def background_loss(previous: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """Second term of eq. 3 without lambda, || (z_{t-1} - sg(z_{t-1}^0)) (1 - M) ||_1. mask: M, (H, W)."""
    return ((previous - original) * (1 - mask.to(previous))).abs().sum()


def track(features: Tensor, handles: Cells, origin: Origin, radius: int) -> list[Cell]:
    """Point tracking, eq. 5: move each handle to the best match of its original feature nearby.

        h_i^{k+1} = argmin_{q in Omega(h_i^k, r_2)} || F_q(z_t^{k+1}) - F_{h_i^0}(z_t) ||_1

    features: (C, R, S). Returns whole cells; the window is clipped at the border.
    """
    matches = []
    for handle, (row, column) in zip(handles, origin.handles, strict=True):
        cells = patch(handle, radius, features)
        reference = origin.view.features[:, int(row), int(column)]
        distances = (sample(features.detach(), cells) - reference[:, None]).abs().sum(0)  # (P,)
        matches.append(Cell(*cells[distances.argmin()].tolist()))
    return matches


def arrived(handle: Cell, target: Cell, tolerance: float) -> bool:
    """True for a handle nearer to its target than the tolerance, or on it."""
    distance = math.dist(handle, target)
    return distance < tolerance or distance == 0


def all_arrived(handles: Cells, targets: Cells, tolerance: float) -> bool:
    """True if every handle has arrived at its target."""
    return all(arrived(*pair, tolerance) for pair in zip(handles, targets, strict=True))


def rescale(points: Sequence[tuple[float, float]], size: Size, other: Size) -> list[tuple[float, float]]:
    """Map points of a grid of one size to a grid of another; sizes have the order of the coordinates.

    Borders map to borders, as in resizing, so a center x goes to (x + 1/2) s - 1/2. The official code's x s
    is off by (1 - s) / 2 cells.
    """
    scales = [new / old for new, old in zip(other, size, strict=True)]
    return [((x + 0.5) * scales[0] - 0.5, (y + 0.5) * scales[1] - 0.5) for x, y in points]


def snap(cell: Cell, grid: Size) -> Cell:
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
    row, column = corner.long().T
    next_row, next_column = torch.minimum(corner + 1, last).long().T
    down, right = (points - corner).T
    upper = (1 - right) * features[:, row, column] + right * features[:, row, next_column]
    lower = (1 - right) * features[:, next_row, column] + right * features[:, next_row, next_column]
    return (1 - down) * upper + down * lower
