"""Stable Diffusion's autoencoder: images to latents of an eighth of their size, and back.

Attribute names are those of the official `vae/diffusion_pytorch_model.safetensors`, newer spelling (`to_q`).
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from minidrag.networks.layers import Attention, Downsample, ResnetBlock, Upsample

EPS = 1e-6  # of every GroupNorm in this network; the UNet's ResNet blocks have 1e-5


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the autoencoder; the defaults are Stable Diffusion 1.5."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)  # per level, finest first
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215  # brings latents to about unit variance

    @property
    def factor(self) -> int:
        """Image pixels per latent position along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


class VAEAttention(Attention):
    """Single-head self-attention over the positions of a feature map; residual."""

    def __init__(self, channels: int, groups: int):
        super().__init__(channels, channels, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = self.group_norm(hidden).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, H W, C)
        mixed, _ = super().forward(tokens, tokens)
        return hidden + mixed.transpose(1, 2).unflatten(2, hidden.shape[2:])  # (B, H W, C) -> (B, C, H, W)


class Level(nn.Module):
    """ResNet blocks at one resolution, then at most one change of resolution."""

    def __init__(self, channels: int, out_channels: int, layers: int, groups: int):
        super().__init__()
        inputs = [channels] + [out_channels] * (layers - 1)
        self.resnets = nn.ModuleList(ResnetBlock(width, out_channels, groups, EPS, None) for width in inputs)
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()

    def forward(self, hidden: Tensor) -> Tensor:
        for block in (*self.resnets, *self.downsamplers, *self.upsamplers):
            hidden = block(hidden)
        return hidden


class MidBlock(nn.Module):
    """ResNet block, attention, ResNet block on the coarsest level."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups, EPS, None) for _ in range(2))
        self.attentions = nn.ModuleList([VAEAttention(channels, groups)])

    def forward(self, hidden: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](hidden)))


class Encoder(nn.Module):
    """Image to the mean and log variance of its latent, before quant_conv."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.block_out_channels
        groups = config.norm_num_groups
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        pairs = pairwise((widths[0], *widths))
        levels = [Level(before, width, config.layers_per_block, groups) for before, width in pairs]
        for level, width in zip(levels[:-1], widths[:-1], strict=True):
            level.downsamplers.append(Downsample(width, symmetric=False))
        self.down_blocks = nn.ModuleList(levels)
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        hidden = self.conv_in(image)
        for level in self.down_blocks:
            hidden = level(hidden)
        return self.conv_out(silu(self.conv_norm_out(self.mid_block(hidden))))


class Decoder(nn.Module):
    """Latent to image, after post_quant_conv; coarsest level first, with one more layer per level."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.block_out_channels[::-1]
        groups = config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        pairs = pairwise((widths[0], *widths))
        levels = [Level(before, width, config.layers_per_block + 1, groups) for before, width in pairs]
        for level, width in zip(levels[:-1], widths[:-1], strict=True):
            level.upsamplers.append(Upsample(width))
        self.up_blocks = nn.ModuleList(levels)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        hidden = self.mid_block(self.conv_in(latent))
        for level in self.up_blocks:
            hidden = level(hidden)
        return self.conv_out(silu(self.conv_norm_out(hidden)))


class VAE(nn.Module):
    """The autoencoder of Stable Diffusion (arXiv 2112.10752); the only code that scales latents."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the scaled latent, each (B, 4, H / 8, W / 8), rounded down.

        image: (B, 3, H, W), -1..1. Inversion starts from the mean; LoRA training samples mean + std * noise.
        """
        mean, log_variance = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        std = torch.exp(0.5 * log_variance.clamp(-30, 20))
        return mean * self.config.scaling_factor, std * self.config.scaling_factor

    def decode(self, latent: Tensor) -> Tensor:
        """Decode a scaled latent (B, 4, H, W) to an image (B, 3, 8 H, 8 W), about -1..1, not clamped."""
        return self.decoder(self.post_quant_conv(latent / self.config.scaling_factor))
