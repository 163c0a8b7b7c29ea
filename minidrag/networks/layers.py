"""Layers of Stable Diffusion's networks.

Attribute names are those of the official checkpoints, so their files load without a mapping table.
`eps` has no default: the UNet uses both 1e-5 and 1e-6, and the wrong one changes images too little to notice.
"""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

KeyValue = tuple[Tensor, Tensor]


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Multi-head scaled dot-product attention, softmax(Q K^T / sqrt(d)) V.

    query: (B, N, C). key, value: (B, M, C). Returns (B, N, C). causal: token i attends to tokens 0..i only.
    """
    query, key, value = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=causal)  # (B, heads, N, C / heads)
    return mixed.transpose(1, 2).flatten(2)  # (B, heads, N, C / heads) -> (B, N, C)


class Attention(nn.Module):
    """Attention over tokens that also returns the keys and values it used."""

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

        key_value: a pair (B, M, C) to attend to instead of the layer's own.
        """
        key, value = key_value or (self.to_k(context), self.to_v(context))
        return self.to_out(attention(self.to_q(tokens), key, value, self.heads)), (key, value)


class GEGLU(nn.Module):
    """Gated linear unit with the exact (erf) GELU as its gate (arXiv 2002.05202)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        value, gate = self.proj(tokens).chunk(2, dim=-1)
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text and feed-forward, each pre-normalized and residual."""

    def __init__(self, channels: int, text_channels: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=1e-5)
        self.attn1 = Attention(channels, channels, heads, bias=False)
        self.norm2 = nn.LayerNorm(channels, eps=1e-5)
        self.attn2 = Attention(channels, text_channels, heads, bias=False)
        self.norm3 = nn.LayerNorm(channels, eps=1e-5)
        # The Identity holds the place of a dropout: the official file calls the second layer ff.net.2.
        net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))
        self.ff = nn.Sequential(OrderedDict(net=net))

    def forward(self, tokens: Tensor, text: Tensor, key_value: KeyValue | None) -> tuple[Tensor, KeyValue]:
        normed = self.norm1(tokens)
        mixed, used = self.attn1(normed, normed, key_value)
        tokens = tokens + mixed
        tokens = tokens + self.attn2(self.norm2(tokens), text)[0]
        return tokens + self.ff(self.norm3(tokens)), used


class SpatialTransformer(nn.Module):
    """A transformer block over the positions of a feature map, between two projections; residual."""

    def __init__(self, channels: int, text_channels: int, heads: int, groups: int, linear: bool):
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        # SD 1.x stores both projections as 1x1 convolutions, SD 2.x as linear layers: the same arithmetic.
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, text_channels, heads)])
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(
        self, hidden: Tensor, text: Tensor, key_value: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """hidden: (B, C, H, W). Returns that shape, and (K, V) of the self-attention, each (B, H W, C)."""
        x = self.norm(hidden)
        if not self.linear:
            x = self.proj_in(x)
        # Contiguous, or every norm and linear layer of the block would make its own copy.
        x = x.flatten(2).transpose(1, 2).contiguous()  # (B, C, H, W) -> (B, H W, C)
        if self.linear:
            x = self.proj_in(x)
        x, used = self.transformer_blocks[0](x, text, key_value)
        if self.linear:
            x = self.proj_out(x)
        x = x.transpose(1, 2).unflatten(2, hidden.shape[2:])  # (B, H W, C) -> (B, C, H, W)
        if not self.linear:
            x = self.proj_out(x.contiguous())
        return hidden + x, used


class ResnetBlock(nn.Module):
    """Two convolutions, each after GroupNorm and SiLU, the timestep embedding added in between; residual."""

    def __init__(self, channels: int, out_channels: int, groups: int, eps: float, time_channels: int | None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps=eps)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        if time_channels is not None:  # None: the VAE, which has no timestep
            self.time_emb_proj = nn.Linear(time_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = channels == out_channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, hidden: Tensor, time: Tensor | None = None) -> Tensor:
        """hidden: (B, C, H, W). time: (B, time_channels). Returns (B, C_out, H, W)."""
        x = self.conv1(F.silu(self.norm1(hidden)))
        if time is not None:
            x = x + self.time_emb_proj(F.silu(time))[:, :, None, None]
        for layer in (self.norm2, F.silu, self.conv2):  # not nested: each result frees the one before
            x = layer(x)
        return x + self.conv_shortcut(hidden)


class Downsample(nn.Module):
    """Halve height and width with a strided convolution."""

    def __init__(self, channels: int, symmetric: bool):
        super().__init__()
        self.symmetric = symmetric  # padding on all four sides (UNet), or on the right and bottom only (VAE)
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if symmetric else 0)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv(hidden if self.symmetric else F.pad(hidden, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbor upsampling to `size` (height, width), by default doubling; then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        height, width = size or (2 * hidden.shape[2], 2 * hidden.shape[3])
        return self.conv(F.interpolate(hidden, size=(height, width), mode="nearest"))
