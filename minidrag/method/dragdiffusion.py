"""DragDiffusion (arXiv 2306.14435, section 3.3): drag one latent at one noise level."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import interpolate

from minidrag.config import EditConfig
from minidrag.method.ddim import Denoiser
from minidrag.method.drag import (
    Cells,
    Observe,
    Origin,
    Step,
    Supervise,
    View,
    background_loss,
    drag,
    motion_loss,
)


class Task(NamedTuple):
    """A drag instruction on the feature grid."""

    handles: Cells  # whole cells
    targets: Cells
    mask: Tensor | None  # (H, W) of the latent, 1 in the editable region; None: all is editable
    grid: tuple[int, int]  # rows and columns


# From a denoiser, the inversion's latents by level, and a task to the steps of a drag.
Method = Callable[[Denoiser, list[Tensor], Task, EditConfig], Iterator[Step]]


def dragdiffusion(denoiser: Denoiser, path: list[Tensor], task: Task, config: EditConfig) -> Iterator[Step]:
    """Drag at the last level of the inversion. path: latents (1, 4, H, W) by level, the clean one first."""
    level = len(path) - 1
    observe = observer(denoiser, level, task, config)
    supervise = supervisor(task, config)
    return drag(path[level], task.handles, task.targets, observe, supervise, config)


def observer(denoiser: Denoiser, level: int, task: Task, config: EditConfig) -> Observe:
    """Return the function that shows the loop a latent of a level, by one call of the UNet."""

    def observe(latent: Tensor) -> View:
        noise, features, _ = denoiser(latent, level)
        tapped = features[config.block - 1].to(latent.dtype)
        enlarged = interpolate(tapped, size=task.grid, mode="bilinear")[0]  # (1, C, h, w) -> (C, R, S)
        previous = denoiser.step(latent, noise, level, level - 1)
        predicted = denoiser.step(latent.detach(), noise.detach(), level, 0)
        return View(enlarged, previous, predicted, level)

    return observe


def supervisor(task: Task, config: EditConfig) -> Supervise:
    """Return the loss of eq. 3: motion supervision plus lambda times the change of the unmasked region."""

    def supervise(view: View, handles: Cells, origin: Origin) -> Tensor:
        reference = origin if config.motion_reference == "start" else Origin(handles, view)
        loss = motion_loss(view.features, handles, task.targets, reference, config)
        if task.mask is None:
            return loss
        return loss + config.mask_weight * background_loss(view.previous, origin.view.previous, task.mask)

    return supervise
