"""Exercises on noise: the DDIM step, inversion, the LoRA layer, and its loss."""

from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from minidrag.course.exercise import Exercise, Function, Inputs, Slip, normal, whole
from minidrag.method.ddim import Denoiser, NoisePredictor, Schedule, invert
from minidrag.method.lora import Factors, LoRALayer, noise_loss
from minidrag.networks.unet import KeysValues, UNetOutput

# Bound here, so that a slip still has the project's own while another function is in its place.
step = Schedule.step
lora_forward = LoRALayer.forward


def toy_unet(rng: Generator) -> NoisePredictor:
    """A function called like a UNet, with features from which gradients lead to the latent."""
    mix = normal(rng, 4, 4)  # channels to channels
    taps = normal(rng, 4, 6, 4)  # per up block: channels to features

    def unet(
        latent: Tensor, timestep: int | Tensor, text: Tensor, keys_values: KeysValues | None = None, /
    ) -> UNetOutput:
        time = torch.as_tensor(timestep).expand(len(latent)).to(latent) / 300
        bias = time + text.mean((1, 2))  # (B,)
        noise = torch.tanh(torch.einsum("oc,bchw->bohw", mix, latent) + bias[:, None, None, None])
        features = [torch.sin(torch.einsum("oc,bchw->bohw", tap, latent + noise)) for tap in taps]
        return UNetOutput(noise, features, [])

    return unet


def toy_denoiser(rng: Generator, steps: int) -> Denoiser:
    return Denoiser(toy_unet(rng), Schedule(), normal(rng, 1, 7, 5), steps)


def step_inputs(rng: Generator) -> list[Inputs]:
    time = 1 + 20 * whole(rng, 10, 48)
    return [
        {
            "schedule": Schedule(),
            "latent": normal(rng, 1, 4, 5, 7, grad=True),
            "noise": normal(rng, 1, 4, 5, 7, grad=True),
            "start": start,
            "end": end,
        }
        for start, end in ((time, time - 20), (time, time + 20), (1, -19))
    ]


def unrooted(schedule: Schedule, latent: Tensor, noise: Tensor, start: int, end: int) -> Tensor:
    a_start = schedule.alpha(start)
    a_end = schedule.alpha(end)
    return a_end * (latent - (1 - a_start) * noise) / a_start + (1 - a_end) * noise


def noise_added(schedule: Schedule, latent: Tensor, noise: Tensor, start: int, end: int) -> Tensor:
    a_start = schedule.alpha(start)
    a_end = schedule.alpha(end)
    clean = (latent + (1 - a_start).sqrt() * noise) / a_start.sqrt()
    return a_end.sqrt() * clean + (1 - a_end).sqrt() * noise


def noise_left_out(schedule: Schedule, latent: Tensor, noise: Tensor, start: int, end: int) -> Tensor:
    return step(schedule, latent, noise, start, end) - (1 - schedule.alpha(end)).sqrt() * noise


class Unclamped(Schedule):
    """A schedule that takes a negative timestep for an index from the end of the table."""

    def alpha(self, timestep: int) -> Tensor:
        return self.alphas_cumprod[timestep]


DDIM_STEP = Exercise(
    "ddim_step",
    step,
    step_inputs,
    (
        Slip(
            "start and end swapped",
            "The level that the latent has is `start`, the one to reach is `end`.",
            lambda schedule, latent, noise, start, end: step(schedule, latent, noise, end, start),
        ),
        Slip(
            "square roots left out",
            "alpha-bar is a variance: amplitudes are its square root.",
            unrooted,
        ),
        Slip(
            "noise added where it is taken away",
            "The clean latent is what remains after subtracting the noise.",
            noise_added,
        ),
        Slip(
            "no noise put back",
            "The clean latent is only halfway: mix it with noise again, at the level `end`.",
            noise_left_out,
        ),
        Slip(
            "a negative timestep used as an index",
            "Python counts a negative index from the end of the table; schedule.alpha(t) does not.",
            lambda schedule, *rest: step(Unclamped(**asdict(schedule)), *rest),
        ),
    ),
    ("minidrag.method.ddim.Schedule.step",),
)


def inversion_inputs(rng: Generator) -> list[Inputs]:
    steps = whole(rng, 8, 12)
    return [
        {"denoiser": toy_denoiser(rng, steps), "latent": normal(rng, 1, 4, 3, 5), "levels": levels}
        for levels in (steps - 3, steps - 2)
    ]


def inversion_by(move: Callable[[int, int], tuple[int, int, int]]) -> Function:
    """An inversion by wrong moves.

    move: from the number of a step, from 1, and of levels to the level at which the UNet is called, and the
    levels from which and to which the step leads.
    """

    @torch.no_grad()
    def walk(denoiser: Denoiser, latent: Tensor, levels: int) -> Iterator[Tensor]:
        for number in range(1, levels + 1):
            level, start, end = move(number, levels)
            noise, _, _ = denoiser(latent, level)
            latent = denoiser.step(latent, noise, start, end)
            yield latent

    return walk


def clean_first(denoiser: Denoiser, latent: Tensor, levels: int) -> Iterator[Tensor]:
    yield latent
    yield from invert(denoiser, latent, levels)


