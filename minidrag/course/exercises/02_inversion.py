"""Exercise 2: DDIM inversion, from an image's latent up to the noise that denoising would turn into it.

Denoising takes steps (t, t'), each from timestep t down to a lower t':

    z_{t'} = step(z_t, eps(z_t, t), from t, to t')

Inversion undoes the last of them, those next to the image, in the opposite order and direction. (Section
3.3.) The noise at z_t is not known before z_t is, so the UNet looks at the latent that there is; but it
is told the timestep t that the step leads to, as in the denoising step that is being undone.

In words:
1. `schedule.pairs(config.steps, config.inversion_steps)` lists the denoising steps to undo as (t, t'),
   the noisiest first. Go through them from the last to the first.
2. Ask the UNet for the noise: `noise, _, _ = unet(latent, t, text)`.
3. Take the step from t' up to t with `schedule.step(latent, noise, t', t)`.
4. Yield the new latent, and go on from it. The latent that was given is not yielded.
"""

from collections.abc import Iterator

from torch import Tensor

from minidrag.config import EditConfig
from minidrag.method.ddim import NoisePredictor, Schedule


def invert(
    unet: NoisePredictor, schedule: Schedule, latent: Tensor, text: Tensor, config: EditConfig
) -> Iterator[Tensor]:
    """Undo the last `config.inversion_steps` of `config.steps` denoising steps.

    latent: clean, (B, 4, H, W). text: (B, 77, C), the encoded prompt. Yields the latent after each step.
    """
    raise NotImplementedError
