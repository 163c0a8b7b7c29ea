"""GoodDrag (arXiv 2404.07206): drag and denoise in turn, a few updates at each noise level.

One level has to make the whole change at once and leaves the latents that the UNet knows; here denoising
brings the latent back after every few updates.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from minidrag.config import EditConfig
from minidrag.method.ddim import NoisePredictor, Schedule
from minidrag.method.drag import Origin, Step, all_arrived, drag, step_of
from minidrag.method.dragdiffusion import Task, observe, supervise
from minidrag.method.warp import warp

STILL = 3  # levels in which no handle moves, after which the drag is given up


def gooddrag(
    unet: NoisePredictor, schedule: Schedule, path: list[Tensor], text: Tensor, task: Task, config: EditConfig
) -> Iterator[Step]:
    """Drag at the last `config.drag_levels` levels of the inversion, from the noisiest down.

    path: latents (1, 4, H, W) by level, the clean one first. Each level has an optimizer of its own and is
    compared with the original at that level; a DDIM step without reference keys and values leads to the next.
    What has arrived is held there at all levels that follow; let go, it drifts back (bench/README.md).
    With `config.warp_start` the objects under the handles are moved first.
    """
    top = len(path) - 1
    latent, handles, still = path[top], task.handles, 0
    for level in range(top, max(top - config.drag_levels, 0), -1):
        look = partial(observe, unet, schedule, text, task.grid, config, level)
        with torch.no_grad():
            origin = Origin(task.handles, look(path[level]))
        if config.warp_start and level == top:
            yield step_of(latent, handles, origin.view, None)
            latent, handles = warp(latent, task, origin.view.features)
        score, before = partial(supervise, task, config), handles
        for step in drag(latent, handles, task.targets, look, score, config, origin):  # noqa: UP028, used below
            yield step
        latent, handles = step.previous, step.handles
        stuck = handles == before and not all_arrived(handles, task.targets, config.tolerance)
        still = still + 1 if stuck else 0
        if still == STILL:
            return