INVERSION = Exercise(
    "inversion",
    invert,
    inversion_inputs,
    (
        Slip(
            "levels from the top down",
            "Denoising begins at the noisiest level; inversion begins at the clean end.",
            inversion_by(lambda i, levels: (levels + 1 - i, levels - i, levels + 1 - i)),
        ),
        Slip(
            "steps lead down",
            "Inversion goes from the lower level to the higher one, and makes the latent noisier.",
            inversion_by(lambda i, levels: (i, i, i - 1)),
        ),
        Slip(
            "UNet called at the level below",
            "Call the UNet at the level that the step leads to, as in the denoising step that it undoes.",
            inversion_by(lambda i, levels: (i - 1, i - 1, i)),
        ),
        Slip(
            "one level too few",
            "The last step leads to `levels`: range(1, levels) ends one below it.",
            lambda denoiser, latent, levels: invert(denoiser, latent, levels - 1),
        ),
        Slip(
            "clean latent yielded too",
            "Yield the latent after each step: the first one is already noisier than the clean one.",
            clean_first,
        ),
    ),
    ("minidrag.edit.invert", "minidrag.method.ddim.invert"),
    returns=("latent",),
)


def lora_forward_inputs(rng: Generator) -> list[Inputs]:
    calls: list[Inputs] = []
    for rank, bias, shape in ((3, True, (2, 5)), (2, False, (7,))):
        base = nn.Linear(6, 6, bias).double().requires_grad_(False)
        for parameter in base.parameters():
            parameter.copy_(normal(rng, *parameter.shape))
        factors = Factors(normal(rng, rank, 6), normal(rng, 6, rank), alpha=0.5 + whole(rng, 0, 3))
        layer = LoRALayer(base, factors).requires_grad_(False)
        layer.down.requires_grad_()
        layer.up.requires_grad_()
        calls.append({"layer": layer, "x": normal(rng, *shape, 6, grad=True)})
    return calls


def added(layer: LoRALayer, x: Tensor, scale: float) -> Tensor:
    return layer.base(x) + scale * F.linear(F.linear(x, layer.down), layer.up)


LORA_FORWARD = Exercise(
    "lora_forward",
    lora_forward,
    lora_forward_inputs,
    (
        Slip(
            "scale left out",
            "The addition is multiplied by alpha / rank.",
            lambda layer, x: added(layer, x, 1.0),
        ),
        Slip(
            "scaled by alpha alone",
            "Divide alpha by the rank, so that a larger rank does not make a larger addition.",
            lambda layer, x: added(layer, x, layer.alpha),
        ),
        Slip(
            "base layer left out",
            "The LoRA is added to what the layer gave before.",
            lambda layer, x: added(layer, x, layer.scale) - layer.base(x),
        ),
        Slip(
            "up and down swapped",
            "x goes through `down` first, to rank numbers, and through `up` back.",
            lambda layer, x: layer.base(x) + layer.scale * F.linear(F.linear(x, layer.up.T), layer.down.T),
        ),
        Slip(
            "no gradient to the factors",
            "Training needs the gradients of `down` and `up`: leave out detach and no_grad.",
            lambda layer, x: layer.base(x) + layer.scale * F.linear(x, (layer.up @ layer.down).detach()),
        ),
    ),
    ("minidrag.method.lora.LoRALayer.forward",),
)


def noise_loss_inputs(rng: Generator) -> list[Inputs]:
    return [
        {
            "unet": toy_unet(rng),
            "schedule": Schedule(),
            "latent": normal(rng, batch, 4, 3, 5, grad=True),
            "timestep": torch.randint(50, 950, (batch,), generator=rng),
            "noise": normal(rng, batch, 4, 3, 5),
            "text": normal(rng, 1, 7, 5, grad=True),
        }
        for batch in (3, 1)
    ]


def loss_of(
    unet: NoisePredictor, noisy: Tensor, timestep: Tensor, text: Tensor, aim: Tensor, power: int = 2
) -> Tensor:
    predicted, _, _ = unet(noisy.to(text.dtype), timestep, text.expand(len(noisy), -1, -1))
    return (predicted - aim).abs().pow(power).mean()


LORA_LOSS = Exercise(
    "lora_loss",
    noise_loss,
    noise_loss_inputs,
    (
        Slip(
            "no noise added",
            "The UNet gets the noisy latent, not the clean one.",
            lambda unet, schedule, latent, time, noise, text: loss_of(unet, latent, time, text, noise),
        ),
        Slip(
            "latent and noise swapped in the mix",
            "sqrt(a) belongs to the latent and sqrt(1 - a) to the noise.",
            lambda unet, schedule, latent, time, noise, text: loss_of(
                unet, schedule.add_noise(noise, latent, time), time, text, noise
            ),
        ),
        Slip(
            "compared with the latent",
            "This UNet predicts the noise, so the noise is what to compare with.",
            lambda unet, schedule, latent, time, noise, text: loss_of(
                unet, schedule.add_noise(latent, noise, time), time, text, latent
            ),
        ),
        Slip(
            "sum for mean",
            "Take the mean over everything, or the learning rate would depend on the size of the image.",
            lambda *inputs: noise_loss(*inputs) * inputs[4].numel(),
        ),
        Slip(
            "absolute value for square",
            "The loss is the mean of the squared differences.",
            lambda unet, schedule, latent, time, noise, text: loss_of(
                unet, schedule.add_noise(latent, noise, time), time, text, noise, power=1
            ),
        ),
    ),
    ("minidrag.method.lora.noise_loss",),
    returns=("loss",),
)
