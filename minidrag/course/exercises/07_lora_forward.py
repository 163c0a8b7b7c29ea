"""Exercise 7: a LoRA layer, a linear layer and a small addition that can be trained.

LoRA (arXiv 2106.09685) leaves the weight W of a layer as it is and adds a product of two thin matrices.
With `down` D of shape (rank, in) and `up` U of shape (out, rank):

    y = W x + b + (alpha / rank) U D x

D brings x down to `rank` numbers and U brings them up again: few numbers to train, and nothing to undo
afterwards.

In words:
1. Let the layer that was there compute what it did: `layer.base(x)`.
2. Bring x down with `layer.down` and up with `layer.up`; in the notation of torch, x is a row, so it is x
   D^T U^T.
3. Scale by alpha / rank: `layer.scale`, or from `layer.alpha` and the first size of `layer.down`.
4. Add. Gradients must flow to `layer.down`, `layer.up`, and x.
"""

from torch import Tensor

from minidrag.method.lora import LoRALayer


def forward(layer: LoRALayer, x: Tensor) -> Tensor:
    """Compute a linear layer and its low-rank addition.

    layer: has base (an nn.Linear), down (rank, in), up (out, rank), alpha, and scale. x: (..., in).
    Returns (..., out).
    """
    raise NotImplementedError
