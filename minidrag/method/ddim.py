"""DDIM (arXiv 2010.02502) without added randomness: one move between noise levels serves both directions.

A noise level is a time index of the training schedule: 0 is almost clean, 999 almost pure noise.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

KeysValues = list[list[tuple[Tensor, Tensor]]]  # of each up block
# All that is known here of a UNet: noise, features, keys_values = unet(latent, timestep, text, keys_values)
Predictor = Callable[..., tuple[Tensor, list[Tensor], KeysValues]]
OnStep = Callable[[int, Tensor], None]  # called after every step with their number so far and the new latent
FIXED = {"prediction_type": "epsilon", "trained_betas": None, "rescale_betas_zero_snr": False}


@dataclass(frozen=True)
class Schedule:
    """How much noise each time index means; the defaults are Stable Diffusion 1.5."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"  # even steps in sqrt(beta); "linear": in beta
    num_train_timesteps: int = 1000
    steps_offset: int = 1  # the last step starts at index 1
    set_alpha_to_one: bool = False  # True: the last step ends without any noise, not at index 0

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Schedule":
        """Reads an official `scheduler_config.json`, whichever sampler it names; absent keys mean SD 1.5's.

        Raises ValueError, naming the key, where the model was trained in a way that is not known here.
        """
        for key, fixed in FIXED.items():
            if values.get(key, fixed) != fixed:
                found = f"{key} = {values[key]!r} in the model's scheduler_config.json"
                raise ValueError(f"{found}: minidrag edits with models that have {fixed!r}, as SD 1.5 does")
        if values.get("beta_schedule", cls.beta_schedule) not in ("scaled_linear", "linear"):
            raise ValueError(f"unknown schedule in the scheduler_config.json: {values['beta_schedule']!r}")
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """The signal's share of the variance, alpha-bar of DDPM, per time index: (1000,), float32."""
        power = 0.5 if self.beta_schedule == "scaled_linear" else 1.0
        ends = self.beta_start**power, self.beta_end**power
        betas = torch.linspace(*ends, self.num_train_timesteps, dtype=torch.float32) ** (1 / power)
        return torch.cumprod(1 - betas, dim=0)

    def alpha(self, timestep: int) -> Tensor:
        """The signal's share at one index, 0-d; a negative index is the level of a finished picture."""
        if timestep < 0 and self.set_alpha_to_one:
            return torch.ones(())
        return self.alphas_cumprod[max(timestep, 0)]

    def pairs(self, steps: int) -> list[tuple[int, int]]:
        """Every denoising step as (index, index below), 50 of them (981, 961), ..., (1, -19)."""
        stride = self.num_train_timesteps // max(steps, 1)
        times = [stride * i + self.steps_offset for i in reversed(range(steps))]
        if stride == 0 or not times or times[0] >= self.num_train_timesteps:
            most = self.num_train_timesteps - self.steps_offset
            raise ValueError(f"{steps} steps are not possible: choose 1 to {most}")
        return [(time, time - stride) for time in times]

    def timesteps(self, steps: int) -> list[int]:
        """The index at which each denoising step asks the UNet, noisiest first."""
        return [time for time, _ in self.pairs(steps)]

    def step(self, latent: Tensor, noise: Tensor, start: int, end: int) -> Tensor:
        """Brings a latent from one noise level to another, up or down (DDIM eq. 12 with sigma = 0).

            x_end = sqrt(a_end) (x_start - sqrt(1 - a_start) eps) / sqrt(a_start) + sqrt(1 - a_end) eps

        start, end: time indices, as for `alpha`. Computes in float32 at least, returns the latent's dtype.
        """
        a_start, a_end = self.alpha(start), self.alpha(end)
        exact = torch.promote_types(latent.dtype, torch.float32)
        eps = noise.to(exact)
        clean = (latent.to(exact) - (1 - a_start).sqrt() * eps) / a_start.sqrt()
        return (a_end.sqrt() * clean + (1 - a_end).sqrt() * eps).to(latent.dtype)

    def add_noise(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Mixes noise into clean latents as training does: sqrt(a) z_0 + sqrt(1 - a) eps (DDPM eq. 4).

        clean, noise: (B, C, H, W). timestep: (B,).
        """
        alpha = self.alphas_cumprod.to(clean)[timestep.to(clean.device)].reshape(-1, 1, 1, 1)
        return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise


# no_grad and not inference_mode below: the drag optimises one of these latents afterwards.
@torch.no_grad()
def invert(
    unet: Predictor,
    schedule: Schedule,
    latent: Tensor,
    text: Tensor,
    steps: int,
    count: int,
    on_step: OnStep | None = None,
) -> list[Tensor]:
    """Takes the last `count` of `steps` denoising steps backwards, from a clean latent up into the noise.

    latent: (B, 4, H, W). text: (B, 77, C). Returns count + 1 latents: path[k] is the one after k steps.
    The UNet is asked at the level that a step leads to, where the denoising step that it undoes asks too.
    """
    path = [latent]
    for time, below in reversed(last(schedule.pairs(steps), count)):
        noise, _, _ = unet(path[-1], time, text)
        path.append(schedule.step(path[-1], noise, below, time))
        if on_step:
            on_step(len(path) - 1, path[-1])
    return path


@torch.no_grad()
def denoise(
    unet: Predictor,
    schedule: Schedule,
    latents: list[Tensor],
    text: Tensor,
    steps: int,
    count: int,
    control_start: int = 0,
    control_blocks: int = 2,
    on_step: OnStep | None = None,
) -> list[Tensor]:
    """Takes the last `count` of `steps` denoising steps with one latent, or with an original and its edits.

    latents: the original first, each (B, 4, H, W) and at the level where the first step taken starts.
    From step `control_start` of those taken on, counted from 0, the edits' self-attention in the last
    `control_blocks` up blocks reads the original's keys and values in place of their own (paper section 3.4,
    reference-latent-control).
    Returns the finished latents in the order given; `on_step` is shown the last of them.
    """
    latents = list(latents)
    for done, (time, below) in enumerate(last(schedule.pairs(steps), count)):
        given = None
        for i, latent in enumerate(latents):
            noise, _, keys_values = unet(latent, time, text, given)
            latents[i] = schedule.step(latent, noise, time, below)
            if i == 0 and done >= control_start:
                given = keys_values[len(keys_values) - control_blocks :]
        if on_step:
            on_step(done + 1, latents[-1])
    return latents


def last(pairs: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """The steps nearest to the clean picture."""
    if not 0 <= count <= len(pairs):
        raise ValueError(f"{count} of {len(pairs)} steps are not possible: choose 0 to {len(pairs)}")
    return pairs[len(pairs) - count :]


def guided(unet: Predictor, negative: Tensor, guidance: float) -> Predictor:
    """Wraps a UNet in classifier-free guidance (arXiv 2207.12598); the call stays the same.

        eps = eps(negative) + guidance (eps(text) - eps(negative))

    negative: (B, 77, C), the negative prompt or "". Features, keys and values come with batch 2 B.
    """

    def predict(latent: Tensor, timestep: int, text: Tensor, keys_values: KeysValues | None = None):
        doubled = torch.cat([latent, latent])  # (B, C, H, W) -> (2 B, C, H, W)
        noise, features, used = unet(doubled, timestep, torch.cat([negative, text]), keys_values)
        without, with_text = noise.chunk(2)  # (2 B, C, H, W) -> twice (B, C, H, W)
        return without + guidance * (with_text - without), features, used

    return predict


def sample(
    unet: Predictor,
    schedule: Schedule,
    text: Tensor,
    negative: Tensor,
    shape: tuple[int, ...],
    steps: int = 50,
    guidance: float = 7.5,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Makes a latent of `shape`, (B, 4, H, W), from pure noise under a prompt and against a negative one.

    text, negative: (B, 77, C); the latent has their dtype and device. guidance: 1 ignores `negative`.
    """
    # Drawn where the generator lives, in float32: a seed on the CPU means the same picture everywhere.
    device = generator.device if generator else text.device
    latent = torch.randn(shape, generator=generator, device=device).to(text)
    predict = guided(unet, negative, guidance)
    return denoise(predict, schedule, [latent], text, steps, steps, on_step=on_step)[0]
