"""Compare the networks' speed and peak memory with diffusers and transformers, with the same weights.

The two sides alternate, so that a change in machine speed affects both, and the median run is reported.
Weights are random: neither speed nor memory depends on their values. Memory is that of the tensors alive at
once.
"""

import argparse
import importlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minidrag.bench.memory import MemoryCounter
from minidrag.networks.clip import CLIPConfig
from minidrag.networks.unet import UNetConfig
from minidrag.networks.vae import VAEConfig
from minidrag.weights.checkpoint import KEYS, NETWORKS
from minidrag.weights.device import check_device

SIDES = ("minidrag", "reference")
REFERENCES = "minidrag.bench.references"


@dataclass(frozen=True)
class Sizes:
    """Configurations of the networks. Defaults: SD 1.5 at 512x512."""

    unet: UNetConfig = UNetConfig()
    vae: VAEConfig = VAEConfig()
    text_encoder: CLIPConfig = CLIPConfig()


SMALL = Sizes(
    UNetConfig(block_out_channels=(64, 96, 128, 160), cross_attention_dim=96, sample_size=32),
    VAEConfig(block_out_channels=(32, 64, 64)),
    CLIPConfig(hidden_size=96, intermediate_size=384, num_hidden_layers=2),
)


def create(network: str, side: str, sizes: Sizes) -> nn.Module:
    """A network without values, on the meta device."""
    # References are imported only here: the other subcommands work without their libraries.
    builders = NETWORKS if side == "minidrag" else importlib.import_module(REFERENCES).BUILDERS
    with torch.device("meta"):
        return builders[network](getattr(sizes, network)).eval().requires_grad_(False)


def build(network: str, side: str, sizes: Sizes, device: str, dtype: torch.dtype) -> nn.Module:
    """Build a network with seeded random weights, of which there is never a second copy."""
    module = create(network, side, sizes)
    nn.Module.to(module, dtype).to_empty(device=device)  # diffusers overrides `to` with one that warns
    torch.manual_seed(0)
    for name, weight in module.named_parameters():
        mean = float(weight.ndim == 1 and name.endswith("weight"))
        weight.normal_(mean, 0.1 if weight.ndim == 1 else weight[0].numel() ** -0.5)
    for _, buffer in module.named_buffers():  # CLIP's position_ids
        buffer.copy_(torch.arange(buffer.shape[-1], device=device).expand_as(buffer))
    return module


def share_weights(network: str, ours: nn.Module, reference: nn.Module) -> None:
    """Make `ours` use the reference's tensors without a copy."""
    tensors = reference.state_dict()
    keys = KEYS[network](tensors)
    ours.load_state_dict({name: tensors[key] for name, key in keys.items()}, strict=True, assign=True)
    ours.requires_grad_(False)


@dataclass(frozen=True)
class Workload:
    """A forward or backward pass to measure."""

    name: str
    network: str
    inputs: Callable[[Sizes], list[tuple[int, ...]]]  # shapes
    minidrag: Callable[..., Tensor]  # (module, *inputs) -> output
    reference: Callable[..., Tensor]
    backward: bool = False


class Comparison(NamedTuple):
    """Measurements of one workload."""

    name: str
    seconds: dict[str, float]  # median by side
    memory: dict[str, float]  # peak MiB by side
    difference: float  # largest absolute difference between the outputs


def unet_inputs(sizes: Sizes) -> list[tuple[int, ...]]:
    return [*latent_inputs(sizes), (1, 77, sizes.text_encoder.hidden_size)]


def image_inputs(sizes: Sizes) -> list[tuple[int, ...]]:
    side = sizes.unet.sample_size * sizes.vae.factor
    return [(1, 3, side, side)]


def latent_inputs(sizes: Sizes) -> list[tuple[int, ...]]:
    return [(1, 4, sizes.unet.sample_size, sizes.unet.sample_size)]


def token_ids(device: torch.device) -> Tensor:
    return torch.arange(77, device=device)[None]


def our_noise(unet: Any, latent: Tensor, text: Tensor) -> Tensor:
    return unet(latent, 681, text).noise


def reference_noise(unet: Any, latent: Tensor, text: Tensor) -> Tensor:
    return unet(latent, 681, text).sample


WORKLOADS = [
    Workload("UNet forward", "unet", unet_inputs, our_noise, reference_noise),
    Workload("UNet forward and backward", "unet", unet_inputs, our_noise, reference_noise, backward=True),
    Workload(
        "VAE encode",
        "vae",
        image_inputs,
        lambda vae, image: vae.encode(image)[0],
        lambda vae, image: vae.encode(image).latent_dist.mean * vae.config.scaling_factor,
    ),
    Workload(
        "VAE decode",
        "vae",
        latent_inputs,
        lambda vae, latent: vae.decode(latent),
        lambda vae, latent: vae.decode(latent / vae.config.scaling_factor).sample,
    ),
    Workload(
        "text encoding",
        "text_encoder",
        lambda sizes: [],
        lambda encoder: encoder(token_ids(encoder.text_model.final_layer_norm.weight.device)),
        lambda encoder: encoder(token_ids(encoder.device)).last_hidden_state,
    ),
]


