"""The one way from options to an edit: prepare it, find or train its LoRA, and drag."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from PIL import Image
from torch import Tensor

from minidrag.app import lora_cache
from minidrag.app.options import Options, open_input
from minidrag.edit import Edit, drag_edit, generate, prepare, train_lora
from minidrag.method.drag import Step
from minidrag.method.lora import LoRA, Moments
from minidrag.method.progress import Progress
from minidrag.model import Model, decode, encode
from minidrag.weights import lora_file
from minidrag.window import Window

Generated = tuple[Image.Image, Tensor]  # an image and its latent


def generate_image(model: Model, options: Options, progress: Progress) -> Generated:
    """Generate the image that options without one describe."""
    guidance = options.negative, options.guidance
    return generate(model, options.prompt, *guidance, options.seed, options.config, progress)


def open_session(
    model: Model, options: Options, progress: Progress, generated: Generated | None = None
) -> "Session":
    """Open the files of the options and prepare their edit. generated: if they name no image."""
    image, latent = generated or (None, None)
    image, mask = open_input(options, image)
    return Session(model, options, image, mask, progress, latent)


@dataclass
class Session:
    """One edit. Raises ValueError, before a network runs, for what cannot be edited."""

    model: Model
    options: Options
    image: Image.Image
    mask: Tensor | None  # (H, W), bool, True in the editable region; None: everything
    progress: Progress = field(default_factory=Progress)
    generated: Tensor | None = None  # latent of a generated image
    lora: LoRA | None = None  # None: the one that the options name, the cache has, or the training makes
    origin: str = ""  # of the LoRA, in words

    def __post_init__(self) -> None:
        options = self.options
        drags = options.handles, options.targets
        window = None if self.generated is None else Window(0, 0, *self.image.size)
        self.window, self.task = prepare(
            self.model, self.image.size, *drags, self.mask, options.config, window
        )
        if self.lora is None and options.lora:
            self.lora = lora_file.read(options.lora, self.model.unet, self.model.text_encoder)
            self.origin = f"read from {options.lora}"

    @cached_property
    def part(self) -> Image.Image:
        """The image in its window."""
        return self.window.crop(self.image)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) at which the model works on the window."""
        rows, columns = self.task.grid
        return 2 * columns, 2 * rows

    @cached_property
    def moments(self) -> Moments:
        """Mean and standard deviation of the window's latent, which is encoded once."""
        return encode(self.model, self.part, self.options.config)

    @property
    def latent(self) -> Tensor:
        return self.moments[0] if self.generated is None else self.generated

    def find_lora(self) -> LoRA:
        """Return the LoRA of the options, or the cached one of the window, or train it."""
        if self.lora is None:
            options = self.options
            key = self.model, self.part, options.prompt, options.config, options.seed
            self.lora, self.origin = lora_cache.find_lora(*key, self.train_lora)
        return self.lora

    def train_lora(self) -> LoRA:
        options = self.options
        return train_lora(
            self.model, self.moments, options.prompt, options.config, options.seed, self.progress
        )

    def edit(self) -> Edit:
        """Drag the image, with its LoRA."""
        return drag_edit(
            self.model,
            self.image,
            self.options.handles,
            self.options.targets,
            mask=self.mask,
            prompt=self.options.prompt,
            config=self.options.config,
            lora=self.find_lora(),
            clean=self.latent,
            window=self.window,
            progress=self.progress,
        )

    def partial_edit(self, steps: Sequence[Step]) -> Edit:
        """The edit that a stopped drag leaves: the image that its last step predicts; no reconstruction."""
        config = self.options.config
        predicted = decode(self.model, steps[-1].predicted)
        raw = self.window.insert(predicted, self.image)
        edited = self.window.paste(predicted, self.image, self.mask if config.keep_background else None)
        drags = self.options.handles, self.options.targets
        states = [], list(steps)
        return Edit(
            edited, raw, self.image, *drags, self.window, self.task, config, *states, self.find_lora()
        )
