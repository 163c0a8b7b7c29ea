"""DragDiffusion (arXiv 2306.14435) from image to image; `drag_edit` reads like the paper's Figure 3."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from minidrag.config import EditConfig
from minidrag.detail import carry_detail
from minidrag.method.ddim import Denoiser, denoise, guided, invert
from minidrag.method.drag import Step, all_arrived
from minidrag.method.dragdiffusion import Method, Task, dragdiffusion
from minidrag.method.gooddrag import gooddrag
from minidrag.method.lora import LoRA, Moments, extract, initialize, lora_attached, train
from minidrag.method.progress import Progress
from minidrag.model import Model, decode, encode, only_unet_on_device, working_size
from minidrag.points import Pixel, check_instruction, to_pixels, to_task
from minidrag.window import Window, choose_window


def drag_edit(
    model: Model,
    image: Image.Image,
    handles: Sequence[tuple[float, float]],
    targets: Sequence[tuple[float, float]],
    *,
    mask: Tensor | None = None,
    prompt: str = "",
    config: EditConfig = EditConfig(),
    seed: int = 0,
    lora: LoRA | None = None,
    clean: Tensor | None = None,
    window: Window | None = None,
    progress: Progress | None = None,
) -> "Edit":
    """Drag the content under each handle point to its target point and keep the rest (section 3).

    image: RGB. handles, targets: (x, y) in its pixels. mask: (height, width), bool, True in the editable
    region; None: everything. prompt: describes the image. window: the part to edit; None chooses it, the
    whole image if `clean` is given. lora: of the window's image; None trains one. clean: the window's latent,
    from `encode` or `generate`; None encodes it.
    Raises ValueError for input that cannot be edited, FloatingPointError for numbers out of range. Leaves the
    model as it was.
    """
    progress = progress or Progress()
    instruction = [Pixel(*handle) for handle in handles], [Pixel(*target) for target in targets]
    if clean is not None and window is None:
        window = Window(0, 0, *image.size)
    window, task = prepare(model, image.size, *instruction, mask, config, window)
    original = window.crop(image)
    if lora is None or clean is None:
        moments = encode(model, original, config)
        lora = lora or train_lora(model, moments, prompt, config, seed, progress)
        clean = moments[0] if clean is None else clean
    with lora_attached(model.unet, model.text_encoder, lora):
        denoiser = Denoiser(model.unet, model.schedule, model.encode_text(prompt), config.steps)
        with only_unet_on_device(model, config.checkpointing):
            inversion = invert(denoiser, clean, config.levels)
            path = [clean, *progress("inversion", inversion, config.levels)]
            dragging = method_of(config)(denoiser, path, task, config.scaled(task.grid))
            steps = list(progress("drag", dragging, config.most_updates))
            last = steps[-1]
            denoising = denoise(denoiser, [path[last.level], last.latent], last.level, config)
            *_, latents = progress("denoising", denoising, last.level)
    reconstruction, raw = (decode(model, latent) for latent in latents)
    points = map(window.enter, instruction)
    edited = carry_detail(original, reconstruction, raw, *points) if config.detail else raw
    final = window.paste(edited, image, mask if config.keep_background else None)
    raw, reconstruction = (window.insert(part, image) for part in (raw, reconstruction))
    return Edit(final, raw, reconstruction, *instruction, window, task, config, path, steps, lora)


def prepare(
    model: Model,
    size: tuple[int, int],
    handles: Sequence[Pixel],
    targets: Sequence[Pixel],
    mask: Tensor | None,
    config: EditConfig,
    window: Window | None = None,
) -> tuple[Window, Task]:
    """Check all that can be checked before a network runs; return the window and the drag on its grid.

    window: the part to edit; None chooses it. Raises ValueError, one sentence, for an instruction, settings,
    or a model that cannot be used.
    """
    check_instruction(size, handles, targets, mask)
    check_model(model)
    model.schedule.check_steps(config.steps)
    if window is None:
        short = min(working_size(model, size, config))
        window = choose_window(size, handles, targets, mask, short, config)
    points = window.enter(handles), window.enter(targets)
    part = None if mask is None else window.crop_mask(mask)
    working = working_size(model, window.size, config)
    task = to_task(*points, part, window.size, working, model.vae.config.factor)
    if task.mask is None:
        return window, task
    dtype = torch.promote_types(model.dtype, torch.float32)
    return window, task._replace(mask=task.mask.to(model.device, dtype))


def check_model(model: Model) -> None:
    """Raise ValueError for a model that is not Stable Diffusion 1.x."""
    unet = model.unet.config
    if model.prediction == "epsilon" and unet.in_channels == 4 and not unet.use_linear_projection:
        return
    wanted = "" if model.prediction == "epsilon" else f" that predicts the noise, not {model.prediction}"
    raise ValueError(f"{model.source} is not a Stable Diffusion 1.x model: use one or a fine-tune{wanted}")


def method_of(config: EditConfig) -> Method:
    """The paper's method for one level without a warp, else the one that alternates with denoising."""
    return gooddrag if config.warp_start or config.drag_levels > 1 else dragdiffusion


