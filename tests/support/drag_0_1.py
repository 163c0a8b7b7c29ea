"""The optimisation at the heart of DragDiffusion: pull features along, and follow where they went.

Everything here lives on the feature grid: features of one UNet block, enlarged to half the picture's size.
Points are (row, column) on it. "Paper" is arXiv 2306.14435, section 3.3.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from minidrag.config import EditConfig
from minidrag.method.ddim import NoisePredictor as Predictor
from minidrag.method.ddim import Schedule

Point = tuple[float, float]
OnStep = Callable[[int, float], None]  # called with the number of steps done and the loss of the last


@dataclass(frozen=True)
class Drag:
    """What came of it.

    latent: (1, 4, H, W), still at the edited step. paths: every handle's (row, column) at the start and after
    each step. losses: one per step. clean: the finished latent as the UNet foresaw it, at the same moments as
    the paths. reason: "arrived" or "steps".
    """

    latent: Tensor
    paths: list[list[Point]]
    losses: list[float]
    clean: list[Tensor]
    reason: str


@torch.enable_grad()
def optimise(
    unet: Predictor,
    schedule: Schedule,
    latent: Tensor,
    text: Tensor,
    handles: Sequence[Point],
    targets: Sequence[Point],
    mask: Tensor | None,
    grid: tuple[int, int],
    config: EditConfig,
    on_step: OnStep | None = None,
) -> Drag:
    """Changes one latent until what lies under the handles lies at the targets (paper section 3.3).

    latent: (1, 4, H, W) at the edited step. text: (1, 77, C). handles: whole numbers.
    mask: (H, W), 1 where the picture may change; None: everywhere. grid: the feature grid's (rows, columns).
    The latent and the loss are float32 at least.
    Raises FloatingPointError, with the step, for a loss or a gradient that is not finite.
    """
    time, below = schedule.pairs(config.steps)[config.steps - config.inversion_steps]
    edited = latent.detach().to(torch.promote_types(latent.dtype, torch.float32), copy=True).requires_grad_()
    optimizer = torch.optim.Adam([edited], lr=config.drag_lr)
    paths, losses, clean, reason = [[handle] for handle in handles], [], [], "steps"

    def look() -> tuple[Tensor, Tensor]:
        noise, features, _ = unet(edited, time, text)
        clean.append(schedule.step(edited.detach(), noise.detach(), time, -1))
        map_ = interpolate(features[config.block - 1].to(edited.dtype), size=grid, mode="bilinear")[0]
        return map_, schedule.step(edited, noise, time, below)  # (C, rows, columns), (1, 4, H, W)

    for step in range(config.drag_steps + 1):
        features, lower = look()
        if step == 0:
            # Copies: a view of one cell would keep the whole map in memory, at SD 1.5's size 168 MB of it.
            starts = [features.detach()[:, int(row), int(column)].clone() for row, column in handles]
            original_lower = lower.detach()
            original = (features.detach(), handles) if config.motion_reference == "start" else None
        else:
            for path, start in zip(paths, starts, strict=True):
                path.append(track(features.detach(), start, path[-1], config.track_radius))
        handles = [path[-1] for path in paths]
        left = [math.dist(handle, target) for handle, target in zip(handles, targets, strict=True)]
        if all(distance < config.tolerance or distance == 0 for distance in left):
            reason = "arrived"
        if reason == "arrived" or step == config.drag_steps:
            break
        loss = motion(features, handles, targets, config, original)
        if mask is not None:
            loss = loss + config.mask_weight * background_loss(lower, original_lower, mask)
        (edited.grad,) = torch.autograd.grad(loss, edited)
        if not (loss.isfinite() and edited.grad.isfinite().all()):
            raise FloatingPointError(f"drag: the loss or its gradient is not finite in step {step + 1}")
        optimizer.step()
        losses.append(loss.item())
        if on_step:
            on_step(step + 1, losses[-1])
    return Drag(edited.detach(), paths, losses, clean, reason)


def motion(
    features: Tensor,
    handles: Sequence[Point],
    targets: Sequence[Point],
    config: EditConfig,
    original: tuple[Tensor, Sequence[Point]] | None = None,
) -> Tensor:
    """Motion supervision: what is at q now shall be one grid unit nearer to the target (paper eq. 3).

        L = sum_i sum_{q in Omega(h_i, r_1)} || F_{q + d_i}(z_t) - sg(F_q(z_t)) ||_1
        d_i = (g_i - h_i) / || g_i - h_i ||_2

    features: (C, H, W). original: the features before the drag and the handles there, which then stand in for
    sg(F) and its h_i, so that what is pulled stays what it was (GoodDrag, arXiv 2404.07206).
    config.motion_step stretches d_i, but not beyond the target.
    A pair that has arrived takes no part, as in the authors' program.
    """
    total = features.sum() * 0
    source, begun = original or (features.detach(), handles)
    for handle, target, began in zip(handles, targets, begun, strict=True):
        distance = math.dist(handle, target)
        if distance < config.tolerance or distance == 0:
            continue
        length = min(config.motion_step, max(distance, 1.0))  # the paper's one unit may lead past the target
        direction = [length * (to - at) / distance for at, to in zip(handle, target, strict=True)]
        cells = patch(handle, config.motion_radius, features)
        ahead = sample(features, cells + cells.new_tensor(direction))
        held = sample(source, cells + (cells.new_tensor(began) - cells.new_tensor(handle)))
        difference = (ahead - held).abs()  # (C, P)
        whole = (2 * config.motion_radius + 1) ** 2
        total = total + (difference.sum() if config.motion_loss == "sum" else difference.mean() * whole)
    return total


def background_loss(lower: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """How much the latent one DDIM step further down differs where nothing may change (paper eq. 3).

        || (z_{t-1} - sg(z^0_{t-1})) (1 - M) ||_1

    lower, original: (1, 4, H, W). mask: (H, W), M.
    """
    return ((lower - original) * (1 - mask.to(lower))).abs().sum()


def track(features: Tensor, start: Tensor, handle: Point, radius: int) -> Point:
    """Moves a handle to the best match of what it began on, within a window (paper eq. 5).

        h_i^{k+1} = argmin_{q in Omega(h_i^k, r_2)} || F_q(z_t^{k+1}) - F_{h_i^0}(z_t) ||_1

    features: (C, H, W) of the latent as it is now. start: (C,) of the original at the first handle.
    Returns (row, column), whole numbers on the feature grid; the window is cut at the border.
    """
    cells = patch(handle, radius, features)
    distance = (sample(features, cells) - start[:, None]).abs().sum(0)  # (P,)
    row, column = cells[distance.argmin()].tolist()
    return row, column


def patch(center: Point, radius: int, features: Tensor) -> Tensor:
    """The cells around a whole point that lie on the map, row by row: (P, 2), P up to (2 radius + 1)^2."""
    spans = [
        torch.arange(max(int(at) - radius, 0), min(int(at) + radius, size - 1) + 1)
        for at, size in zip(center, features.shape[1:], strict=True)
    ]
    return torch.cartesian_prod(*spans).to(features)


def sample(features: Tensor, points: Tensor) -> Tensor:
    """Reads a map between its cells, bilinearly; beyond the border it goes on as it is at the border.

    features: (C, H, W). points: (P, 2), rows and columns. Returns (C, P).
    """
    last = points.new_tensor(features.shape[1:]) - 1
    points = torch.minimum(points.clamp(min=0), last)
    corner = points.floor()
    (row, column), (next_row, next_column) = corner.long().T, torch.minimum(corner + 1, last).long().T
    down, across = (points - corner).T
    upper = (1 - across) * features[:, row, column] + across * features[:, row, next_column]
    lower = (1 - across) * features[:, next_row, column] + across * features[:, next_row, next_column]
    return (1 - down) * upper + down * lower