def run_once(workload: Workload, side: str, module: nn.Module, inputs: list[Tensor]) -> Tensor:
    """Run a workload once and synchronize. Returns the output, or the gradient of the first input."""
    call = workload.minidrag if side == "minidrag" else workload.reference
    if workload.backward:
        latent = inputs[0].clone().requires_grad_(True)
        (result,) = torch.autograd.grad(call(module, latent, *inputs[1:]).square().mean(), latent)
    else:
        with torch.no_grad():
            result = call(module, *inputs)
    if result.is_cuda:
        torch.cuda.synchronize(result.device)
    return result


def random_inputs(workload: Workload, sizes: Sizes, device: str, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(shape, device=device, dtype=dtype) for shape in workload.inputs(sizes)]


def time_both(
    workload: Workload, modules: dict[str, nn.Module], inputs: list[Tensor], runs: int
) -> tuple[dict[str, float], float]:
    """Median seconds by side, and the largest difference between the outputs of the warm-up run."""
    ours, reference = (run_once(workload, side, modules[side], inputs) for side in SIDES)
    difference = (ours.float() - reference.float()).abs().max().item()
    del ours, reference
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for run in range(runs):
        for side in SIDES if run % 2 == 0 else reversed(SIDES):  # alternate which side goes first
            start = time.perf_counter()
            run_once(workload, side, modules[side], inputs)
            seconds[side].append(time.perf_counter() - start)
    return {side: statistics.median(samples) for side, samples in seconds.items()}, difference


def peak_memory(workload: Workload, side: str, module: nn.Module, inputs: list[Tensor]) -> float:
    """Peak MiB of the tensors of one run, weights included."""
    with MemoryCounter(module) as counter:
        run_once(workload, side, module, inputs)
    return counter.peak / 2**20


def measure(args: argparse.Namespace) -> Iterator[Comparison]:
    """Measure all workloads; yield each comparison as soon as it is complete."""
    sizes = SMALL if args.small else Sizes()
    dtype = getattr(torch, args.dtype)
    modules: dict[str, nn.Module] = {}
    network = ""
    for workload in WORKLOADS:
        if workload.network != network:
            network = workload.network
            modules.clear()  # free the last network first
            modules["reference"] = build(network, "reference", sizes, args.device, dtype)
            modules["minidrag"] = create(network, "minidrag", sizes)
            share_weights(network, modules["minidrag"], modules["reference"])
        inputs = random_inputs(workload, sizes, args.device, dtype)
        seconds, difference = time_both(workload, modules, inputs, args.runs)
        memory = {side: peak_memory(workload, side, modules[side], inputs) for side in SIDES}
        yield Comparison(workload.name, seconds, memory, difference)


def print_table(rows: Iterable[Comparison]) -> None:
    print(f"{'':26} {'seconds':^26}   {'peak MiB':^26}   largest")
    print(f"{'':26}" + 2 * f" {'minidrag':>9} {'reference':>9} {'ratio':>6}  " + " difference")
    for row in rows:
        line = f"{row.name:26}"
        for values, form in ((row.seconds, "9.4f"), (row.memory, "9.0f")):
            ours, reference = (values[side] for side in SIDES)
            line += f" {ours:{form}} {reference:{form}} {ours / reference:6.3f}  "
        print(f"{line} {row.difference:10.1e}", flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--device", default=default, help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="timed runs per workload (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="small networks, for a quick test")


def run(args: argparse.Namespace) -> int:
    warnings.simplefilter("ignore", FutureWarning)  # from inside diffusers
    for library in ("diffusers", "transformers"):
        if find_spec(library) is None:
            raise ValueError(f"{library} is not installed: pip install 'minidrag[bench]'")
    if not 1 <= args.runs <= 1000:
        raise ValueError(f"--runs must be 1 to 1000, got {args.runs}")
    try:
        check_device(args.device)
    except ValueError as error:
        raise ValueError(f"--device: {error}") from None
    print(", ".join(f"{library} {version(library)}" for library in ("torch", "diffusers", "transformers")))
    size = "small networks" if args.small else "SD 1.5, latent 64x64, image 512x512"
    threads = "" if args.device.startswith("cuda") else f", {torch.get_num_threads()} threads"
    print(f"{size}; {args.dtype} on {args.device}{threads}; median of {args.runs} runs")
    print_table(measure(args))
    return 0
