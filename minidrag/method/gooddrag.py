"""GoodDrag (arXiv 2404.07206): alternate a few drag updates with a denoising step.

Many updates at one level lead away from the latents that the UNet knows; here a denoising step brings the
latent back after every few of them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from minidrag.config import EditConfig
from minidrag.method.ddim import Denoiser
from minidrag.method.drag import Origin, Step, all_arrived, drag, step_of
from minidrag.method.dragdiffusion import Task, observer, supervisor
from minidrag.method.warp import warp

PATIENCE = 3  # levels without any movement before giving up


def gooddrag(denoiser: Denoiser, path: list[Tensor], task: Task, config: EditConfig) -> Iterator[Step]:
    """Drag at the last `config.drag_levels` levels of the inversion, from the noisiest down.

    path: latents (1, 4, H, W) by level, the clean one first. Each level has a new optimizer and the original
    of that level as its reference; a DDIM step without reference keys and values leads to the next level.
    A handle that has arrived is held at all later levels; let go, it drifts back (bench/README.md).
    With `config.warp_start` the objects under the handles are moved first.
    """
    top = len(path) - 1
    latent = path[top]
    handles = task.handles
    supervise = supervisor(task, config)
    idle = 0
    for level in range(top, max(top - config.drag_levels, 0), -1):
        observe = observer(denoiser, level, task, config)
        with torch.no_grad():
            origin = Origin(task.handles, observe(path[level]))
        if config.warp_start and level == top:
            yield step_of(latent, handles, origin.view, None)
            latent, handles = warp(latent, task, origin.view.features)
        last = yield from drag(latent, handles, task.targets, observe, supervise, config, origin)
        moved = last.handles != handles or all_arrived(last.handles, task.targets, config.tolerance)
        idle = 0 if moved else idle + 1
        if idle == PATIENCE:
            return
        latent = last.previous
        handles = last.handles
