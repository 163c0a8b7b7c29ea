"""DDIM (arXiv 2010.02502) without added noise. Timestep 0 is almost clean, 999 is almost pure noise."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from minidrag.config import EditConfig
from minidrag.networks.unet import KeysValues


class NoisePredictor(Protocol):
    """All that the method knows of a UNet: noise, features of each up block, keys and values."""

    def __call__(
        self, latent: Tensor, timestep: int | Tensor, text: Tensor, keys_values: KeysValues | None = None, /
    ) -> tuple[Tensor, list[Tensor], KeysValues]: ...


@dataclass(frozen=True)
class Schedule:
    """Noise schedule; the defaults are Stable Diffusion 1.5."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"  # linear in sqrt(beta); "linear": in beta
    num_train_timesteps: int = 1000
    steps_offset: int = 1  # timestep of the last denoising step
    set_alpha_to_one: bool = False  # True: the last step ends noise-free, False: at timestep 0

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """Signal variance alpha-bar_t of DDPM per timestep, (num_train_timesteps,), float32."""
        power = 0.5 if self.beta_schedule == "scaled_linear" else 1.0
        ends = self.beta_start**power, self.beta_end**power
        betas = torch.linspace(*ends, self.num_train_timesteps, dtype=torch.float32) ** (1 / power)
        return torch.cumprod(1 - betas, dim=0)

    def alpha(self, timestep: int) -> Tensor:
        """alpha-bar_t, 0-d; a negative timestep is the level of a finished latent."""
        noise_free = timestep < 0 and self.set_alpha_to_one
        return torch.ones(()) if noise_free else self.alphas_cumprod[max(timestep, 0)]

    def pairs(self, steps: int, count: int | None = None) -> list[tuple[int, int]]:
        """Denoising steps as (timestep, lower timestep): of 50 (981, 961), ..., (1, -19).

        count: only the last so many. Raises ValueError for more steps than the schedule has.
        """
        stride = self.num_train_timesteps // max(steps, 1)
        times = [stride * i + self.steps_offset for i in reversed(range(steps))]
        if stride == 0 or not times or times[0] >= self.num_train_timesteps:
            most = self.num_train_timesteps - self.steps_offset
            raise ValueError(f"steps must be 1 to {most}, got {steps}")
        count = steps if count is None else count
        if not 0 <= count <= steps:
            raise ValueError(f"the number of steps taken must be 0 to {steps}, got {count}")
        return [(time, time - stride) for time in times[steps - count :]]

    def step(self, latent: Tensor, noise: Tensor, start: int, end: int) -> Tensor:
        """Take a latent from one noise level to another (DDIM eq. 12 with sigma = 0).

            x_end = sqrt(a_end) (x_start - sqrt(1 - a_start) eps) / sqrt(a_start) + sqrt(1 - a_end) eps

        start, end: timesteps. Computes in float32 or wider; returns the latent's dtype.
        """
        a_start, a_end = self.alpha(start), self.alpha(end)
        exact = torch.promote_types(latent.dtype, torch.float32)
        eps = noise.to(exact)
        clean = (latent.to(exact) - (1 - a_start).sqrt() * eps) / a_start.sqrt()
        return (a_end.sqrt() * clean + (1 - a_end).sqrt() * eps).to(latent.dtype)

    def add_noise(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """sqrt(a) z_0 + sqrt(1 - a) eps (DDPM eq. 4). clean, noise: (B, C, H, W). timestep: (B,)."""
        alpha = self.alphas_cumprod.to(clean)[timestep.to(clean.device)].reshape(-1, 1, 1, 1)
        return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise


# no_grad, not inference_mode: the drag optimizes one of these latents.
@torch.no_grad()
def invert(
    unet: NoisePredictor, schedule: Schedule, latent: Tensor, text: Tensor, config: EditConfig
) -> Iterator[Tensor]:
    """DDIM inversion (section 3.3): undo the last `config.inversion_steps` denoising steps.

    latent: clean, (B, 4, H, W). text: (B, 77, C). Yields the latent after each step.
    The UNet is called at the timestep that a step leads to, as in the denoising step that it undoes.
    """
    for time, below in reversed(schedule.pairs(config.steps, config.inversion_steps)):
        noise, _, _ = unet(latent, time, text)
        latent = schedule.step(latent, noise, below, time)
        yield latent


@torch.no_grad()
def denoise(
    unet: NoisePredictor,
    schedule: Schedule,
    latents: list[Tensor],
    text: Tensor,
    level: int,
    config: EditConfig,
) -> Iterator[list[Tensor]]:
    """Take the last `level` denoising steps with an original and its edits (section 3.4).

    Reference-latent-control: from step `config.control_start` on, the self-attention of the edits in the last
    `config.control_blocks` up blocks attends to the keys and values of the original.
    latents: the original first, each (B, 4, H, W). Yields them after each step.
    """
    for done, (time, below) in enumerate(schedule.pairs(config.steps, level)):
        reference, after = None, []
        for latent in latents:
            noise, _, keys_values = unet(latent, time, text, reference)
            after.append(schedule.step(latent, noise, time, below))
            if len(after) == 1 and done >= config.control_start:
                reference = keys_values[len(keys_values) - config.control_blocks :]
        latents = after
        yield latents
