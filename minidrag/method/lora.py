"""LoRA (arXiv 2106.09685): a small trainable addition to frozen layers; lora_attached it and training it.

    W' = W + alpha / rank * up @ down

DragDiffusion trains one on the picture to be edited, so that the UNet knows it (paper section 3.2).
A model wears one LoRA at a time. Its files are in `lora_file.py`.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidrag.method.ddim import Predictor, Schedule
from minidrag.networks.layers import Attention

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")  # of every attention module
TARGETS = {"qk": PROJECTIONS[:2], "qkv": PROJECTIONS[:3], "qkvo": PROJECTIONS}
# Half precision would flush the gradients of a mean over a whole latent to zero. A power of two, multiplied
# in before the backward pass and taken out behind it, prevents that and changes no bit of float32.
LOSS_SCALE = 4096.0


class Factors(NamedTuple):
    """The addition to one layer, alpha / rank * up @ down.

    down: (rank, in), for a convolution (rank, in, height, width). up: (out, rank) or (out, rank, 1, 1).
    """

    down: Tensor
    up: Tensor
    alpha: float


@dataclass(frozen=True)
class LoRA:
    """Layer path -> factors, for the UNet and, in some files by others, for the text encoder."""

    unet: dict[str, Factors]
    text_encoder: dict[str, Factors]


class LoRALayer(nn.Module):
    """A linear or convolutional layer with a low-rank addition; the layer itself stays as it is."""

    def __init__(self, base: nn.Linear | nn.Conv2d, factors: Factors):
        super().__init__()
        self.base, self.merged = base, None
        # At least float32, whatever the layer has: half precision would swallow the small steps of training.
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        down, up = (x.detach().to(base.weight.device, dtype, copy=True) for x in factors[:2])
        self.down, self.up = nn.Parameter(down, requires_grad=False), nn.Parameter(up, requires_grad=False)
        self.alpha, self.scale = factors.alpha, factors.alpha / len(down)

    def forward(self, x: Tensor) -> Tensor:
        """Takes and returns what the layer alone does, in the layer's dtype."""
        if self.merged is not None:
            return self.merged(x)
        output, x, up = self.base(x), x.to(self.down.dtype), self.scale * self.up
        if isinstance(self.base, nn.Conv2d):
            change = F.conv2d(F.conv2d(x, self.down, None, self.base.stride, self.base.padding), up)
        else:
            change = F.linear(F.linear(x, self.down), up)
        return output + change.to(output.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        self.merged = copy.deepcopy(self.base).requires_grad_(False)
        change = self.scale * self.up.flatten(1) @ self.down.flatten(1)
        weight = self.base.weight + change.view_as(self.base.weight)
        self.merged.weight.copy_(weight)

    def factors(self) -> Factors:
        """Copies on the CPU."""
        down, up = self.down.detach().to("cpu", copy=True), self.up.detach().to("cpu", copy=True)
        return Factors(down, up, self.alpha)


def target_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Every layer that a LoRA can sit on, by its path without one: under a LoRA it is called `base`."""
    layers = ((path, x) for path, x in model.named_modules() if isinstance(x, (nn.Linear, nn.Conv2d)))
    return {path.removesuffix(".base"): layer for path, layer in layers}


def check(lora: LoRA, unet: nn.Module, text_encoder: nn.Module | None) -> None:
    """Raises ValueError, naming the first few layers, where a LoRA does not fit its models."""
    parts = (("UNet", unet, lora.unet), ("text encoder", text_encoder or nn.Module(), lora.text_encoder))
    for name, model, entries in parts:
        layers, wrong = target_layers(model), []
        for path, (down, up, _) in entries.items():
            if path not in layers:
                wrong.append(f"there is no {path}")
                continue
            out, *inside = layers[path].weight.shape
            rank, ones = len(down), [1] * (len(inside) - 1)
            if [*down.shape] != [rank, *inside] or [*up.shape] != [out, rank, *ones]:
                wrong.append(f"{path} is {[out, *inside]}, not {[*up.shape]} times {[*down.shape]}")
        if wrong:
            more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError(f"this LoRA does not fit the {name}: {', '.join(wrong[:3])}{more}")


def add(unet: nn.Module, rank: int, targets: str, generator: torch.Generator) -> None:
    """Puts an untrained LoRA, which changes nothing yet, on every attention module, self and cross.

    targets: a key of TARGETS. down ~ N(0, 1 / rank^2), up = 0, alpha = rank, as in the official trainer.
    Raises ValueError for a rank below 1 or unknown targets.
    """
    if targets not in TARGETS or rank < 1:
        raise ValueError(f"no LoRA of rank {rank} on {targets!r}: rank from 1, targets {', '.join(TARGETS)}")
    layers, entries = target_layers(unet), {}
    attentions = [path for path, module in unet.named_modules() if isinstance(module, Attention)]
    for path in (f"{attention}.{target}" for attention in attentions for target in TARGETS[targets]):
        out, inside = layers[path].weight.shape
        down = torch.randn(rank, inside, generator=generator) / rank
        entries[path] = Factors(down, torch.zeros(out, rank), rank)
    attach(unet, LoRA(entries, {}))


def attach(unet: nn.Module, lora: LoRA, text_encoder: nn.Module | None = None) -> None:
    """Puts a LoRA on a model, frozen.

    Raises ValueError, with nothing changed, where it does not fit, a LoRA for a text encoder without one
    included, or where the model wears one already.
    """
    models = [model for model in (unet, text_encoder) if model is not None]
    if any(lora_layers(model) for model in models):
        raise ValueError("the model wears a LoRA already: remove it first")
    check(lora, unet, text_encoder)
    for model, entries in zip(models, (lora.unet, lora.text_encoder), strict=False):
        layers = target_layers(model)
        for path, factors in entries.items():
            _replace(model, path, LoRALayer(layers[path], factors))


def remove(model: nn.Module) -> None:
    """Takes the LoRA off a UNet or text encoder, merged or not: the very layers from before are back."""
    for path, layer in lora_layers(model).items():
        _replace(model, path, layer.base)


def merge(model: nn.Module) -> None:
    """Adds the LoRA into copies of the weights: the same results faster, for more memory, not for training.

    The old weights are kept; `extract` and `remove` do what they always do.
    """
    for layer in lora_layers(model).values():
        layer.merge()


def extract(unet: nn.Module, text_encoder: nn.Module | None = None) -> LoRA:
    """Copies the LoRA that a model wears, to the CPU."""
    models = (unet, text_encoder or nn.Module())
    return LoRA(*({path: layer.factors() for path, layer in lora_layers(model).items()} for model in models))


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """What of a model is the LoRA's."""
    return [parameter for layer in lora_layers(model).values() for parameter in (layer.down, layer.up)]


@contextmanager
def trainable(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Within it the LoRA's parameters, which it yields, ask for gradients and no others do."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    chosen = parameters(model)
    for parameter in chosen:
        parameter.requires_grad_(True)
    try:
        yield chosen
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
        for parameter in chosen:
            parameter.grad = None


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALayer)}


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


