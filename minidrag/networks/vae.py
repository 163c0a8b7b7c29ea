"""Stable Diffusion's autoencoder: pictures to latents an eighth of their size, and back.

Attribute names are those of the official `vae/diffusion_pytorch_model.safetensors` in its newer spelling
(`to_q`, not `query`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from minidrag.networks.layers import Attention, Downsample, ResnetBlock, Upsample

EPS = 1e-6  # of every normalisation in this network; the UNet's ResNet blocks have 1e-5

# Values that this autoencoder is written for: a config.json may leave them out or repeat them, nothing else.
FIXED = {
    "act_fn": "silu",
    "in_channels": 3,
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "out_channels": 3,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the autoencoder; the defaults are Stable Diffusion 1.5."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)  # per level, finest first
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215  # brings the latents to about unit variance

    @property
    def factor(self) -> int:
        """How many pixels of a picture's side make one of the latent's."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "VAEConfig":
        """Reads an official `vae/config.json`; raises ValueError, naming the key, for another kind of VAE."""
        for key, fixed in FIXED.items():
            if values.get(key, fixed) != fixed:
                raise ValueError(
                    f"the VAE's config.json has {key} = {values[key]!r}; minidrag knows {fixed!r} only"
                )
        sizes = {key: values[key] for key in cls.__dataclass_fields__ if key in values}
        sizes["block_out_channels"] = tuple(sizes.get("block_out_channels", cls.block_out_channels))
        return cls(**sizes)


class VAEAttention(Attention):
    """Self-attention with one head over the positions of a feature map, added to its input."""

    def __init__(self, channels: int, groups: int):
        super().__init__(channels, channels, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = self.group_norm(hidden).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, H W, C)
        mixed, _ = super().forward(tokens, tokens)
        return hidden + mixed.transpose(1, 2).unflatten(2, hidden.shape[2:])  # (B, H W, C) -> (B, C, H, W)


class Level(nn.Module):
    """ResNet blocks of one resolution and, at most, one change of resolution behind them."""

    def __init__(self, channels: int, out_channels: int, layers: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(channels if i == 0 else out_channels, out_channels, groups, EPS, None)
            for i in range(layers)
        )
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
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        levels = [
            Level(before, width, config.layers_per_block, groups)
            for before, width in zip((widths[0], *widths), widths, strict=False)
        ]
        for level, width in zip(levels[:-1], widths, strict=False):
            level.downsamplers.append(Downsample(width, symmetric=False))
        self.down_blocks = nn.ModuleList(levels)
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, picture: Tensor) -> Tensor:
        hidden = self.conv_in(picture)
        for level in self.down_blocks:
            hidden = level(hidden)
        return self.conv_out(silu(self.conv_norm_out(self.mid_block(hidden))))


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        levels = [
            Level(before, width, config.layers_per_block + 1, groups)
            for before, width in zip((widths[0], *widths), widths, strict=False)
        ]
        for level, width in zip(levels[:-1], widths, strict=False):
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
    """The autoencoder of Stable Diffusion (arXiv 2112.10752). The one place that knows the latents' scale."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        latent = config.latent_channels
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    def encode(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """Picture (B, 3, H, W) in -1..1 -> mean and standard deviation of its scaled latent.

        Both (B, 4, H / 8, W / 8), sides rounded down. The mean is the latent to invert; LoRA training draws
        mean + std * noise anew for every step.
        """
        mean, log_variance = self.quant_conv(self.encoder(picture)).chunk(2, dim=1)
        deviation = torch.exp(0.5 * log_variance.clamp(-30, 20))
        return mean * self.config.scaling_factor, deviation * self.config.scaling_factor

    def decode(self, latent: Tensor) -> Tensor:
        """Scaled latent (B, 4, H, W) -> picture (B, 3, 8 H, 8 W), about -1..1, not clamped."""
        return self.decoder(self.post_quant_conv(latent / self.config.scaling_factor))
