"""Exercise 9: attention that can use the keys and values of another image.

Each token asks with its query Q, is found by its key K, and gives its value V:

    Attention(Q, K, V) = softmax(Q K^T / sqrt(d)) V

in several heads side by side, each d = C / heads channels wide. While the edited image is denoised, its
self-attention uses the keys and values of the original: the edit has its own layout, which the queries
hold, but looks like the original (reference-latent-control, section 3.4).

In words:
1. Keys and values: the pair `key_value`, or if it is None, `layer.to_k(context)` and `layer.to_v(context)`.
2. Queries: `layer.to_q(tokens)`, always the layer's own.
3. Attention in `layer.heads` heads: `attention(query, key, value, heads)` of minidrag.networks.layers
   does this, or write it: split C into heads, multiply, divide by sqrt(d), softmax over the keys,
   multiply, and join the heads.
4. Return `layer.to_out` of the result, and the pair of keys and values that was used, for another call.
"""

from torch import Tensor

from minidrag.networks.layers import Attention, KeyValue


def forward(
    layer: Attention, tokens: Tensor, context: Tensor, key_value: KeyValue | None = None
) -> tuple[Tensor, KeyValue]:
    """Attend to the context, or to the keys and values of a pair in its place.

    tokens: (B, N, C). context: (B, M, C'), the tokens themselves for self-attention. key_value: a pair of
    (B, L, C).
    Returns (B, N, C), and the keys and values used.
    """
    raise NotImplementedError
