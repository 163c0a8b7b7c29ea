"""The networks of diffusers and transformers, built from minidrag's configurations."""

from collections.abc import Callable
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from minidrag.weights.configs import text_encoder_json, unet_json, vae_json

BUILDERS: dict[str, Callable[[Any], Any]] = {
    "unet": lambda config: UNet2DConditionModel.from_config(unet_json(config)),
    "vae": lambda config: AutoencoderKL.from_config(vae_json(config, 512)),
    "text_encoder": lambda config: CLIPTextModel(CLIPTextConfig.from_dict(text_encoder_json(config))),
}
