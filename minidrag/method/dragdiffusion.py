"""DragDiffusion (arXiv 2306.14435, section 3.3): drag one latent at one noise level."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import interpolate

from minidrag.config import EditConfig
from minidrag.method.ddim import NoisePredictor, Schedule
from minidrag.method.drag import Cells, Origin, Step, View, background_loss, drag, motion_loss


class Task(NamedTuple):
    """A drag instruction on the feature grid."""

    handles: Cells  # whole cells
    targets: Cells
    mask: Tensor | None  # (H, W) of the latent, 1 in the editable region; None: all is editable
    grid: tuple[int, int]  # rows and columns


# From an inversion and a task to the steps of a drag; `ddim.denoise` goes on from the last step's level.
Method = Callable[[NoisePredictor, Schedule, list[Tensor], Tensor, Task, EditConfig], Iterator[Step]]


def dragdiffusion(
    unet: NoisePredictor, schedule: Schedule, path: list[Tensor], text: Tensor, task: Task, config: EditConfig
) -> Iterator[Step]:
    """Drag at the last level of the inversion. path: latents (1, 4, H, W) by level, the clean one first."""
    level = len(path) - 1
    look = partial(observe, unet, schedule, text, task.grid, config, level)
    score = partial(supervise, task, config)
    return drag(path[level], task.handles, task.targets, look, score, config)


def observe(
    unet: NoisePredictor,
    schedule: Schedule,
    text: Tensor,
    grid: tuple[int, int],
    config: EditConfig,
    level: int,
    latent: Tensor,
) -> View:
    """Call the UNet once: features of the tapped up block, enlarged to the grid, and the DDIM step down."""
    time, below = schedule.pairs(config.steps, level)[0]
    noise, features, _ = unet(latent, time, text)
    tapped = features[config.block - 1].to(latent.dtype)
    enlarged = interpolate(tapped, size=grid, mode="bilinear")[0]  # (1, C, h, w) -> (C, R, S)
    predicted = schedule.step(latent.detach(), noise.detach(), time, -1)
    return View(enlarged, schedule.step(latent, noise, time, below), predicted, level)


def supervise(task: Task, config: EditConfig, view: View, handles: Cells, origin: Origin) -> Tensor:
    """Equation 3: motion supervision plus lambda times the change of the unmasked region."""
    held = origin if config.motion_reference == "start" else None
    loss = motion_loss(view.features, handles, task.targets, config, held)
    if task.mask is None:
        return loss
    return loss + config.mask_weight * background_loss(view.previous, origin.view.previous, task.mask)
