"""Recompute what an edit does not keep, for its report.

An edit keeps its latents and the paths of its handles. Features, tracking maps, and the edit
without one of its parts take about 100 calls of the UNet.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from minidrag.bench.features import to_colors
from minidrag.bench.harness import lora_loss
from minidrag.config import EditConfig
from minidrag.edit import Edit
from minidrag.method.ddim import Denoiser, denoise
from minidrag.method.drag import Cell, Observe, Origin, Step
from minidrag.method.dragdiffusion import observer
from minidrag.method.lora import LoRA, lora_attached
from minidrag.method.warp import object_cells, warp
from minidrag.model import Model, decode

FRAMES = 12  # states of the drag that are computed again, at most
SAMPLE_STEPS = 10  # DDIM steps of a sample from noise
LEVELS = 6  # latents of the inversion in the report, at most


class Moment(NamedTuple):
    """A state of the drag with its tracking map."""

    index: int  # of the step
    step: Step
    image: Image.Image  # predicted
    distances: Tensor  # of each cell from the first handle's original feature, (R, S)


@dataclass(frozen=True)
class Replay:
    """All that a report needs beside the edit itself."""

    samples: list[Image.Image]  # from the same noise, without the LoRA and with it
    lora_loss: float  # as `harness.lora_loss`
    levels: list[tuple[str, Image.Image]]  # names and latents of the inversion, decoded
    colors: list[list[Image.Image]]  # of the four up blocks, of the original and of the edit's last level
    moments: list[Moment]
    object_cells: Tensor  # cells of the latent that belong to the first handle's object, (H, W)
    moved: bool  # the warp moved them
    uncontrolled: Image.Image  # the edit without reference keys and values


@torch.no_grad()
def replay(model: Model, edit: Edit, prompt: str) -> Replay:
    """Compute everything. Leaves the model as it was."""
    clean = edit.path[0]
    samples = []
    for lora in (LoRA({}, {}), edit.lora):
        with lora_attached(model.unet, model.text_encoder, lora):
            text = model.encode_text(prompt)
            samples.append(sample(model, normal(clean, 0), text, SAMPLE_STEPS))
    loss = lora_loss(model, edit.lora, clean, prompt)
    with lora_attached(model.unet, model.text_encoder, edit.lora):
        denoiser = Denoiser(model.unet, model.schedule, model.encode_text(prompt), edit.config.steps)
        levels = spread(len(edit.path), LEVELS)
        cells, moved = warped(denoiser, edit)
        last = edit.steps[-1]
        *_, (alone,) = denoise(denoiser, [last.latent], last.level, edit.config)
        return Replay(
            samples=samples,
            lora_loss=loss,
            levels=[(level_name(denoiser, i), decode(model, edit.path[i])) for i in levels],
            colors=block_colors(denoiser, edit),
            moments=list(moments(model, denoiser, edit)),
            object_cells=cells,
            moved=moved,
            uncontrolled=decode(model, alone),
        )


def spread(count: int, most: int) -> list[int]:
    """At most `most` whole numbers from 0 to count - 1, evenly, both ends among them."""
    return sorted({round(i * (count - 1) / max(most - 1, 1)) for i in range(most)})


def level_name(denoiser: Denoiser, level: int) -> str:
    time = denoiser.schedule.timestep(level, denoiser.steps)
    return f"level {level}, t = {time}" if level else "level 0, clean"


def normal(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)


@torch.no_grad()
def sample(model: Model, noise: Tensor, text: Tensor, steps: int) -> Image.Image:
    """Image from pure noise, without guidance."""
    denoiser = Denoiser(model.unet, model.schedule, text, steps)
    *_, (latent,) = denoise(denoiser, [noise], steps, EditConfig())
    return decode(model, latent)


def observe_original(denoiser: Denoiser, edit: Edit, level: int) -> tuple[Observe, Origin]:
    """The function that shows latents of a level, and the original at that level."""
    observe = observer(denoiser, level, edit.task, edit.config)
    return observe, Origin(edit.task.handles, observe(edit.path[level]))


def moments(model: Model, denoiser: Denoiser, edit: Edit) -> Iterator[Moment]:
    """States spread over the drag. Only one level's features of the original are in memory at a time."""
    start = range(min(2, len(edit.steps)))  # before and after a warp
    observe, origin = observe_original(denoiser, edit, edit.steps[0].level)
    for index in sorted({*start, *spread(len(edit.steps), FRAMES)}):
        step = edit.steps[index]
        if origin.view.level != step.level:
            observe, origin = observe_original(denoiser, edit, step.level)
        features = observe(step.latent).features
        distances = distance_map(features, origin, edit.task.handles[0])
        yield Moment(index, step, decode(model, step.predicted), distances)


def distance_map(features: Tensor, origin: Origin, handle: Cell) -> Tensor:
    """|| F_q(z) - F_{h^0} ||_1 for every cell q, which equation 5 takes the least of: (R, S)."""
    row, column = handle
    reference = origin.view.features[:, int(row), int(column)]
    return torch.stack([(rows - reference[:, None]).abs().sum(0) for rows in features.unbind(1)])


def block_colors(denoiser: Denoiser, edit: Edit) -> list[list[Image.Image]]:
    """Principal components of each block as colors, of the original and of the edit, at the last level."""
    last = edit.steps[-1]
    pair = [denoiser(latent, last.level)[1] for latent in (edit.path[last.level], last.latent)]
    blocks = zip(*pair, strict=True)
    colors = [to_colors([features[0].cpu().double() for features in block]) for block in blocks]
    return [list(some) for some in zip(*colors, strict=True)]


def warped(denoiser: Denoiser, edit: Edit) -> tuple[Tensor, bool]:
    """Cells of the first handle's object in the latent, (H, W), and whether a warped start moved them."""
    top = edit.path[-1]
    _, origin = observe_original(denoiser, edit, len(edit.path) - 1)
    features = origin.view.features
    editable = torch.ones(top.shape[2:], device=top.device) if edit.task.mask is None else edit.task.mask
    cells = object_cells(features, edit.task.handles[0], editable)
    handles = warp(top, edit.task, features)[1] if edit.config.warp_start else edit.task.handles
    return cells, handles[0] != edit.task.handles[0]


def window(handle: Cell, radius: int, grid: Sequence[int]) -> tuple[Cell, Cell]:
    """First and last cell of Omega(h, r) on a grid."""
    low = [max(int(at) - radius, 0) for at in handle]
    high = [min(int(at) + radius, size - 1) for at, size in zip(handle, grid, strict=True)]
    return Cell(*low), Cell(*high)
