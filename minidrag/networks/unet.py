"""Stable Diffusion's UNet: predicts the noise in a latent; hands out its features, keys and values.

Attribute names are those of the official `unet/diffusion_pytorch_model.safetensors`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from minidrag.networks.layers import (
    Downsample,
    KeyValue,
    ResnetBlock,
    SpatialTransformer,
    TimestepEmbedding,
    Upsample,
)

# Values that this UNet is written for: a config.json may leave them out or repeat them, nothing else.
FIXED = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "transformer_layers_per_block": 1,
}


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of the UNet; the defaults are Stable Diffusion 1.5."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)  # per level, finest first
    attention: tuple[bool, ...] = (True, True, True, False)  # which levels have transformers, finest first
    heads: tuple[int, ...] = (8, 8, 8, 8)  # config.json calls this number attention_head_dim
    layers_per_block: int = 2
    cross_attention_dim: int = 768
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = False  # True in SD 2.x
    sample_size: int = 64  # shorter side of the latents it was trained on

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "UNetConfig":
        """Reads an official `unet/config.json`; absent keys take the defaults that its authors' code has.

        Raises ValueError, naming the key, where the file asks for a network that this one is not.
        """
        for key, fixed in FIXED.items():
            if values.get(key, fixed) != fixed:
                raise ValueError(
                    f"the UNet's config.json has {key} = {values[key]!r}; minidrag knows only {fixed!r}"
                )
        channels = tuple(values.get("block_out_channels", cls.block_out_channels))
        heads = values.get("num_attention_heads") or values.get("attention_head_dim", 8)
        heads = (heads,) * 4 if isinstance(heads, int) else tuple(heads)
        down = values.get("down_block_types", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",))
        up = values.get("up_block_types", ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
        attention = tuple(kind == "CrossAttnDownBlock2D" for kind in down)
        mirrored = tuple(kind == "CrossAttnUpBlock2D" for kind in reversed(up))
        known = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
        four = len(channels) == len(heads) == len(down) == 4
        if not four or attention != mirrored or not known.issuperset((*down, *up)):
            raise ValueError(
                "the UNet's config.json does not describe Stable Diffusion's four mirrored levels"
            )
        sizes = {key: values[key] for key in cls.__dataclass_fields__ if key in values}
        return cls(**sizes | {"block_out_channels": channels, "attention": attention, "heads": heads})


class UNetOutput(NamedTuple):
    """noise: (B, 4, H, W). features: outputs of the four up blocks, coarsest first.

    keys_values: for each up block the (K, V) of its self-attentions in order, each (B, tokens, C).
    """

    noise: Tensor
    features: list[Tensor]
    keys_values: list[list[KeyValue]]


class DownBlock(nn.Module):
    """ResNet blocks, each with a transformer where the level has attention, then a downsampling."""

    def __init__(self, config: UNetConfig, level: int):
        super().__init__()
        width, last = config.block_out_channels[level], level == len(config.block_out_channels) - 1
        before = config.block_out_channels[max(level - 1, 0)]
        self.resnets = nn.ModuleList(
            resnet(config, before if i == 0 else width, width) for i in range(config.layers_per_block)
        )
        self.attentions = nn.ModuleList(
            transformer(config, level) for _ in range(config.layers_per_block * config.attention[level])
        )
        self.downsamplers = nn.ModuleList([] if last else [Downsample(width, symmetric=True)])

    def forward(self, hidden: Tensor, time: Tensor, text: Tensor) -> list[Tensor]:
        """Returns the outputs of all layers: the up blocks want each of them, the next block the last."""
        outputs = []
        for i, block in enumerate(self.resnets):
            hidden = block(hidden, time)
            if self.attentions:
                hidden, _ = self.attentions[i](hidden, text)
            outputs.append(hidden)
        for downsample in self.downsamplers:
            outputs.append(downsample(hidden))
        return outputs


class MidBlock(nn.Module):
    """ResNet block, transformer, ResNet block on the coarsest level."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        width = config.block_out_channels[-1]
        self.resnets = nn.ModuleList([resnet(config, width, width), resnet(config, width, width)])
        self.attentions = nn.ModuleList([transformer(config, -1)])

    def forward(self, hidden: Tensor, time: Tensor, text: Tensor) -> Tensor:
        hidden, _ = self.attentions[0](self.resnets[0](hidden, time), text)
        return self.resnets[1](hidden, time)


