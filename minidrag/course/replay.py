"""Parts of a finished edit that nobody kept, computed once more for its report.

An edit keeps its latents and the paths of its handles. Features, losses of single handles, tracking maps, and
what the edit would be without one of its parts are made here, in about 100 calls of the UNet.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import mse_loss

from minidrag.bench.features import to_colors
from minidrag.config import EditConfig
from minidrag.edit import Edit
from minidrag.method.ddim import denoise
from minidrag.method.drag import Cell, Origin, Step, View, background_loss, motion_loss, snap
from minidrag.method.dragdiffusion import observe
from minidrag.method.lora import lora_attached
from minidrag.method.warp import object_cells, warp
from minidrag.model import Model, decode

FRAMES = 12  # states of the drag that are looked at again, at most
SAMPLE_STEPS = 10  # DDIM steps of a sample from noise
TIMES = (1, 121, 241, 361, 481, 601, 721, 841)  # timesteps at which the noise loss is taken
LEVELS = 6  # latents of the inversion that are shown


class Moment(NamedTuple):
    """A state of the drag, looked at again."""

    index: int  # of the step
    step: Step
    image: Image.Image  # as foreseen
    maps: list[Tensor]  # distance of each cell from each handle's original feature, (R, S)
    losses: list[float]  # motion supervision of each handle, as an update would see it
    background: float  # lambda times the change outside the mask


@dataclass(frozen=True)
class Replay:
    """All that a report shows beside the edit itself."""

    samples: list[Image.Image]  # from the same noise, without the LoRA and with it
    noise_losses: list[list[float]]  # at TIMES, without the LoRA and with it
    levels: list[tuple[str, Image.Image]]  # names and latents of the inversion, decoded
    colors: list[
        list[Image.Image]
    ]  # of the four up blocks, of the original and of the edit at its last level
    moments: list[Moment]
    object_cells: Tensor  # cells of the latent that belong to the first handle's object, (H, W)
    moved: bool  # the warp moved them
    uncontrolled: Image.Image  # the edit without reference keys and values
    attention: Tensor  # of the first target's query to the original, (H, W) of the latent
    query: Cell  # cell of the latent that asks


@torch.no_grad()
def replay(model: Model, edit: Edit, prompt: str) -> Replay:
    """Compute everything. Leaves the model as it was."""
    plain = model.encode_text(prompt)
    noise = normal(edit.path[0], 0)
    clean = edit.path[0]
    without = sample(model, noise, plain, SAMPLE_STEPS), noise_losses(model, clean, plain, TIMES, 1)
    with lora_attached(model.unet, model.text_encoder, edit.lora):
        text = model.encode_text(prompt)
        adapted = sample(model, noise, text, SAMPLE_STEPS), noise_losses(model, clean, text, TIMES, 1)
        moments = [*look_again(model, edit, text)]
        cells, moved = warped(model, edit, text)
        query, attended = attention(model, edit, text)
        return Replay(
            [without[0], adapted[0]],
            [without[1], adapted[1]],
            [
                (level_name(model, edit, i), decode(model, edit.path[i]))
                for i in spread(len(edit.path), LEVELS)
            ],
            block_colors(model, edit, text),
            moments,
            cells,
            moved,
            uncontrolled(model, edit, text),
            attended,
            query,
        )


def spread(count: int, most: int) -> list[int]:
    """At most so many whole numbers from 0 to count - 1, evenly, both ends among them."""
    return sorted({round(i * (count - 1) / max(most - 1, 1)) for i in range(most)})


def level_name(model: Model, edit: Edit, level: int) -> str:
    time = f"t = {model.schedule.pairs(edit.config.steps, level)[0][0]}" if level else "clean"
    return f"level {level}, {time}"


def normal(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)


@torch.no_grad()
def sample(model: Model, noise: Tensor, text: Tensor, steps: int) -> Image.Image:
    """Image from pure noise, without guidance."""
    config = EditConfig(steps=steps, inversion_steps=steps)
    *_, (latent,) = denoise(model.unet, model.schedule, [noise], text, steps, config)
    return decode(model, latent)


@torch.no_grad()
def noise_losses(model: Model, clean: Tensor, text: Tensor, times: Sequence[int], seed: int) -> list[float]:
    """Equation 2 at single timesteps, with the same noise for all."""
    noise, found = normal(clean, seed), []
    for time in times:
        noisy = model.schedule.add_noise(clean, noise, torch.tensor([time]))
        found.append(mse_loss(model.unet(noisy, time, text).noise.to(noise), noise).item())
    return found


def seen(model: Model, edit: Edit, text: Tensor, level: int, latent: Tensor) -> View:
    return observe(model.unet, model.schedule, text, edit.task.grid, edit.config, level, latent)


def origin_of(model: Model, edit: Edit, text: Tensor, level: int) -> Origin:
    """The original at a level, as the drag compared with it."""
    return Origin(edit.task.handles, seen(model, edit, text, level, edit.path[level]))


def look_again(model: Model, edit: Edit, text: Tensor) -> Iterator[Moment]:
    """States spread over the drag. Only one level's features of the original are held at a time."""
    origin = None
    start = range(min(2, len(edit.steps)))  # before and after a warp
    for index in sorted({*start, *spread(len(edit.steps), FRAMES)}):
        step = edit.steps[index]
        if origin is None or origin.view.level != step.level:
            origin = origin_of(model, edit, text, step.level)
        view = seen(model, edit, text, step.level, step.latent)
        maps = [distance_map(view.features, origin, handle) for handle in edit.task.handles]
        losses, background = loss_parts(edit, view, step, origin)
        yield Moment(index, step, decode(model, step.predicted), maps, losses, background)


