"""DragDiffusion (arXiv 2306.14435) from picture to picture; `drag_edit` reads like the paper's figure 3."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageChops, ImageFilter
from torch import Tensor

from minidrag import images
from minidrag.checks import check
from minidrag.config import EditConfig
from minidrag.method import lora
from minidrag.method.ddim import denoise, invert
from minidrag.method.drag import Point, optimise
from minidrag.method.lora import LoRA
from minidrag.stages import OnStage, checkpointing, must_be_finite, only_unet_on_device, stage, lora_attached
from minidrag.weights.model import Model


@dataclass(frozen=True)
class Edit:
    """An edited picture and how it came about; points are (x, y) in pixels of the picture given.

    picture: the edit, outside the mask with the original's own pixels if so configured. raw: the method's
    output. reconstruction: the original, taken the same way without the drag. paths: each handle at the start
    and after each step. distances, remaining: from handle to target before and after the drag, in pixels.
    reason: "arrived" or "steps". inverted, dragged: (1, 4, H, W) at the edited step. clean: the finished
    latent as foreseen at the moments of the paths. seconds: per stage.
    """

    picture: Image.Image
    raw: Image.Image
    reconstruction: Image.Image
    paths: list[list[Point]]
    distances: list[float]
    remaining: list[float]
    losses: list[float]
    reason: str
    lora: LoRA
    inverted: Tensor
    dragged: Tensor
    clean: list[Tensor]
    seconds: dict[str, float]


def drag_edit(
    model: Model,
    picture: Image.Image,
    handles: Sequence[Point],
    targets: Sequence[Point],
    *,
    mask: Tensor | None = None,
    prompt: str = "",
    config: EditConfig = EditConfig(),  # noqa: B008, it is frozen
    seed: int = 0,
    trained: LoRA | None = None,
    on_stage: OnStage | None = None,
) -> Edit:
    """Moves what lies under each handle to its target and leaves the rest as it is (paper section 3).

    picture: RGB. handles, targets: (x, y) in its pixels. mask: (height, width), 1 where it may change; None:
    everywhere. prompt: what the picture shows. trained: a LoRA from `fit_lora`, which is called if None.
    Raises ValueError for input that makes no sense, FloatingPointError, with stage and step, for numbers that
    left their range. The model is afterwards as it was before.
    """
    check(model, picture.size, handles, targets, mask, config)
    seconds: dict[str, float] = {}
    if trained is None:
        with stage("LoRA", config.lora_steps, seconds, None):
            trained = fit_lora(model, picture, prompt, config, seed, on_stage)
    unet, schedule, taken = model.unet, model.schedule, config.inversion_steps
    clean, _ = encode(model, picture, config)
    rows, columns = clean.shape[2:]
    grid = rows * model.vae.config.factor // 2, columns * model.vae.config.factor // 2
    starts = [snap(point, grid) for point in images.to_grid(handles, picture.size, grid)]
    ends = images.to_grid(targets, picture.size, grid)
    cells = None if mask is None else images.mask_to_grid(mask.float(), (rows, columns)).to(clean)
    with lora_attached(model, trained, config):
        text = model.encode_text(prompt)
        with only_unet_on_device(model):
            with stage("inversion", taken, seconds, on_stage) as on_step:
                path = invert(unet, schedule, clean, text, config.steps, taken, on_step)
            with stage("drag", config.drag_steps, seconds, on_stage) as on_step:
                drag = optimise(unet, schedule, path[-1], text, starts, ends, cells, grid, config, on_step)
            with stage("denoising", taken, seconds, on_stage) as on_step:
                pair, control = [path[-1], drag.latent], (config.control_start, config.control_blocks)
                pair = denoise(unet, schedule, pair, text, config.steps, taken, *control, on_step)
    reconstruction, raw = (images.resize(decode(model, latent), picture.size) for latent in pair)
    return Edit(
        picture=paste(raw, picture, mask) if mask is not None and config.keep_background else raw,
        raw=raw,
        reconstruction=reconstruction,
        paths=[images.to_pixels(path, picture.size, grid) for path in drag.paths],
        distances=[math.dist(handle, target) for handle, target in zip(handles, targets, strict=True)],
        remaining=[
            math.dist(images.to_pixels(path[-1:], picture.size, grid)[0], target)
            for path, target in zip(drag.paths, targets, strict=True)
        ],
        losses=drag.losses,
        reason=drag.reason,
        lora=trained,
        inverted=path[-1],
        dragged=drag.latent,
        clean=drag.clean,
        seconds=seconds,
    )


def fit_lora(
    model: Model,
    picture: Image.Image,
    prompt: str = "",
    config: EditConfig = EditConfig(),  # noqa: B008, it is frozen
    seed: int = 0,
    on_stage: OnStage | None = None,
) -> LoRA:
    """Trains a LoRA on one picture, so that the UNet knows it (paper section 3.2). The model stays as is."""
    mean, std = encode(model, picture, config)
    text = model.encode_text(prompt)
    recomputing = checkpointing(model.unet, config.checkpointing)
    with stage("LoRA", config.lora_steps, {}, on_stage) as on_step, only_unet_on_device(model), recomputing:
        trained = lora.fit(
            model.unet,
            model.schedule,
            mean,
            std,
            text,
            rank=config.lora_rank,
            targets=config.lora_targets,
            steps=config.lora_steps,
            batch=config.lora_batch,
            rate=config.lora_lr,
            seed=seed,
            on_step=on_step,
        )
        lora.remove(model.unet)  # not where training failed: then it has none, or one from before
    return trained


def working_size(model: Model, size: tuple[int, int], config: EditConfig) -> tuple[int, int]:
    """The (width, height) at which the model works on a picture of `size`: multiples of 8 for SD 1.5."""
    factor = model.vae.config.factor
    return images.working_size(*size, config.size or model.unet.config.sample_size * factor, factor)


@torch.no_grad()
def encode(model: Model, picture: Image.Image, config: EditConfig) -> tuple[Tensor, Tensor]:
    """Mean and deviation of a picture's latent, (1, 4, H, W), float32 at least."""
    image = images.to_tensor(images.resize(picture, working_size(model, picture.size, config)))
    mean, std = model.vae.encode(image.to(model.device, model.dtype))
    must_be_finite(mean, "encoding")
    exact = torch.promote_types(model.dtype, torch.float32)
    return mean.to(exact), std.to(exact)


@torch.no_grad()
def decode(model: Model, latent: Tensor) -> Image.Image:
    """The picture, at working size, of a latent (1, 4, H, W)."""
    image = model.vae.decode(latent.to(model.dtype))
    must_be_finite(image, "decoding")
    return images.to_picture(image)


def snap(point: Point, grid: tuple[int, int]) -> Point:
    """The cell of the grid nearest to a point."""
    row, column = (float(min(max(round(at), 0), size - 1)) for at, size in zip(point, grid, strict=True))
    return row, column


def paste(edited: Image.Image, original: Image.Image, mask: Tensor) -> Image.Image:
    """The original with the edit laid into the mask; the seam is soft on the mask's side only.

    edited, original: the same size. mask: (height, width). Outside the mask every pixel is the original's.
    """
    hard = Image.fromarray((mask >= 0.5).cpu().numpy()).convert("L")
    blurred = hard.filter(ImageFilter.GaussianBlur(max(1, min(hard.size) // 128)))
    soft = blurred.point([max(0, 2 * level - 255) for level in range(256)])  # 0 at the edge, 255 well inside
    return Image.composite(edited, original, ImageChops.multiply(soft, hard))
