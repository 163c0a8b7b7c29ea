"""Exercise 12: the alternation of dragging and denoising.

At a single noise level a drag has to make the whole change at once, and leaves the latents that the UNet
knows. GoodDrag (arXiv 2404.07206) alternates: a few updates at a level, then one DDIM step down, and
again.

    for level T, T - 1, ...:    z_T --drag--> z_T' --DDIM step--> z_{T-1} --drag--> z_{T-1}' --> ...

The inversion left the latents of the original at every level, `path`: path[0] is clean and the last is
the noisiest. At every level the dragged latent is compared with the original at that level.

In words:
1. Begin at level len(path) - 1 with its latent, and with the handles of the task. Go down through
   `config.drag_levels` levels, but not to level 0.
2. At each level, `observe = observer(denoiser, level, task, config)` is the function that shows a latent's
   features, and `supervise = supervisor(task, config)` the loss.
3. `origin` = Origin(the handles of the task, observe(the original at this level)), under torch.no_grad().
4. Drag: `drag(latent, handles, task.targets, observe, supervise, config, origin)` is a generator of Steps
   that returns the last one. `last = yield from drag(...)` yields each and keeps the last.
5. The next level begins with `last.previous`, the latent one DDIM step down, and with `last.handles`.
6. Give up after the third level in a row in which no handle moved, not counting levels after which
   `all_arrived(last.handles, task.targets, config.tolerance)`: there `drag` holds what has arrived.

All of these are in minidrag.method.drag, but `observer` and `supervisor`, which are in
minidrag.method.dragdiffusion.
"""

from collections.abc import Iterator

from torch import Tensor

from minidrag.config import EditConfig
from minidrag.method.ddim import Denoiser
from minidrag.method.drag import Step
from minidrag.method.dragdiffusion import Task


def gooddrag(denoiser: Denoiser, path: list[Tensor], task: Task, config: EditConfig) -> Iterator[Step]:
    """Drag at the last `config.drag_levels` levels of the inversion, from the noisiest down.

    path: latents (1, 4, H, W) by level, the clean one first. Yields the steps of all levels.
    """
    raise NotImplementedError
