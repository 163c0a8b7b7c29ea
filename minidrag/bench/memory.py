"""Count the memory that the stages of an edit need on a device, without one.

    python -m minidrag.bench memory [--dtype float16] [--set size=512 checkpointing=true]

The stages run on fake tensors, which have a shape but no values, and the peak of the bytes alive at once is
printed, weights included. A device's own libraries come on top: CUDA's context, workspaces of convolutions,
gaps in the allocator.
"""

import argparse
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minidrag.bench.harness import add_config_arguments, read_config
from minidrag.config import EditConfig
from minidrag.images import working_size
from minidrag.method import lora
from minidrag.method.ddim import Denoiser, Schedule
from minidrag.method.drag import Cell, Origin, View
from minidrag.method.dragdiffusion import Task, observer, supervisor
from minidrag.networks.clip import CLIPConfig, CLIPTextEncoder
from minidrag.networks.unet import UNet, UNetConfig
from minidrag.networks.vae import VAE, VAEConfig

N = TypeVar("N", bound=nn.Module)
GB = 1e9


class MemoryCounter(TorchDispatchMode):
    """Count the storage of networks and of tensors made within a context.

    alive, peak: bytes now and at most.
    """

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.sizes: dict[int, int] = {}
        for network in networks:
            for weight in network.parameters():
                self.add(weight.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self.add(tensor.untyped_storage())
        return results

    def add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        self.alive -= self.sizes.pop(key)


def peak(job: Callable[[], Any]) -> int:
    """Peak bytes of tensors in a job, which must not read any number."""
    with FakeTensorMode(), MemoryCounter() as counter:
        job()
    return counter.peak


def build(network: Callable[[Any], N], config: Any, dtype: torch.dtype) -> N:
    """A network for inference without values."""
    with torch.device("meta"):
        module = network(config)
    weights = {name: torch.empty(weight.shape, dtype=dtype) for name, weight in module.state_dict().items()}
    module.load_state_dict(weights, assign=True)
    return module.eval().requires_grad_(False)


@dataclass(frozen=True)
class Stages:
    """One step of each stage of an edit, without reading values; each builds its own networks."""

    config: EditConfig
    dtype: torch.dtype
    size: int  # both sides of the working image, in pixels
    unet: UNetConfig = UNetConfig()
    vae: VAEConfig = VAEConfig()
    text: CLIPConfig = CLIPConfig()

    def inputs(self) -> tuple[UNet, Schedule, Tensor, Tensor]:
        side = self.size // self.vae.factor
        text = torch.zeros(1, 77, self.unet.cross_attention_dim, dtype=self.dtype)
        unet = build(UNet, self.unet, self.dtype)
        unet.checkpointing = self.config.checkpointing
        return unet, Schedule(), torch.zeros(1, 4, side, side), text

    def train(self) -> None:
        """One step of `lora.train`."""
        unet, schedule, mean, text = self.inputs()
        config = self.config
        generator = torch.Generator()
        untrained = lora.initialize(unet, config.lora_rank, config.lora_targets, generator)
        with lora.lora_attached(unet, nn.Module(), untrained):
            factors = [x.requires_grad_() for y in lora.lora_layers(unet).values() for x in (y.down, y.up)]
            latent, timestep, noise = lora.sample_batch(schedule, (mean, mean), config.lora_batch, generator)
            loss = lora.noise_loss(unet, schedule, latent, timestep, noise, text)
            for parameter, gradient in zip(factors, torch.autograd.grad(loss, factors), strict=True):
                parameter.grad = gradient
            torch.optim.AdamW(factors).step()

    def drag(self) -> None:
        """One update of `drag`, with one handle in the middle."""
        unet, schedule, latent, text = self.inputs()
        latent.requires_grad_()
        config = self.config
        grid = self.size // 2, self.size // 2
        middle = self.size // 4
        task = Task([Cell(middle, middle)], [Cell(middle, 0)], torch.zeros(latent.shape[2:]), grid)
        denoiser = Denoiser(unet, schedule, text, config.steps)
        view = observer(denoiser, config.levels, task, config)(latent)
        features, previous = (torch.zeros_like(x) for x in (view.features, view.previous))
        origin = Origin(task.handles, View(features, previous, view.predicted, view.level))
        loss = supervisor(task, config)(view, task.handles, origin)
        (latent.grad,) = torch.autograd.grad(loss, latent)
        torch.optim.Adam([latent]).step()

    @torch.no_grad()
    def denoise(self) -> None:
        """One step of `ddim.denoise`, which includes one of `ddim.invert`."""
        unet, _, latent, text = self.inputs()
        _, _, keys_values = unet(latent, 681, text)
        unet(latent, 681, text, keys_values)

    @torch.no_grad()
    def images(self) -> None:
        """Encode and decode an image with all networks on the device."""
        unet, _, latent, _ = self.inputs()
        vae = build(VAE, self.vae, self.dtype)
        others = build(CLIPTextEncoder, self.text, self.dtype), unet  # alive meanwhile
        vae.encode(torch.zeros(1, 3, self.size, self.size, dtype=self.dtype))
        vae.decode(latent.to(self.dtype))
        del others


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = ("float32", "float16", "bfloat16")
    parser.add_argument("--dtype", choices=kinds, default="float16", help="default: %(default)s")
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    config = read_config(args)
    size = config.size or 512
    if size % 8:
        raise ValueError(f"size must be a multiple of 8, got {size}")
    working_size(size, size, size, 8)
    print(f"Stable Diffusion 1.5 at {size}x{size} in {args.dtype}: peak GB of tensors, weights included")
    stages = Stages(config, getattr(torch, args.dtype), size)
    for name, job in {
        "LoRA": stages.train,
        "inversion, denoising": stages.denoise,
        "drag": stages.drag,
        "encoding, decoding": stages.images,
    }.items():
        print(f"{name:22}{peak(job) / GB:6.2f}", flush=True)
    return 0
