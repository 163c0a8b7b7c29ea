"""Stable Diffusion's UNet: predicts the noise in a latent and returns its features, keys and values.

Attribute names are those of the official `unet/diffusion_pytorch_model.safetensors`.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from minidrag.networks.layers import Downsample, KeyValue, ResnetBlock, SpatialTransformer, Upsample

KeysValues = list[list[KeyValue]]  # per up block, (K, V) of its self-attentions, each (B, tokens, C)


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of the UNet; the defaults are Stable Diffusion 1.5."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)  # per level, finest first
    attention: tuple[bool, ...] = (True, True, True, False)  # levels with transformers, finest first
    heads: tuple[int, ...] = (8, 8, 8, 8)  # per level; config.json calls the number attention_head_dim
    layers_per_block: int = 2
    cross_attention_dim: int = 768
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = False  # True in SD 2.x
    sample_size: int = 64  # shorter side of the latents it was trained on


class UNetOutput(NamedTuple):
    """Predicted noise, and the intermediate results that dragging uses."""

    noise: Tensor  # (B, 4, H, W)
    features: list[Tensor]  # outputs of the four up blocks, coarsest first
    keys_values: KeysValues


class TimestepEmbedding(nn.Module):
    """Sinusoidal embedding of the timestep, then two linear layers."""

    def __init__(self, channels: int, time_channels: int):
        super().__init__()
        self.channels = channels
        self.linear_1 = nn.Linear(channels, time_channels)
        self.linear_2 = nn.Linear(time_channels, time_channels)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """timestep: (B,), 0 to 999. Returns (B, time_channels) in `dtype`; angles are always float32."""
        half = self.channels // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half
        angle = timestep.float()[:, None] * exponent.exp()  # (B,) -> (B, half)
        waves = torch.cat([angle.cos(), angle.sin()], dim=1)  # cosines first
        return self.linear_2(silu(self.linear_1(waves.to(dtype))))


class DownBlock(nn.Module):
    """ResNet blocks, on levels with attention a transformer after each, then a downsampling."""

    def __init__(self, config: UNetConfig, level: int):
        super().__init__()
        widths = config.block_out_channels
        width = widths[level]
        inputs = [widths[max(level - 1, 0)]] + [width] * (config.layers_per_block - 1)
        self.resnets = resnets(config, inputs, width)
        self.attentions = transformers(config, level, len(inputs) if config.attention[level] else 0)
        self.downsamplers = nn.ModuleList([Downsample(width, symmetric=True)] if level < 3 else [])

    def forward(self, hidden: Tensor, time: Tensor, text: Tensor) -> list[Tensor]:
        """Return the outputs of all layers: skips for the up blocks, the last one for the next block."""
        outputs = []
        for i, block in enumerate(self.resnets):
            hidden = block(hidden, time)
            if self.attentions:
                hidden, _ = self.attentions[i](hidden, text)
            outputs.append(hidden)
        return outputs + [downsample(hidden) for downsample in self.downsamplers]


class MidBlock(nn.Module):
    """ResNet block, transformer, ResNet block on the coarsest level."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        width = config.block_out_channels[-1]
        self.resnets = resnets(config, [width, width], width)
        self.attentions = transformers(config, -1, 1)

    def forward(self, hidden: Tensor, time: Tensor, text: Tensor) -> Tensor:
        hidden, _ = self.attentions[0](self.resnets[0](hidden, time), text)
        return self.resnets[1](hidden, time)