def distance_map(features: Tensor, origin: Origin, handle: Cell) -> Tensor:
    """|| F_q(z) - F_{h^0} ||_1 for every cell q, which equation 5 takes the least of: (R, S)."""
    row, column = handle
    reference = origin.view.features[:, int(row), int(column)]
    return torch.stack([(rows - reference[:, None]).abs().sum(0) for rows in features.unbind(1)])


def loss_parts(edit: Edit, view: View, step: Step, origin: Origin) -> tuple[list[float], float]:
    """Both terms of equation 3 at a state, the first by handle."""
    task, config = edit.task, edit.config.scaled(edit.task.grid)
    held = config.motion_reference == "start"
    losses = []
    for at, target, start in zip(step.handles, task.targets, task.handles, strict=True):
        reference = Origin([start], origin.view) if held else None
        losses.append(motion_loss(view.features, [at], [target], config, reference).item())
    if task.mask is None:
        return losses, 0.0
    change = background_loss(view.previous, origin.view.previous, task.mask)
    return losses, config.mask_weight * change.item()


def block_colors(model: Model, edit: Edit, text: Tensor) -> list[list[Image.Image]]:
    """Principal components of each block as colors, of the original and of the edit, at the last level."""
    last = edit.steps[-1]
    time, _ = model.schedule.pairs(edit.config.steps, last.level)[0]
    pair = [model.unet(latent, time, text).features for latent in (edit.path[last.level], last.latent)]
    blocks = zip(*pair, strict=True)
    colors = [to_colors([features[0].cpu().double() for features in block]) for block in blocks]
    return [list(some) for some in zip(*colors, strict=True)]


def warped(model: Model, edit: Edit, text: Tensor) -> tuple[Tensor, bool]:
    """Cells of the first handle's object in the latent, (H, W), and whether a warped start moved them."""
    top = edit.path[-1]
    features = origin_of(model, edit, text, len(edit.path) - 1).view.features
    editable = torch.ones(top.shape[2:], device=top.device) if edit.task.mask is None else edit.task.mask
    cells = object_cells(features, edit.task.handles[0], editable)
    handles = warp(top, edit.task, features)[1] if edit.config.warp_start else edit.task.handles
    return cells, handles[0] != edit.task.handles[0]


def uncontrolled(model: Model, edit: Edit, text: Tensor) -> Image.Image:
    """The edit, denoised with keys and values of its own."""
    last = edit.steps[-1]
    *_, (latent,) = denoise(model.unet, model.schedule, [last.latent], text, last.level, edit.config)
    return decode(model, latent)


def attention(model: Model, edit: Edit, text: Tensor) -> tuple[Cell, Tensor]:
    """Weights with which one query of the edit reads the original's values, in the last self-attention.

    The query is the latent's cell under the first target, in the first denoising step after the drag. Returns
    it and the weights, the mean over heads, (H, W).
    """
    last, unet = edit.steps[-1], model.unet
    time, _ = model.schedule.pairs(edit.config.steps, last.level)[0]
    given = unet(edit.path[last.level], time, text).keys_values[4 - max(edit.config.control_blocks, 1) :]
    number = len(given[-1]) - 1
    layer: Any = unet.get_submodule(f"up_blocks.3.attentions.{number}.transformer_blocks.0.attn1")
    with outputs_of(layer.to_q) as queries:
        unet(last.latent, time, text, given)
    height, width = last.latent.shape[2:]
    down, right = (size / cells for size, cells in zip((height, width), edit.task.grid, strict=True))
    row, column = edit.task.targets[0]
    query = snap(Cell((row + 0.5) * down - 0.5, (column + 0.5) * right - 0.5), (height, width))
    asked = queries[0][0, int(query.row) * width + int(query.column)].unflatten(0, (layer.heads, -1)).float()
    keys = given[-1][number][0][0].unflatten(1, (layer.heads, -1)).float()  # (N, C) -> (N, heads, d)
    scores = torch.einsum("hd,nhd->hn", asked, keys) / math.sqrt(asked.shape[1])
    return query, scores.softmax(dim=1).mean(dim=0).unflatten(0, (height, width)).cpu()


@contextmanager
def outputs_of(layer: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Collect what a layer returns: the UNet hands out keys and values, but no queries."""
    found: list[Tensor] = []

    def collect(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(output)

    hook = layer.register_forward_hook(collect)
    try:
        yield found
    finally:
        hook.remove()


def changes(edit: Edit) -> tuple[list[float], list[float], Tensor]:
    """Mean change of the latent at each state, inside the mask and outside, and the last one's map, (H, W).

    Each is against the original at the same level.
    """
    inside, outside = [], []
    change = torch.zeros(edit.path[0].shape[2:])
    for step in edit.steps:
        change = (step.latent - edit.path[step.level]).abs().mean(dim=1)[0]
        mask = torch.ones_like(change) if edit.task.mask is None else edit.task.mask.to(change)
        inside.append(float((change * mask).sum() / mask.sum()))
        outside.append(float((change * (1 - mask)).sum() / (1 - mask).sum().clamp(min=1)))
    return inside, outside, change.cpu()


def window(handle: Cell, radius: int, grid: Sequence[int]) -> tuple[Cell, Cell]:
    """First and last cell of Omega(h, r) on a grid."""
    low = [max(int(at) - radius, 0) for at in handle]
    high = [min(int(at) + radius, size - 1) for at, size in zip(handle, grid, strict=True)]
    return Cell(*low), Cell(*high)
