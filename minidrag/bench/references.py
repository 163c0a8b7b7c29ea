"""The networks of diffusers and transformers, built from the values of a config.json."""

from collections.abc import Callable
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

BUILDERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "unet": lambda values: UNet2DConditionModel(**values),
    "vae": lambda values: AutoencoderKL(**values),
    "text": lambda values: CLIPTextModel(CLIPTextConfig(**values)),
}
