"""The networks of Stable Diffusion together, and the way from an image to a latent and back."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from minidrag import images
from minidrag.config import EditConfig
from minidrag.method.ddim import Schedule
from minidrag.method.lora import Moments
from minidrag.method.progress import check_finite
from minidrag.networks.clip import CLIPTextEncoder
from minidrag.networks.tokenizer import Tokenizer
from minidrag.networks.unet import UNet
from minidrag.networks.vae import VAE


@dataclass
class Model:
    """Everything that an edit needs of Stable Diffusion; no parameter requires gradients."""

    unet: UNet
    vae: VAE
    text_encoder: CLIPTextEncoder
    tokenizer: Tokenizer
    schedule: Schedule
    source: str  # path or hub id
    prediction: str = "epsilon"  # target of the UNet's training; epsilon is the noise

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @torch.no_grad()
    def encode_text(self, prompts: str | list[str]) -> Tensor:
        """Encode prompts, truncated if need be, to (B, 77, C)."""
        return self.text_encoder(self.tokenizer(prompts).to(self.device))


def working_size(model: Model, size: tuple[int, int], config: EditConfig) -> tuple[int, int]:
    """(width, height) at which the model works on an image of `size`: multiples of 8 for SD 1.5."""
    factor = model.vae.config.factor
    return images.working_size(*size, config.size or model.unet.config.sample_size * factor, factor)


@torch.no_grad()
def encode(model: Model, image: Image.Image, config: EditConfig) -> Moments:
    """Mean and standard deviation of an image's latent, (1, 4, H, W), float32 or wider."""
    resized = images.resize(image, working_size(model, image.size, config))
    moments = model.vae.encode(images.to_tensor(resized).to(model.device, model.dtype))
    mean, std = (x.to(torch.promote_types(model.dtype, torch.float32)) for x in moments)
    check_finite((mean, std), "encoding")
    return mean, std


@torch.no_grad()
def decode(model: Model, latent: Tensor) -> Image.Image:
    """Image, at working size, of a latent (1, 4, H, W)."""
    pixels = model.vae.decode(latent.to(model.dtype))
    check_finite(pixels, "decoding")
    return images.to_image(pixels)


@contextmanager
def only_unet_on_device(model: Model, checkpointing: bool) -> Iterator[None]:
    """Save memory within a context: the other networks wait on the CPU, and the UNet may recompute."""
    others = model.vae, model.text_encoder
    device = model.device
    before = model.unet.checkpointing
    model.unet.checkpointing = checkpointing
    try:
        for network in others:
            network.to("cpu")
        yield
    finally:
        for network in others:
            network.to(device)
        model.unet.checkpointing = before
