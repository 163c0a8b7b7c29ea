"""Exercise 8: the loss with which the LoRA learns the image.

Equation 2 of the paper: add noise to the image's latent z, let the UNet guess it, and compare.

    L_ft(z, dtheta) = E_{eps, t} || eps - eps_{theta + dtheta}(alpha_t z + sigma_t eps) ||_2^2

with alpha_t = sqrt(a) and sigma_t = sqrt(1 - a), where a = alpha-bar_t. theta are the weights of the
UNet, which stay as they are, dtheta the LoRA's. The mean E over noise and timesteps is taken by drawing a
few of both: here they are arguments.

In words:
1. Mix latent and noise, each with its own timestep: `schedule.add_noise(latent, noise, timestep)`, in
   this order.
2. Bring the mix to the dtype of the text, which is that of the UNet.
3. Ask the UNet: `predicted, _, _ = unet(noisy, timestep, text)`, with the text repeated for each latent
   of the batch, (1, 77, C) to (B, 77, C).
4. Bring what it says to the dtype of the noise, and take the mean over everything of the squared
   difference.
"""

from torch import Tensor

from minidrag.method.ddim import NoisePredictor, Schedule


def noise_loss(
    unet: NoisePredictor, schedule: Schedule, latent: Tensor, timestep: Tensor, noise: Tensor, text: Tensor
) -> Tensor:
    """Mean squared error of the noise that the UNet predicts.

    latent, noise: (B, 4, H, W). timestep: (B,). text: (1, 77, C). Returns a number as a 0-d tensor.
    """
    raise NotImplementedError