class UpBlock(nn.Module):
    """ResNet blocks that each take one skip, with transformers as in DownBlock, then an upsampling."""

    def __init__(self, config: UNetConfig, level: int):
        super().__init__()
        widths = config.block_out_channels
        width = widths[level]
        inputs = [widths[min(level + 1, 3)]] + [width] * config.layers_per_block
        skips = [width] * config.layers_per_block + [widths[max(level - 1, 0)]]
        self.resnets = resnets(config, [sum(pair) for pair in zip(inputs, skips, strict=True)], width)
        self.attentions = transformers(config, level, len(inputs) if config.attention[level] else 0)
        self.upsamplers = nn.ModuleList([Upsample(width)] if level > 0 else [])

    def forward(
        self, hidden: Tensor, skips: list[Tensor], time: Tensor, text: Tensor, reference: list[KeyValue]
    ) -> tuple[Tensor, list[KeyValue]]:
        """skips: taken from the end, one per ResNet block; the next one sets the size to upsample to.

        reference: (K, V) for the self-attentions to attend to; empty: their own. Returns the pairs used.
        """
        used = []
        for i, block in enumerate(self.resnets):
            hidden = block(torch.cat([hidden, skips[-1 - i]], dim=1), time)
            if self.attentions:
                hidden, key_value = self.attentions[i](hidden, text, reference[i] if reference else None)
                used.append(key_value)
        for upsample in self.upsamplers:
            hidden = upsample(hidden, skips[-1 - len(self.resnets)].shape[2:])  # right for odd sizes too
        return hidden, used


def resnets(config: UNetConfig, inputs: list[int], width: int) -> nn.ModuleList:
    """One ResNet block from each number of input channels to `width` channels."""
    time_channels = 4 * config.block_out_channels[0]
    settings = width, config.norm_num_groups, config.norm_eps, time_channels
    return nn.ModuleList(ResnetBlock(channels, *settings) for channels in inputs)


def transformers(config: UNetConfig, level: int, count: int) -> nn.ModuleList:
    """Transformers of a level."""
    sizes = config.block_out_channels[level], config.cross_attention_dim, config.heads[level]
    settings = config.norm_num_groups, config.use_linear_projection
    return nn.ModuleList(SpatialTransformer(*sizes, *settings) for _ in range(count))


class UNet(nn.Module):
    """The noise predictor of Stable Diffusion (arXiv 2112.10752)."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False  # True: recompute blocks in the backward pass, slower but less memory
        channels = config.block_out_channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, channels, 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels, 4 * channels)
        self.down_blocks = nn.ModuleList(DownBlock(config, level) for level in range(4))
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(UpBlock(config, level) for level in (3, 2, 1, 0))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels, eps=config.norm_eps)
        self.conv_out = nn.Conv2d(channels, config.out_channels, 3, padding=1)

    def forward(
        self, latent: Tensor, timestep: int | Tensor, text: Tensor, keys_values: KeysValues | None = None
    ) -> UNetOutput:
        """Predict the noise in a latent.

        latent: (B, 4, H, W), any dtype; outputs have the dtype of the weights.
        timestep: one for all or (B,), 0 to 999. text: (B, 77, cross_attention_dim).
        keys_values: from another call, or only those of its last up blocks; the same self-attentions attend
        to them instead of their own (section 3.4, reference-latent-control).
        """
        timestep = torch.as_tensor(timestep, device=latent.device).expand(len(latent))
        dtype = self.conv_in.weight.dtype
        time = self.time_embedding(timestep, dtype)  # (B, 4 C)
        skips = [self.conv_in(latent.to(dtype))]
        for block in self.down_blocks:
            skips += self._run(block, skips[-1], time, text)
        hidden = self._run(self.mid_block, skips[-1], time, text)
        reference = keys_values or []
        reference = [[]] * (len(self.up_blocks) - len(reference)) + reference
        features = []
        used = []
        for block, pairs in zip(self.up_blocks, reference, strict=True):
            hidden, own = self._run(block, hidden, skips, time, text, pairs)
            skips = skips[: -self.config.layers_per_block - 1]
            features.append(hidden)
            used.append(own)
        noise = self.conv_out(silu(self.conv_norm_out(hidden)))
        return UNetOutput(noise, features, used)

    def _run(self, block: nn.Module, *inputs: Any) -> Any:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)
