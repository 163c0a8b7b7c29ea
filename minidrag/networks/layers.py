"""The layers that Stable Diffusion's networks are built from.

Attribute names are those of the official checkpoint, so that its files load with no table between.
Normalisation constants (`eps`) have no default anywhere: the UNet mixes 1e-5 and 1e-6, and the wrong one
of the two changes pictures too little to be seen and too much to be right.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeyValue = tuple[Tensor, Tensor]


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Scaled dot-product attention, softmax(Q K^T / sqrt(d)) V, over `heads` slices of the channels.

    query: (B, N, C). key, value: (B, M, C). Returns (B, N, C). causal: token i sees tokens 0..i only.
    """
    query, key, value = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=causal)  # (B, heads, N, C / heads)
    return mixed.transpose(1, 2).flatten(2)  # (B, heads, N, C / heads) -> (B, N, C)


class Attention(nn.Module):
    """Attention over tokens; returns what it computed and the keys and values that it used."""

    def __init__(self, channels: int, context_channels: int, heads: int, bias: bool):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(context_channels, channels, bias=bias)
        self.to_v = nn.Linear(context_channels, channels, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(
        self, tokens: Tensor, context: Tensor, key_value: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """tokens: (B, N, C). context: (B, M, C_context), `tokens` itself for self-attention.

        key_value: a pair (B, M, C) to attend to in place of the layer's own.
        """
        key, value = key_value or (self.to_k(context), self.to_v(context))
        return self.to_out(attention(self.to_q(tokens), key, value, self.heads)), (key, value)


class GEGLU(nn.Module):
    """Gated linear unit whose gate is the exact (erf) GELU of the second half (arXiv 2002.05202)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        value, gate = self.proj(tokens).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Two linear layers, four times as wide in between."""

    def __init__(self, channels: int):
        super().__init__()
        # The official file calls the second linear layer net.2: place 1 held a dropout.
        self.net = nn.Sequential(
            GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each added to its normalised input."""

    def __init__(self, channels: int, text_channels: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=1e-5)
        self.attn1 = Attention(channels, channels, heads, bias=False)
        self.norm2 = nn.LayerNorm(channels, eps=1e-5)
        self.attn2 = Attention(channels, text_channels, heads, bias=False)
        self.norm3 = nn.LayerNorm(channels, eps=1e-5)
        self.ff = FeedForward(channels)

    def forward(self, tokens: Tensor, text: Tensor, key_value: KeyValue | None) -> tuple[Tensor, KeyValue]:
        normed = self.norm1(tokens)
        mixed, used = self.attn1(normed, normed, key_value)
        tokens = tokens + mixed
        tokens = tokens + self.attn2(self.norm2(tokens), text)[0]
        return tokens + self.ff(self.norm3(tokens)), used


class SpatialTransformer(nn.Module):
    """A transformer block over the positions of a feature map, between two projections."""

    def __init__(self, channels: int, text_channels: int, heads: int, groups: int, linear: bool):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        # SD 1.x stores both projections as 1x1 convolutions, SD 2.x as linear layers: the same arithmetic.
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, text_channels, heads)])
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(
        self, hidden: Tensor, text: Tensor, key_value: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """hidden: (B, C, H, W). Returns that shape, and the self-attention's (K, V), each (B, H W, C)."""
        linear, normed = isinstance(self.proj_in, nn.Linear), self.norm(hidden)
        if not linear:
            normed = self.proj_in(normed)
        # Contiguous: sums keep their first part's layout, and every norm and linear would copy a strided one.
        tokens = normed.flatten(2).transpose(1, 2).contiguous()  # (B, C, H, W) -> (B, H W, C)
        if linear:
            tokens = self.proj_in(tokens)
        tokens, used = self.transformer_blocks[0](tokens, text, key_value)
        if linear:
            tokens = self.proj_out(tokens)
        output = tokens.transpose(1, 2).unflatten(2, hidden.shape[2:])  # (B, H W, C) -> (B, C, H, W)
        return hidden + (output if linear else self.proj_out(output.contiguous())), used


class ResnetBlock(nn.Module):
    """Two normalised convolutions, the time step added between them, and a shortcut past both.

    time_channels: width of the time embedding; None (the VAE) leaves time out.
    """

    def __init__(self, channels: int, out_channels: int, groups: int, eps: float, time_channels: int | None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps=eps)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        if time_channels is not None:
            self.time_emb_proj = nn.Linear(time_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else None

    def forward(self, hidden: Tensor, time: Tensor | None = None) -> Tensor:
        """hidden: (B, C, H, W). time: (B, time_channels). Returns (B, C_out, H, W)."""
        change = self.conv1(F.silu(self.norm1(hidden)))
        if time is not None:
            change = change + self.time_emb_proj(F.silu(time))[:, :, None, None]
        for step in (self.norm2, F.silu, self.conv2):  # one by one: each result frees the one before it
            change = step(change)
        return change + (hidden if self.conv_shortcut is None else self.conv_shortcut(hidden))


class Downsample(nn.Module):
    """Halves height and width by a strided convolution.

    symmetric: padded by 1 on all four sides (UNet); otherwise on the right and at the bottom only (VAE).
    """

    def __init__(self, channels: int, symmetric: bool):
        super().__init__()
        self.symmetric = symmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if symmetric else 0)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv(hidden if self.symmetric else F.pad(hidden, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Enlarges to `size` (height, width), twice the input unless told, by nearest neighbour; convolves."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        height, width = size or (2 * hidden.shape[2], 2 * hidden.shape[3])
        return self.conv(F.interpolate(hidden, size=(height, width), mode="nearest"))


class TimestepEmbedding(nn.Module):
    """Time step -> vector: cosines and sines of 160 frequencies (SD 1.5), then two linear layers."""

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
        waves = torch.cat([angle.cos(), angle.sin()], dim=1)  # cosines first, unlike the original transformer
        return self.linear_2(F.silu(self.linear_1(waves.to(dtype))))
