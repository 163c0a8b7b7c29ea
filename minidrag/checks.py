"""What cannot be edited, said in a sentence before any work begins."""

from collections.abc import Sequence

from torch import Tensor

from minidrag.config import EditConfig
from minidrag.images import Point
from minidrag.weights.model import Model

LONGEST = 8  # times its shorter side: a longer picture would take very much memory


def check(
    model: Model,
    size: tuple[int, int],
    handles: Sequence[Point],
    targets: Sequence[Point],
    mask: Tensor | None,
    config: EditConfig,
) -> None:
    """Raises ValueError, saying what to do, for what cannot be edited."""
    check_points(size, handles, targets, mask)
    model.schedule.pairs(min(config.steps, model.schedule.num_train_timesteps))
    unet = model.unet.config
    if model.prediction != "epsilon" or unet.in_channels != 4 or unet.use_linear_projection:
        raise ValueError(f"{model.source} is no Stable Diffusion 1.x model: give one, or a fine-tuned one")


def check_points(
    size: tuple[int, int], handles: Sequence[Point], targets: Sequence[Point], mask: Tensor | None
) -> None:
    """The part of `check` that needs no model, about a picture of `size` (width, height)."""
    width, height = size
    if max(size) > LONGEST * min(size):
        raise ValueError(f"the picture is {width}x{height} pixels, which is too long a strip: crop it")
    if len(handles) != len(targets) or not handles:
        raise ValueError(f"{len(handles)} handles and {len(targets)} targets: give at least one pair")
    for name, points in (("handle", handles), ("target", targets)):
        for x, y in points:
            if not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5):
                raise ValueError(
                    f"the {name} {x:g},{y:g} lies outside the picture of {width}x{height} pixels"
                )
    if mask is None:
        return
    if mask.shape != (height, width):
        raise ValueError(f"the mask is {mask.shape[1]}x{mask.shape[0]} pixels, the picture {width}x{height}")
    for x, y in handles:
        if mask[min(round(y), height - 1), min(round(x), width - 1)] < 0.5:
            raise ValueError(f"the handle {x:g},{y:g} lies outside the mask: mark what it shall move as well")
