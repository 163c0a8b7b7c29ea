"""Exercise 2: DDIM inversion, from an image's latent up to the noise that denoising would turn into it.

A level counts the denoising steps that are left: 0 is the finished latent. Denoising takes a step from each
level l to the one below it:

    z_{l-1} = step(z_l, eps(z_l, l), from l, to l - 1)

Inversion undoes these steps in the opposite order and direction, from level 0 up. (Section 3.3.) The noise at
z_l is not known before z_l is, so the UNet looks at the latent that there is; but it is called at the level l
that the step leads to, as in the denoising step that is being undone.

In words:
1. Go through the levels 1, 2, ..., `levels`.
2. Ask the UNet for the noise: `noise, _, _ = denoiser(latent, level)`.
3. Take the step up from the level below: `denoiser.step(latent, noise, level - 1, level)`.
4. Yield the new latent, and go on from it. The clean latent itself is not yielded.
"""

from collections.abc import Iterator

from torch import Tensor

from minidrag.method.ddim import Denoiser


def invert(denoiser: Denoiser, latent: Tensor, levels: int) -> Iterator[Tensor]:
    """Take a clean latent (B, 4, H, W) up to level `levels`. Yields the latent of each level from 1."""
    raise NotImplementedError
