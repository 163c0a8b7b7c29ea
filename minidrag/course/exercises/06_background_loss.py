"""Exercise 6: the mask term, which holds what is not to change.

Equation 3, second term, without its weight lambda. M: the mask, 1 where the image may change.

    || (z_{t-1} - sg(z_{t-1}^0)) (1 - M) ||_1

z_{t-1} is the latent one DDIM step down, and z_{t-1}^0 is that of the image before the drag, which comes
without a gradient already. || ||_1 is the sum of the absolute values.

In words:
1. Take the difference of the two latents.
2. Keep it where the mask is 0. The mask has no channels: it holds for all four. Its dtype may differ.
3. Add up the absolute values of all that is left.
"""

from torch import Tensor


def background_loss(previous: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """Sum up the change of the unmasked region.

    previous, original: (1, 4, H, W). mask: (H, W), of 0 and 1. Returns a number as a 0-d tensor.
    """
    raise NotImplementedError
