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

    def check_steps(self, steps: int) -> None:
        """Raise ValueError for more denoising steps than the schedule has."""
        most = self.num_train_timesteps - self.steps_offset
        possible = 0 < steps <= self.num_train_timesteps
        if not possible or self.timestep(steps, steps) >= self.num_train_timesteps:
            raise ValueError(f"steps must be 1 to {most}, got {steps}")

    def timestep(self, level: int, steps: int) -> int:
        """Timestep of a level: of 50 steps, 981 at level 50, 1 at level 1, -19, noise-free, at level 0."""
        return self.num_train_timesteps // steps * (level - 1) + self.steps_offset

    def step(self, latent: Tensor, noise: Tensor, start: int, end: int) -> Tensor:
        """Take a latent from one noise level to another (DDIM eq. 12 with sigma = 0).

            x_end = sqrt(a_end) (x_start - sqrt(1 - a_start) eps) / sqrt(a_start) + sqrt(1 - a_end) eps

        start, end: timesteps. Computes in float32 or wider; returns the latent's dtype.
        """
        a_start = self.alpha(start)
        a_end = self.alpha(end)
        exact = torch.promote_types(latent.dtype, torch.float32)
        eps = noise.to(exact)
        clean = (latent.to(exact) - (1 - a_start).sqrt() * eps) / a_start.sqrt()
        return (a_end.sqrt() * clean + (1 - a_end).sqrt() * eps).to(latent.dtype)

    def add_noise(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """sqrt(a) z_0 + sqrt(1 - a) eps (DDPM eq. 4). clean, noise: (B, C, H, W). timestep: (B,)."""
        alpha = self.alphas_cumprod.to(clean)[timestep.to(clean.device)].reshape(-1, 1, 1, 1)
        return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise


@dataclass(frozen=True)
class Denoiser:
    """A UNet with its schedule, its prompt, and its number of steps: all that a method needs.

    A level counts the denoising steps that are left: 0 is the finished latent, `steps` pure noise.
    """

    unet: NoisePredictor
    schedule: Schedule
    text: Tensor  # (B, 77, C)
    steps: int  # DDIM steps from noise to image

    def __call__(
        self, latent: Tensor, level: int, keys_values: KeysValues | None = None
    ) -> tuple[Tensor, list[Tensor], KeysValues]:
        """Predict the noise in a latent (B, 4, H, W) at a level; returns features, keys and values too."""
        return self.unet(latent, self.schedule.timestep(level, self.steps), self.text, keys_values)

    def step(self, latent: Tensor, noise: Tensor, start: int, end: int) -> Tensor:
        """Take a latent from one level to another, up or down."""
        times = (self.schedule.timestep(level, self.steps) for level in (start, end))
        return self.schedule.step(latent, noise, *times)


@torch.no_grad()  # not inference_mode: the drag optimizes one of these latents
def invert(denoiser: Denoiser, latent: Tensor, levels: int) -> Iterator[Tensor]:
    """DDIM inversion (section 3.3): take a clean latent (B, 4, H, W) up to level `levels`.

    Yields the latent of each level. The UNet is called at the level that a step leads to, as in the denoising
    step that it undoes.
    """
    for level in range(1, levels + 1):
        noise, _, _ = denoiser(latent, level)
        latent = denoiser.step(latent, noise, level - 1, level)
        yield latent


@torch.no_grad()
def denoise(
    denoiser: Denoiser, latents: list[Tensor], top: int, config: EditConfig
) -> Iterator[list[Tensor]]:
    """Denoise an original and its edits from level `top` down (section 3.4).

    Reference-latent-control: from step `config.control_start` on, the self-attention of the edits in the last
    `config.control_blocks` up blocks reads the keys and values of the original (MasaCtrl, arXiv 2304.08465).
    latents: the original first, each (B, 4, H, W). Yields all latents of each level.
    """
    original, *edits = latents
    for level in range(top, 0, -1):
        noise, _, keys_values = denoiser(original, level)
        original = denoiser.step(original, noise, level, level - 1)
        controlled = top - level >= config.control_start
        reference = keys_values[len(keys_values) - config.control_blocks :] if controlled else None
        for i, edit in enumerate(edits):
            noise, _, _ = denoiser(edit, level, reference)
            edits[i] = denoiser.step(edit, noise, level, level - 1)
        yield [original, *edits]


def guided(unet: NoisePredictor, negative: Tensor, guidance: float) -> NoisePredictor:
    """A UNet with classifier-free guidance (arXiv 2207.12598), called like the UNet.

        eps(negative) + guidance (eps(text) - eps(negative))

    negative: (B, 77, C), the encoded negative prompt or "". Features, keys, and values have batch 2 B.
    """

    def predict(latent: Tensor, timestep: int | Tensor, text: Tensor, keys_values: KeysValues | None = None):
        doubled = torch.cat([latent, latent])  # (B, C, H, W) -> (2 B, C, H, W)
        noise, features, used = unet(doubled, timestep, torch.cat([negative, text]), keys_values)
        without, with_text = noise.chunk(2)  # (2 B, C, H, W) -> twice (B, C, H, W)
        return without + guidance * (with_text - without), features, used

    return predict