@torch.enable_grad()
def fit(
    unet: nn.Module,
    schedule: Schedule,
    mean: Tensor,
    std: Tensor,
    text: Tensor,
    *,
    rank: int,
    targets: str,
    steps: int,
    batch: int,
    rate: float,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> LoRA:
    """Identity-preserving fine-tuning: trains a new LoRA on one picture (paper section 3.2, eq. 2).

    mean, std: (1, 4, H, W), from the VAE. text: (1, 77, C), in the UNet's dtype. on_step: called with the
    number of steps done and the loss. A seed means the same numbers on every device. Leaves the LoRA on the
    UNet, frozen, and returns a copy; raises FloatingPointError, and leaves none, for a loss not finite.
    """
    text, generator = text.detach(), torch.Generator().manual_seed(seed)
    add(unet.eval(), rank, targets, generator)
    try:
        with trainable(unet) as chosen:
            optimizer = torch.optim.AdamW(chosen, lr=rate, weight_decay=0.01)  # as in the official trainer
            for done in range(1, steps + 1):
                loss = noise_loss(unet, schedule, *draw(schedule, mean, std, batch, generator), text)
                if not loss.isfinite():
                    raise FloatingPointError(f"LoRA training: the loss is {loss.item()} in step {done}")
                gradients = torch.autograd.grad(loss * LOSS_SCALE, chosen)
                for parameter, gradient in zip(chosen, gradients, strict=True):
                    parameter.grad = gradient / LOSS_SCALE
                optimizer.step()
                if on_step:
                    on_step(done, loss.item())
    except BaseException:
        remove(unet)
        raise
    return extract(unet)


def draw(
    schedule: Schedule, mean: Tensor, std: Tensor, batch: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of the picture (B, 4, H, W), timesteps (B,) and noise (B, 4, H, W), drawn on the CPU."""
    shape, exact = (batch, *mean.shape[1:]), torch.promote_types(mean.dtype, torch.float32)
    mean, std = mean.detach().to(exact), std.detach().to(exact)
    latent = mean + std * torch.randn(shape, generator=generator).to(mean)
    timestep = torch.randint(schedule.num_train_timesteps, (batch,), generator=generator)
    return latent, timestep, torch.randn(shape, generator=generator).to(mean)


def noise_loss(
    unet: Predictor, schedule: Schedule, latent: Tensor, timestep: Tensor, noise: Tensor, text: Tensor
) -> Tensor:
    """Mean square of the UNet's error about the noise, in the latents' dtype (paper eq. 2).

        L_ft(z, dtheta) = E_{eps, t} || eps - eps_{theta + dtheta}(alpha_t z + sigma_t eps) ||_2^2

    latent, noise: (B, 4, H, W). timestep: (B,). text: (1, 77, C).
    """
    noisy = schedule.add_noise(latent, noise, timestep).to(text.dtype)
    predicted, _, _ = unet(noisy, timestep, text.expand(len(latent), -1, -1))
    return F.mse_loss(predicted.to(noise.dtype), noise)
