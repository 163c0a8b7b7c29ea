"""Classifier-free guidance (arXiv 2207.12598), for images sampled from noise."""

import torch
from torch import Tensor

from minidrag.method.ddim import NoisePredictor
from minidrag.networks.unet import KeysValues


def guided(unet: NoisePredictor, negative: Tensor, guidance: float) -> NoisePredictor:
    """A UNet that predicts eps(negative) + guidance (eps(text) - eps(negative)), called like the UNet.

    negative: (B, 77, C), the encoded negative prompt or "". Features, keys, and values have batch 2 B.
    """

    def predict(latent: Tensor, timestep: int | Tensor, text: Tensor, keys_values: KeysValues | None = None):
        doubled = torch.cat([latent, latent])  # (B, C, H, W) -> (2 B, C, H, W)
        noise, features, used = unet(doubled, timestep, torch.cat([negative, text]), keys_values)
        without, with_text = noise.chunk(2)  # (2 B, C, H, W) -> twice (B, C, H, W)
        return without + guidance * (with_text - without), features, used

    return predict
