"""DragDiffusion (arXiv 2306.14435) from image to image; `drag_edit` reads like the paper's Figure 3."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from minidrag import images
from minidrag.config import EditConfig
from minidrag.method.ddim import denoise, invert
from minidrag.method.drag import Step, all_arrived
from minidrag.method.dragdiffusion import Task, dragdiffusion
from minidrag.method.gooddrag import gooddrag
from minidrag.method.lora import LoRA, extract, initialize, lora_attached, train
from minidrag.method.progress import Progress
from minidrag.method.sampling import guided
from minidrag.model import Model, decode, encode, only_unet_on_device
from minidrag.points import Pixel, to_pixels, to_task
from minidrag.weights.lora_file import check_fit


def drag_edit(
    model: Model,
    image: Image.Image,
    handles: Sequence[tuple[float, float]],
    targets: Sequence[tuple[float, float]],
    *,
    mask: Tensor | None = None,
    prompt: str = "",
    config: EditConfig = EditConfig(),  # noqa: B008, it is frozen
    seed: int = 0,
    lora: LoRA | None = None,
    clean: Tensor | None = None,
    progress: Progress | None = None,
) -> "Edit":
    """Drag the content under each handle point to its target point and keep the rest (section 3).

    image: RGB. handles, targets: (x, y) in its pixels. mask: (height, width), 1 in the editable region;
    None: all of it. prompt: describes the image. lora: from `train_lora`, which is called if None.
    clean: latent of a generated image, from `generate`; None: the image is encoded.
    Raises ValueError for input that cannot be edited, FloatingPointError for numbers out of range. Leaves the
    model as it was.
    """
    progress = progress or Progress()
    handles, targets = ([Pixel(*point) for point in points] for points in (handles, targets))
    task = to_task(model, image.size, handles, targets, mask, config)
    lora = lora or train_lora(model, image, prompt, config, seed, progress)
    unet, schedule = model.unet, model.schedule
    method = gooddrag if config.warp_start or config.drag_levels > 1 else dragdiffusion
    check_fit(lora, unet, model.text_encoder)
    if clean is None:
        clean, _ = encode(model, image, config)
    with lora_attached(unet, model.text_encoder, lora):
        text = model.encode_text(prompt)
        with only_unet_on_device(model, config.checkpointing):
            inversion = invert(unet, schedule, clean, text, config)
            path = [clean, *progress("inversion", inversion, config.inversion_steps)]
            drag = method(unet, schedule, path, text, task, config.scaled(task.grid))
            most = config.drag_levels * (config.drag_steps + 1) + config.warp_start
            steps = list(progress("drag", drag, most))
            latent, level = steps[-1].latent, steps[-1].level
            denoising = denoise(unet, schedule, [path[level], latent], text, level, config)
            *_, (original, latent) = progress("denoising", denoising, level)
    reconstruction, raw = (images.resize(decode(model, z), image.size) for z in (original, latent))
    edited = raw if mask is None or not config.keep_background else images.paste(raw, image, mask)
    return Edit(edited, raw, reconstruction, handles, targets, task, config, path, steps, lora)


@dataclass(frozen=True)
class Edit:
    """Result of a drag; points are pixels of the image given."""

    image: Image.Image  # the edit, with the original's background if config.keep_background
    raw: Image.Image  # the edit as decoded
    reconstruction: Image.Image  # the original, inverted and denoised without a drag
    handles: list[Pixel]
    targets: list[Pixel]
    task: Task
    config: EditConfig
    path: list[Tensor]  # latents of the inversion by level, the clean one first
    steps: list[Step]  # of the drag
    lora: LoRA

    @property
    def paths(self) -> list[list[Pixel]]:
        """Path of each handle: before the first update and after each."""
        moments = [to_pixels(step.handles, self.image.size, self.task.grid) for step in self.steps]
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
    image: Image.Image,
    prompt: str = "",
    config: EditConfig = EditConfig(),  # noqa: B008, it is frozen
    seed: int = 0,
    progress: Progress | None = None,
) -> LoRA:
    """Train a LoRA on one image, so that the UNet knows it (section 3.2). Leaves the model as it was.

    Returns an empty LoRA for no steps.
    """
    if config.lora_steps == 0:
        return LoRA({}, {})
    progress = progress or Progress()
    moments, text = encode(model, image, config), model.encode_text(prompt)
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
    config: EditConfig = EditConfig(),  # noqa: B008, it is frozen
    progress: Progress | None = None,
) -> tuple[Image.Image, Tensor]:
    """Sample an image from noise with classifier-free guidance; return it and its latent for `drag_edit`.

    negative: what it must not show. guidance: 1 is none. The image is square, of `config.size`.
    """
    progress = progress or Progress()
    side = (config.size or model.unet.config.sample_size * model.vae.config.factor) // model.vae.config.factor
    noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(seed)).to(model.device)
    unet, text = guided(model.unet, model.encode_text(negative), guidance), model.encode_text(prompt)
    sampling = denoise(unet, model.schedule, [noise], text, config.steps, config)
    *_, (clean,) = progress("sampling", sampling, config.steps)
    return decode(model, clean), clean
