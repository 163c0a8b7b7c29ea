"""Exercise 1: a DDIM step.

A noisy latent is a mix of the clean latent and noise. At timestep t, with a = alpha-bar_t,

    x_t = sqrt(a) x_0 + sqrt(1 - a) eps

where a is near 1 for an almost clean latent and near 0 for almost pure noise. A network guesses eps. A
step solves this for x_0, then mixes again at another noise level:

    x_end = sqrt(a_end) (x_start - sqrt(1 - a_start) eps) / sqrt(a_start) + sqrt(1 - a_end) eps

(DDIM, arXiv 2010.02502, equation 12 with sigma = 0.) The same formula goes down, to denoise, and up, to
invert.

In words:
1. Look up a_start and a_end with `schedule.alpha(timestep)`. It knows what a negative timestep means: one
   step below the lowest. An index into a table would not.
2. Take the noise out of the latent: what remains is the clean latent, as far as the network can tell.
3. Put noise back, the same noise, as much as belongs to `end`.
"""

from torch import Tensor

from minidrag.method.ddim import Schedule


def step(schedule: Schedule, latent: Tensor, noise: Tensor, start: int, end: int) -> Tensor:
    """Take a latent from one noise level to another.

    latent, noise: (B, 4, H, W). start, end: timesteps, -19 to 999. Returns (B, 4, H, W).
    """
    raise NotImplementedError
