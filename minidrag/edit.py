"""DragDiffusion (arXiv 2306.14435) from picture to picture; `drag_edit` reads like the paper's figure 3."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageChops, ImageFilter
from torch import Tensor

from minidrag import images, lora
from minidrag.ddim import denoise, invert
from minidrag.drag import DragConfig, Point, optimise
from minidrag.lora import LoRA
from minidrag.unet import UNet
from minidrag.weights import Model

OnStage = Callable[[str, int, int], None]  # called with a stage's name, its steps done, and all its steps

LONGEST = 8  # times its shorter side: a longer picture would take very much memory
MOST = 1_000_000  # that a field of EditConfig may be; no sensible value comes near
LEAST = {  # that it may be
    "steps": 1,
    "drag_steps": 0,
    "drag_rate": 0,
    "motion_radius": 0,
    "track_radius": 0,
    "mask_weight": 0,
    "tolerance": 0,
    "lora_rank": 1,
    "lora_steps": 0,
    "lora_batch": 1,
    "lora_rate": 0,
    "control_from": 0,
    "size": 8,
}


@dataclass(frozen=True)
class EditConfig(DragConfig):
    """All constants of an edit; the defaults are the paper's."""

    lora_rank: int = 16  # (section 4)
    lora_targets: str = (
        "qk"  # projections of all attention modules; the paper's text adds v, its code v and o
    )
    lora_steps: int = 80  # (section 4)
    lora_batch: int = 4  # (section 4)
    lora_rate: float = 5e-4  # AdamW's (section 4)
    control_from: int = 0  # denoising step from which on the original's keys and values are read (code)
    size: int | None = (
        None  # shorter side that the model works at; None: what it was trained on, 512 for SD 1.5
    )
    keep_outside: bool = True  # the original's own pixels outside the mask; not part of the paper
    checkpointing: bool = False  # less memory for more time; not part of the paper

    @classmethod
    def official(cls) -> "EditConfig":
        """What the authors' program does where that is not what the paper says."""
        return cls(
            lora_targets="qkvo",  # value and output projections as well
            motion_loss="mean",  # hundreds of times smaller than eq. 3, so the mask weighs far more
            keep_outside=False,  # shows what comes out of the decoder
        )


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
    unet, schedule, taken = model.unet, model.schedule, config.edited_step
    clean, _ = encode(model, picture, config)
    rows, columns = clean.shape[2:]
    grid = rows * model.vae.config.factor // 2, columns * model.vae.config.factor // 2
    starts = [snap(point, grid) for point in images.to_grid(handles, picture.size, grid)]
    ends = images.to_grid(targets, picture.size, grid)
    cells = None if mask is None else images.mask_to_grid(mask.float(), (rows, columns)).to(clean)
    with wearing(model, trained, config):
        text = model.encode_text(prompt)
        with set_aside(model):
            with stage("inversion", taken, seconds, on_stage) as on_step:
                path = invert(unet, schedule, clean, text, config.steps, taken, on_step)
            with stage("drag", config.drag_steps, seconds, on_stage) as on_step:
                drag = optimise(unet, schedule, path[-1], text, starts, ends, cells, grid, config, on_step)
            with stage("denoising", taken, seconds, on_stage) as on_step:
                pair, control = [path[-1], drag.latent], config.control_from
                pair = denoise(unet, schedule, pair, text, config.steps, taken, control, on_step)
    reconstruction, raw = (images.resize(decode(model, latent), picture.size) for latent in pair)
    return Edit(
        picture=paste(raw, picture, mask) if mask is not None and config.keep_outside else raw,
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
    with stage("LoRA", config.lora_steps, {}, on_stage) as on_step, set_aside(model), recomputing:
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
            rate=config.lora_rate,
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


@contextmanager
def wearing(model: Model, trained: LoRA, config: EditConfig) -> Iterator[None]:
    """Within it the model wears the LoRA, and its UNet saves memory if so configured."""
    lora.attach(model.unet, trained, model.text_encoder)
    try:
        with checkpointing(model.unet, config.checkpointing):
            yield
    finally:
        lora.remove(model.unet)
        lora.remove(model.text_encoder)


@contextmanager
def checkpointing(unet: UNet, wanted: bool) -> Iterator[None]:
    """Within it the UNet recomputes its blocks in the backward pass, or does not, whatever it did before."""
    before, unet.checkpointing = unet.checkpointing, wanted
    try:
        yield
    finally:
        unet.checkpointing = before


@contextmanager
def set_aside(model: Model) -> Iterator[None]:
    """Within it only the UNet is on the device: the other networks would fill its memory for nothing."""
    networks, device = (model.vae, model.text_encoder), model.device
    for network in networks:
        network.to("cpu")
    try:
        yield
    finally:
        for network in networks:
            network.to(device)


@contextmanager
def stage(
    name: str, total: int, seconds: dict[str, float], on_stage: OnStage | None
) -> Iterator[Callable[[int, Any], None]]:
    """Times a stage; yields what to call after each step, with the step's number and its latent or loss."""

    def on_step(done: int, value: Tensor | float) -> None:
        must_be_finite(value, name, f" in step {done} of {total}")
        if on_stage:
            on_stage(name, done, total)

    began = time.perf_counter()
    yield on_step
    seconds[name] = time.perf_counter() - began


def must_be_finite(numbers: Tensor | float, name: str, place: str = "") -> None:
    """Raises FloatingPointError, with a stage's name and a place in it, for infinity and not-a-number."""
    if not torch.as_tensor(numbers).isfinite().all():
        raise FloatingPointError(f"{name}: a number is no longer finite{place}")


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
    check_config(config)
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


def check_config(config: EditConfig) -> None:
    """The part of `check` that is about the constants alone."""
    for name, least in LEAST.items():
        value = getattr(config, name)
        if value is not None and not least <= value <= MOST:
            raise ValueError(f"{name} {value} is not possible: choose {least} to {MOST}")
    if not 1 <= config.edited_step <= config.steps:
        raise ValueError(f"edited_step {config.edited_step} is not possible: choose 1 to {config.steps}")
    if not 1 <= config.block <= 4:
        raise ValueError(f"block {config.block} is not possible: choose 1 to 4")
    if config.motion_loss not in ("sum", "mean"):
        raise ValueError(f"motion_loss {config.motion_loss!r} is not known: choose sum or mean")
    if config.lora_targets not in lora.TARGETS:
        known = ", ".join(lora.TARGETS)
        raise ValueError(f"lora_targets {config.lora_targets!r} is not known: choose one of {known}")