class UpBlock(nn.Module):
    """ResNet blocks that each take in one skip, with transformers, then an upsampling to the next skip."""

    def __init__(self, config: UNetConfig, level: int):
        super().__init__()
        channels, layers = config.block_out_channels, config.layers_per_block + 1
        width, before, after = channels[level], channels[min(level + 1, 3)], channels[max(level - 1, 0)]
        skips = [width] * (layers - 1) + [after]
        self.resnets = nn.ModuleList(
            resnet(config, (before if i == 0 else width) + skips[i], width) for i in range(layers)
        )
        self.attentions = nn.ModuleList(
            transformer(config, level) for _ in range(layers * config.attention[level])
        )
        self.upsamplers = nn.ModuleList([Upsample(width)] if level > 0 else [])

    def forward(
        self, hidden: Tensor, skips: list[Tensor], time: Tensor, text: Tensor, given: list[KeyValue]
    ) -> tuple[Tensor, list[KeyValue]]:
        """skips: one per ResNet block, used from the last on; one more tells the size to grow to."""
        used = []
        for i, block in enumerate(self.resnets):
            hidden = block(torch.cat([hidden, skips[-1 - i]], dim=1), time)
            if self.attentions:
                hidden, key_value = self.attentions[i](hidden, text, given[i] if given else None)
                used.append(key_value)
        for upsample in self.upsamplers:
            hidden = upsample(hidden, skips[-1 - len(self.resnets)].shape[2:])  # right for odd sizes too
        return hidden, used


class UNet(nn.Module):
    """The noise predictor of Stable Diffusion (arXiv 2112.10752)."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False  # True: recompute each block in the backward pass, less memory, more time
        channels = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], 4 * channels[0])
        self.down_blocks = nn.ModuleList(DownBlock(config, level) for level in range(4))
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(UpBlock(config, level) for level in (3, 2, 1, 0))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        latent: Tensor,
        timestep: int | Tensor,
        text: Tensor,
        keys_values: list[list[KeyValue]] | None = None,
    ) -> UNetOutput:
        """Predicts the noise in `latent`; reads `keys_values`, where given, in place of its own.

        latent: (B, 4, H, W), any dtype; all that comes back has the weights' one.
        timestep: one for all or (B,), 0 to 999. text: (B, 77, cross_attention_dim).
        keys_values: those of an earlier call, or of its last few up blocks alone: the same self-attentions
        attend to them (paper section 3.4, reference-latent-control).
        """
        timestep = torch.as_tensor(timestep, device=latent.device).expand(len(latent))
        dtype = self.conv_in.weight.dtype
        time = self.time_embedding(timestep, dtype)  # (B, 4 C)
        hidden = self.conv_in(latent.to(dtype))
        skips = [hidden]
        for block in self.down_blocks:
            skips += self._run(block, skips[-1], time, text)
        hidden = self._run(self.mid_block, skips[-1], time, text)
        features, used, given = [], [], keys_values or []
        given = [[]] * (len(self.up_blocks) - len(given)) + given
        for block, replacements in zip(self.up_blocks, given, strict=True):
            hidden, own = self._run(block, hidden, skips, time, text, replacements)
            skips = skips[: -self.config.layers_per_block - 1]
            features.append(hidden)
            used.append(own)
        noise = self.conv_out(silu(self.conv_norm_out(hidden)))
        return UNetOutput(noise, features, used)

    def _run(self, block: nn.Module, *inputs: Any) -> Any:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def resnet(config: UNetConfig, channels: int, out_channels: int) -> ResnetBlock:
    time_channels = 4 * config.block_out_channels[0]
    return ResnetBlock(channels, out_channels, config.norm_num_groups, config.norm_eps, time_channels)


def transformer(config: UNetConfig, level: int) -> SpatialTransformer:
    channels, heads = config.block_out_channels[level], config.heads[level]
    groups, linear = config.norm_num_groups, config.use_linear_projection
    return SpatialTransformer(channels, config.cross_attention_dim, heads, groups, linear)