@dataclass(frozen=True, repr=False)
class Edit:
    """Result of a drag; points are in pixels of the original."""

    image: Image.Image  # the edit, with the original's background if config.keep_background
    raw: Image.Image  # the original, and in the window the edit as decoded
    reconstruction: Image.Image  # likewise, inverted and denoised without a drag
    handles: list[Pixel]
    targets: list[Pixel]
    window: Window  # the part of the original that is edited; task, path, and steps are of it
    task: Task
    config: EditConfig
    path: list[Tensor]  # latents of the inversion by level, the clean one first
    steps: list[Step]  # of the drag
    lora: LoRA

    def __repr__(self) -> str:
        width, height = self.image.size
        outcome = "arrived" if self.arrived else "not arrived"
        return f"<Edit of {width}x{height} pixels: {len(self.losses)} updates, {outcome}>"

    @property
    def paths(self) -> list[list[Pixel]]:
        """Path of each handle: before the first update and after each."""
        size, grid = self.window.size, self.task.grid
        moments = [self.window.leave(to_pixels(step.handles, size, grid)) for step in self.steps]
        return [list(path) for path in zip(*moments, strict=True)]

    @property
    def distances(self) -> list[float]:
        """From each handle to its target before the drag."""
        return [math.dist(*pair) for pair in zip(self.handles, self.targets, strict=True)]

    @property
    def remaining(self) -> list[float]:
        """From each handle to its target after the drag."""
        return [math.dist(path[-1], target) for path, target in zip(self.paths, self.targets, strict=True)]

    @property
    def arrived(self) -> bool:
        """True if every handle came within the tolerance of its target."""
        return all_arrived(self.steps[-1].handles, self.task.targets, self.config.tolerance)

    @property
    def losses(self) -> list[float]:
        """Loss of each update."""
        return [step.loss for step in self.steps if step.loss is not None]


def train_lora(
    model: Model,
    moments: Moments,
    prompt: str = "",
    config: EditConfig = EditConfig(),
    seed: int = 0,
    progress: Progress | None = None,
) -> LoRA:
    """Train a LoRA on one image, so that the UNet knows it (section 3.2). Leaves the model as it was.

    moments: of the image, from `encode`. Returns an empty LoRA for no steps.
    """
    if config.lora_steps == 0:
        return LoRA({}, {})
    progress = progress or Progress()
    text = model.encode_text(prompt)
    generator = torch.Generator().manual_seed(seed)
    untrained = initialize(model.unet, config.lora_rank, config.lora_targets, generator)
    attached = lora_attached(model.unet, model.text_encoder, untrained)
    with attached, only_unet_on_device(model, config.checkpointing):
        training = train(model.unet, model.schedule, moments, text, config, generator)
        list(progress("LoRA", training, config.lora_steps))
        return extract(model.unet)


def generate(
    model: Model,
    prompt: str,
    negative: str = "",
    guidance: float = 7.5,
    seed: int = 0,
    config: EditConfig = EditConfig(),
    progress: Progress | None = None,
) -> tuple[Image.Image, Tensor]:
    """Sample an image from noise with classifier-free guidance; return it and its latent for `drag_edit`.

    negative: what it must not show. guidance: 1 is none. The image is square, of `config.size`.
    """
    progress = progress or Progress()
    side = (config.size or model.unet.config.sample_size * model.vae.config.factor) // model.vae.config.factor
    noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(seed)).to(model.device)
    unet = guided(model.unet, model.encode_text(negative), guidance)
    denoiser = Denoiser(unet, model.schedule, model.encode_text(prompt), config.steps)
    sampling = denoise(denoiser, [noise], config.steps, config)
    *_, (clean,) = progress("sampling", sampling, config.steps)
    return decode(model, clean), clean
