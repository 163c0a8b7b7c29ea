"""Exercises on noise: the DDIM step, inversion, the LoRA layer, and its loss."""

import torch
from torch import Generator, Tensor, nn

from minidrag.course.exercise import Exercise, Inputs, Slip, filled, normal, whole
from minidrag.method.ddim import Denoiser, NoisePredictor, Schedule, invert
from minidrag.method.lora import Factors, LoRALayer, noise_loss
from minidrag.networks.unet import KeysValues, UNetOutput


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


DDIM_STEP = Exercise(
    "ddim_step",
    Schedule.step,
    step_inputs,
    (
        Slip(
            "start and end swapped",
            "The level that the latent has is `start`, the one to reach is `end`.",
            {"start: int, end: int": "end: int, start: int"},
        ),
        Slip(
            "square roots left out",
            "alpha-bar is a variance: amplitudes are its square root.",
            {".sqrt()": ""},
        ),
        Slip(
            "noise added where it is taken away",
            "The clean latent is what remains after subtracting the noise.",
            {"latent.to(exact) - ": "latent.to(exact) + "},
        ),
        Slip(
            "no noise put back",
            "The clean latent is only halfway: mix it with noise again, at the level `end`.",
            {" + (1 - a_end).sqrt() * eps": ""},
        ),
        Slip(
            "a negative timestep used as an index",
            "Python counts a negative index from the end of the table; schedule.alpha(t) does not.",
            {"self.alpha(end)": "self.alphas_cumprod[end]"},
        ),
    ),
)


def inversion_inputs(rng: Generator) -> list[Inputs]:
    steps = whole(rng, 8, 12)
    return [
        {"denoiser": toy_denoiser(rng, steps), "latent": normal(rng, 1, 4, 3, 5), "levels": levels}
        for levels in (steps - 3, steps - 2)
    ]


INVERSION = Exercise(
    "inversion",
    invert,
    inversion_inputs,
    (
        Slip(
            "levels from the top down",
            "Denoising begins at the noisiest level; inversion begins at the clean end.",
            {"range(1, levels + 1)": "range(levels, 0, -1)"},
        ),
        Slip(
            "steps lead down",
            "Inversion goes from the lower level to the higher one, and makes the latent noisier.",
            {"level - 1, level)": "level, level - 1)"},
        ),
        Slip(
            "UNet called at the level below",
            "Call the UNet at the level that the step leads to, as in the denoising step that it undoes.",
            {"denoiser(latent, level)": "denoiser(latent, level - 1)"},
        ),
        Slip(
            "one level too few",
            "The last step leads to `levels`: range(1, levels) ends one below it.",
            {"range(1, levels + 1)": "range(1, levels)"},
        ),
        Slip(
            "clean latent yielded too",
            "Yield the latent after each step: the first one is already noisier than the clean one.",
            {"    for level": "    yield latent\n    for level"},
        ),
    ),
    returns=("latent",),
)


def lora_forward_inputs(rng: Generator) -> list[Inputs]:
    calls: list[Inputs] = []
    for rank, bias, shape in ((3, True, (2, 5)), (2, False, (7,))):
        base = filled(nn.Linear(6, 6, bias), rng)
        factors = Factors(normal(rng, rank, 6), normal(rng, 6, rank), alpha=0.5 + whole(rng, 0, 3))
        layer = LoRALayer(base, factors).requires_grad_(False)
        layer.down.requires_grad_()
        layer.up.requires_grad_()
        calls.append({"layer": layer, "x": normal(rng, *shape, 6, grad=True)})
    return calls


LORA_FORWARD = Exercise(
    "lora_forward",
    LoRALayer.forward,
    lora_forward_inputs,
    (
        Slip(
            "scale left out",
            "The addition is multiplied by alpha / rank.",
            {"self.scale * self.up": "self.up"},
        ),
        Slip(
            "scaled by alpha alone",
            "Divide alpha by the rank, so that a larger rank does not make a larger addition.",
            {"self.scale * self.up": "self.alpha * self.up"},
        ),
        Slip(
            "base layer left out",
            "The LoRA is added to what the layer gave before.",
            {"output + change": "change"},
        ),
        Slip(
            "up and down swapped",
            "x goes through `down` first, to rank numbers, and through `up` back.",
            {"F.linear(F.linear(x, self.down), up)": "F.linear(F.linear(x, up.T), self.down.T)"},
        ),
        Slip(
            "no gradient to the factors",
            "Training needs the gradients of `down` and `up`: leave out detach and no_grad.",
            {"F.linear(F.linear(x, self.down), up)": "F.linear(x, (up @ self.down).detach())"},
        ),
    ),
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


LORA_LOSS = Exercise(
    "lora_loss",
    noise_loss,
    noise_loss_inputs,
    (
        Slip(
            "no noise added",
            "The UNet gets the noisy latent, not the clean one.",
            {"schedule.add_noise(latent, noise, timestep)": "latent"},
        ),
        Slip(
            "latent and noise swapped in the mix",
            "sqrt(a) belongs to the latent and sqrt(1 - a) to the noise.",
            {"add_noise(latent, noise": "add_noise(noise, latent"},
        ),
        Slip(
            "compared with the latent",
            "This UNet predicts the noise, so the noise is what to compare with.",
            {".to(noise.dtype), noise)": ".to(noise.dtype), latent)"},
        ),
        Slip(
            "sum for mean",
            "Take the mean over everything, or the learning rate would depend on the size of the image.",
            {".to(noise.dtype), noise)": '.to(noise.dtype), noise, reduction="sum")'},
        ),
        Slip(
            "absolute value for square",
            "The loss is the mean of the squared differences.",
            {"mse_loss": "l1_loss"},
        ),
    ),
    returns=("loss",),
)
