"""CLIP's text encoder: 77 token ids to the 77 vectors that the UNet attends to.

Attribute names are those of the official `text_encoder/model.safetensors`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidrag.networks.layers import attention


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation x sigmoid(1.702 x); at x = -1 it is -0.1542 where the exact GELU is -0.1587."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of the text encoder; the defaults are Stable Diffusion 1.5. Token ids are the tokenizer's."""

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "quick_gelu"  # SD 2.x: gelu
    layer_norm_eps: float = 1e-5

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "CLIPConfig":
        """Reads an official `text_encoder/config.json`; raises ValueError for an unknown activation."""
        config = cls(**{key: values[key] for key in cls.__dataclass_fields__ if key in values})
        if config.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"the text encoder's config.json has hidden_act = {config.hidden_act!r}; "
                f"minidrag knows {' and '.join(ACTIVATIONS)}"
            )
        return config


class Embeddings(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        # Files may carry position_ids, some of them wrong; positions are 0, 1, 2, ... whatever they say.
        return self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]


class SelfAttention(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.heads, width = config.num_attention_heads, config.hidden_size
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)
        return self.out_proj(attention(query, key, value, self.heads, causal=True))


class MLP(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(hidden)))


class EncoderLayer(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SelfAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        return hidden + self.mlp(self.layer_norm2(hidden))


class Encoder(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class TextModel(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.final_layer_norm(self.encoder(self.embeddings(tokens)))


class CLIPTextEncoder(nn.Module):
    """The text half of CLIP (arXiv 2103.00020) without its last projection."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.text_model = TextModel(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, 77) ids. Returns (B, 77, hidden_size).

        Padding is not masked: the UNet was trained on vectors that see it, so the padding id counts.
        """
        return self.text_model(tokens)
