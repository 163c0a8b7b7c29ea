"""LoRA (arXiv 2106.09685), W' = W + alpha / rank * up @ down, trained on the image to be edited."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from minidrag.config import EditConfig
from minidrag.method.ddim import NoisePredictor, Schedule

PROJECTIONS = (".to_q", ".to_k", ".to_v", ".to_out.0")  # of every attention module, self and cross
TARGETS = {"qk": PROJECTIONS[:2], "qkv": PROJECTIONS[:3], "qkvo": PROJECTIONS}
# Half precision flushes the gradient of a mean over a whole latent to zero. Scaling the loss by a power of
# two before the backward pass and the gradient by its inverse prevents that, and changes no bit of float32.
LOSS_SCALE = 4096.0
Moments = tuple[Tensor, Tensor]  # mean and standard deviation of a latent, each (1, 4, H, W)


class Factors(NamedTuple):
    """Addition to one layer, alpha / rank * up @ down."""

    down: Tensor  # (rank, in), of a convolution (rank, in, height, width)
    up: Tensor  # (out, rank), of a convolution (out, rank, 1, 1)
    alpha: float


class LoRA(NamedTuple):
    """Factors by layer path, of the UNet and, in some files, of the text encoder."""

    unet: dict[str, Factors]
    text_encoder: dict[str, Factors]


class LoRALayer(nn.Module):
    """A linear or convolutional layer plus its low-rank addition; the layer itself is not changed."""

    def __init__(self, base: nn.Linear | nn.Conv2d, factors: Factors):
        super().__init__()
        self.base = base
        self.alpha = factors.alpha
        self.scale = factors.alpha / len(factors.down)
        # Float32 or wider whatever the layer has: half precision would lose the small steps of training.
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        down, up = (x.detach().to(base.weight.device, dtype, copy=True) for x in factors[:2])
        self.down = nn.Parameter(down, requires_grad=False)
        self.up = nn.Parameter(up, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight; callers read its device and dtype."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        output = self.base(x)
        x = x.to(self.down.dtype)
        up = self.scale * self.up
        if isinstance(self.base, nn.Conv2d):
            change = F.conv2d(F.conv2d(x, self.down, None, self.base.stride, self.base.padding), up)
        else:
            change = F.linear(F.linear(x, self.down), up)
        return output + change.to(output.dtype)


def target_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Every layer that can have a LoRA, by its path in a model without one."""
    layers = ((path, x) for path, x in model.named_modules() if isinstance(x, (nn.Linear, nn.Conv2d)))
    return {path.removesuffix(".base"): layer for path, layer in layers}


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Every layer that has a LoRA, by its path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALayer)}


def initialize(unet: nn.Module, rank: int, targets: str, rng: Generator) -> LoRA:
    """An untrained LoRA: down ~ N(0, 1 / rank^2), up = 0, alpha = rank, as in the official trainer."""
    entries = {}
    for path, layer in target_layers(unet).items():
        if path.endswith(TARGETS[targets]):
            out, inside = layer.weight.shape
            down = torch.randn(rank, inside, generator=rng) / rank
            entries[path] = Factors(down, torch.zeros(out, rank), rank)
    return LoRA(entries, {})


def check_fit(lora: LoRA, unet: nn.Module, text_encoder: nn.Module | None) -> None:
    """Raise ValueError, naming the first few layers, for a LoRA that does not fit its networks."""
    parts = (("UNet", unet, lora.unet), ("text encoder", text_encoder or nn.Module(), lora.text_encoder))
    for name, model, entries in parts:
        layers = target_layers(model)
        wrong = []
        for path, (down, up, _) in entries.items():
            if path not in layers:
                wrong.append(f"layer {path} does not exist")
                continue
            out, *inside = layers[path].weight.shape
            rank = len(down)
            ones = [1] * (len(inside) - 1)
            if [*down.shape] != [rank, *inside] or [*up.shape] != [out, rank, *ones]:
                wrong.append(f"{path} is {[out, *inside]}, not {[*up.shape]} times {[*down.shape]}")
        if wrong:
            more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError(f"the LoRA does not fit the {name}: {', '.join(wrong[:3])}{more}")


