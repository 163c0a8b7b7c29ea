"""CLIP's text encoder: 77 token ids to the 77 vectors that the UNet attends to.

Attribute names are those of the official `text_encoder/model.safetensors`.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minidrag.networks.layers import attention


class QuickGELU(nn.Module):
    """OpenAI's approximation of GELU, x sigmoid(1.702 x); at x = -1 it is -0.1542, the exact one -0.1587."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of the text encoder; the defaults are Stable Diffusion 1.5."""

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "quick_gelu"  # SD 2.x: gelu
    layer_norm_eps: float = 1e-5


class Embeddings(nn.Module):
    """Sum of token and position embeddings."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        # A file's position_ids are not read: they can only be 0, 1, 2, ..., and in some merged files are not.
        return self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]


class SelfAttention(nn.Module):
    """Causal self-attention: a token attends to itself and to earlier tokens."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        width = config.hidden_size
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        query = self.q_proj(hidden)
        key = self.k_proj(hidden)
        value = self.v_proj(hidden)
        return self.out_proj(attention(query, key, value, self.heads, causal=True))


class EncoderLayer(nn.Module):
    """Self-attention and MLP, each pre-normalized and residual."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        width = config.hidden_size
        inner = config.intermediate_size
        self.layer_norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.self_attn = SelfAttention(config)
        self.layer_norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        fc1 = nn.Linear(width, inner)
        fc2 = nn.Linear(inner, width)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, activation=ACTIVATIONS[config.hidden_act](), fc2=fc2))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        return hidden + self.mlp(self.layer_norm2(hidden))


class CLIPTextEncoder(nn.Module):
    """The text half of CLIP (arXiv 2103.00020) without its final projection."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        embeddings = Embeddings(config)
        layers = nn.Sequential(*(EncoderLayer(config) for _ in range(config.num_hidden_layers)))
        encoder = nn.Sequential(OrderedDict(layers=layers))  # the official names are encoder.layers.N
        norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        parts: dict[str, nn.Module] = {"embeddings": embeddings, "encoder": encoder, "final_layer_norm": norm}
        self.text_model = nn.Sequential(OrderedDict(parts))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, 77) ids. Returns (B, 77, hidden_size). Padding is not masked, as in training."""
        return self.text_model(tokens)
