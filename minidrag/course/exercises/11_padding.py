"""Exercise 11: the padding of a strided convolution, which is not the same in the two networks.

A 3x3 convolution with stride 2 halves height and width. It needs a border of zeros to end evenly:

    UNet: one pixel on all four sides        (0 x x x x 0)
    VAE:  one on the right and the bottom    (  x x x x 0)

Both give an image of half the size, so that the wrong one raises no error for even sizes. It moves the
image by half a pixel of the smaller grid instead, at every level.

In words:
1. If `layer.symmetric` is true (UNet), `layer.conv` pads by itself: apply it.
2. If not (VAE), add one column of zeros on the right and one row of zeros at the bottom, then apply
   `layer.conv`, which does not pad. torch.nn.functional.pad takes (left, right, top, bottom).
"""

from torch import Tensor

from minidrag.networks.layers import Downsample


def forward(layer: Downsample, hidden: Tensor) -> Tensor:
    """Halve height and width.

    layer: has symmetric and conv. hidden: (B, C, H, W). Returns (B, C, about H / 2, about W / 2).
    """
    raise NotImplementedError