@contextmanager
def lora_attached(unet: nn.Module, text_encoder: nn.Module, lora: LoRA) -> Iterator[None]:
    """Attach a LoRA, frozen, within a context.

    Raises ValueError for a LoRA that does not fit, and for networks that have one already.
    """
    if lora_layers(unet) or lora_layers(text_encoder):
        raise ValueError("the model has a LoRA already: detach it first")
    check_fit(lora, unet, text_encoder)
    pairs = (unet, lora.unet), (text_encoder, lora.text_encoder)
    try:
        for model, entries in pairs:
            layers = target_layers(model)
            for path, factors in entries.items():
                set_layer(model, path, LoRALayer(layers[path], factors))
        yield
    finally:
        for model, _ in pairs:
            for path, layer in lora_layers(model).items():
                set_layer(model, path, layer.base)


def set_layer(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Replace the layer at a path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


def extract(unet: nn.Module) -> LoRA:
    """Copy the LoRA that a UNet has to the CPU."""
    entries = {}
    for path, layer in lora_layers(unet).items():
        down, up = (x.detach().to("cpu", copy=True) for x in (layer.down, layer.up))
        entries[path] = Factors(down, up, layer.alpha)
    return LoRA(entries, {})


@torch.enable_grad()
def train(
    unet: nn.Module, schedule: Schedule, moments: Moments, text: Tensor, config: EditConfig, rng: Generator
) -> Iterator[float]:
    """Identity-preserving fine-tuning (section 3.2): train the LoRA that the UNet has on one image.

    text: (1, 77, C). rng: on the CPU, so that a seed means the same on every device. Yields the losses.
    """
    layers = lora_layers(unet).values()
    downs = [layer.down.requires_grad_() for layer in layers]
    ups = [layer.up.requires_grad_() for layer in layers]
    rates = {"params": downs}, {"params": ups, "lr": config.lora_lr_ratio * config.lora_lr}
    optimizer = torch.optim.AdamW(rates, lr=config.lora_lr, weight_decay=0.01)  # as in the official trainer
    for _ in range(config.lora_steps):
        latent, timestep, noise = sample_batch(schedule, moments, config.lora_batch, rng)
        loss = noise_loss(unet, schedule, latent, timestep, noise, text.detach())
        gradients = torch.autograd.grad(loss * LOSS_SCALE, downs + ups)
        for parameter, gradient in zip(downs + ups, gradients, strict=True):
            parameter.grad = gradient / LOSS_SCALE
        optimizer.step()
        yield loss.item()


def sample_batch(schedule: Schedule, moments: Moments, batch: int, rng: Generator) -> tuple[Tensor, ...]:
    """Draw latents of the image (B, 4, H, W), timesteps (B,), and noise (B, 4, H, W)."""
    mean, std = (x.detach().to(torch.promote_types(x.dtype, torch.float32)) for x in moments)
    shape = (batch, *mean.shape[1:])
    latent = mean + std * torch.randn(shape, generator=rng).to(mean)
    timestep = torch.randint(schedule.num_train_timesteps, (batch,), generator=rng)
    return latent, timestep, torch.randn(shape, generator=rng).to(mean)


def noise_loss(
    unet: NoisePredictor, schedule: Schedule, latent: Tensor, timestep: Tensor, noise: Tensor, text: Tensor
) -> Tensor:
    """Fine-tuning loss of eq. 2, the mean squared error of the predicted noise.

        L_ft(z, dtheta) = E_{eps, t} || eps - eps_{theta + dtheta}(alpha_t z + sigma_t eps) ||_2^2

    latent, noise: (B, 4, H, W). timestep: (B,). text: (1, 77, C). Computed in the dtype of the noise.
    """
    noisy = schedule.add_noise(latent, noise, timestep).to(text.dtype)
    predicted, _, _ = unet(noisy, timestep, text.expand(len(latent), -1, -1))
    return F.mse_loss(predicted.to(noise.dtype), noise)
