"""Exercise 10: the embedding that tells the UNet the noise level.

A timestep t, 0 to 999, becomes waves of C / 2 frequencies, from fast to slow:

    w_i = exp(-ln(10000) i / (C / 2))        i = 0, ..., C / 2 - 1
    e(t) = [cos(t w_0), cos(t w_1), ..., sin(t w_0), sin(t w_1), ...]

so that near timesteps look alike, and all differ. Two linear layers with a SiLU in between make of it
what the UNet's blocks take. Stable Diffusion has the cosines first; the original transformer had the
sines first. Weights that were trained with one order are of no use with the other.

In words:
1. half = `layer.channels` // 2 frequencies, as above, in float32.
2. The angles: each timestep times each frequency, (B, half).
3. All cosines, then all sines: (B, C). Bring them to `dtype`.
4. `layer.linear_1`, then SiLU, x sigmoid(x), then `layer.linear_2`.
"""

import torch
from torch import Tensor

from minidrag.networks.unet import TimestepEmbedding


def forward(layer: TimestepEmbedding, timestep: Tensor, dtype: torch.dtype) -> Tensor:
    """Embed timesteps.

    layer: has channels (C), linear_1, and linear_2. timestep: (B,), 0 to 999. Returns (B, time channels) in
    `dtype`.
    """
    raise NotImplementedError
