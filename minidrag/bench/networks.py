"""Time and peak memory of the networks beside diffusers and transformers, in one run with the same weights.

Every task runs on both sides by turns, and the median of the runs counts, so that a change of the machine's
pace meets both. Weights are random and shared: what is measured does not depend on their values.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minidrag.networks.clip import CLIPConfig, CLIPTextEncoder
from minidrag.networks.unet import UNet, UNetConfig
from minidrag.networks.vae import VAE, VAEConfig

SIDES = ("minidrag", "reference")


@dataclass(frozen=True)
class Sizes:
    """What is measured: widths of the networks, side of the latent; the defaults are SD 1.5 at 512x512."""

    unet_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    vae_channels: tuple[int, ...] = (128, 256, 512, 512)
    text_channels: int = 768
    text_layers: int = 12
    latent: int = 64


SMALL = Sizes(
    unet_channels=(64, 96, 128, 160), vae_channels=(32, 64, 64), text_channels=96, text_layers=2, latent=32
)


def build_unet(side: str, sizes: Sizes) -> nn.Module:
    values: dict[str, Any] = {
        "block_out_channels": sizes.unet_channels,
        "cross_attention_dim": sizes.text_channels,
    }
    if side == "minidrag":
        return UNet(UNetConfig.from_json(values))
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(**values)


def build_vae(side: str, sizes: Sizes) -> nn.Module:
    levels = len(sizes.vae_channels)
    values: dict[str, Any] = {"block_out_channels": sizes.vae_channels, "layers_per_block": 2}
    if side == "minidrag":
        return VAE(VAEConfig.from_json(values))
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    values |= {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    return AutoencoderKL(**values)


def build_text(side: str, sizes: Sizes) -> nn.Module:
    values: dict[str, Any] = {
        "hidden_size": sizes.text_channels,
        "intermediate_size": 4 * sizes.text_channels,
        "num_hidden_layers": sizes.text_layers,
        "num_attention_heads": 12,
        "vocab_size": 49408,
        "hidden_act": "quick_gelu",
    }
    if side == "minidrag":
        return CLIPTextEncoder(CLIPConfig.from_json(values))
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**values))


BUILDERS = {"unet": build_unet, "vae": build_vae, "text": build_text}


def build(network: str, side: str, sizes: Sizes, device: str, dtype: torch.dtype) -> nn.Module:
    """A network with seeded random weights, made on the meta device so that no other copy ever exists."""
    with torch.device("meta"):
        module = BUILDERS[network](side, sizes).eval().requires_grad_(False)
    nn.Module.to(module, dtype).to_empty(device=device)  # the plain one: diffusers' own `to` warns
    torch.manual_seed(0)
    for name, weight in module.named_parameters():
        middle = float(weight.ndim == 1 and name.endswith("weight"))
        weight.normal_(middle, 0.1 if weight.ndim == 1 else weight[0].numel() ** -0.5)
    for _, buffer in module.named_buffers():  # CLIP's position_ids
        buffer.copy_(torch.arange(buffer.shape[-1], device=device).expand_as(buffer))
    return module


def share_weights(ours: nn.Module, reference: nn.Module) -> None:
    """Lets ours use the reference's tensors themselves: one copy in memory, and the same bits."""
    tensors = {name: tensor for name, tensor in reference.state_dict().items() if "position_ids" not in name}
    if isinstance(ours, CLIPTextEncoder):  # transformers dropped the prefix in 5.6
        tensors = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in tensors.items()}
    ours.load_state_dict(tensors, strict=True, assign=True)
    ours.requires_grad_(False)


@dataclass(frozen=True)
class Task:
    """One thing to measure: its network, the inputs' shapes, and the call on either side."""

    name: str
    network: str
    inputs: Callable[[Sizes], list[tuple[int, ...]]]
    minidrag: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    backward: bool = False


class Row(NamedTuple):
    """A line of the table: per side the median seconds and the peak MiB; how far the results are apart."""

    name: str
    seconds: dict[str, float]
    memory: dict[str, float]
    apart: float


def unet_inputs(sizes: Sizes) -> list[tuple[int, ...]]:
    return [(1, 4, sizes.latent, sizes.latent), (1, 77, sizes.text_channels)]


def picture_inputs(sizes: Sizes) -> list[tuple[int, ...]]:
    side = sizes.latent * 2 ** (len(sizes.vae_channels) - 1)
    return [(1, 3, side, side)]


def latent_inputs(sizes: Sizes) -> list[tuple[int, ...]]:
    return [(1, 4, sizes.latent, sizes.latent)]


def prompt(device: torch.device) -> Tensor:
    return torch.arange(77, device=device)[None]


def our_noise(unet: Any, latent: Tensor, text: Tensor) -> Tensor:
    return unet(latent, 681, text).noise


def their_noise(unet: Any, latent: Tensor, text: Tensor) -> Tensor:
    return unet(latent, 681, text).sample


TASKS = [
    Task("UNet forward", "unet", unet_inputs, our_noise, their_noise),
    Task("UNet forward and backward", "unet", unet_inputs, our_noise, their_noise, backward=True),
    Task(
        "VAE encode",
        "vae",
        picture_inputs,
        lambda vae, picture: vae.encode(picture)[0],
        lambda vae, picture: vae.encode(picture).latent_dist.mean * vae.config.scaling_factor,
    ),
    Task(
        "VAE decode",
        "vae",
        latent_inputs,
        lambda vae, latent: vae.decode(latent),
        lambda vae, latent: vae.decode(latent / vae.config.scaling_factor).sample,
    ),
    Task(
        "text encoding",
        "text",
        lambda sizes: [],
        lambda encoder: encoder(prompt(encoder.text_model.final_layer_norm.weight.device)),
        lambda encoder: encoder(prompt(encoder.device)).last_hidden_state,
    ),
]


def step(task: Task, side: str, module: nn.Module, inputs: list[Tensor]) -> Tensor:
    """Runs the task once and waits for its end. Returns the output, or the gradient to the first input."""
    call = task.minidrag if side == "minidrag" else task.reference
    if task.backward:
        latent = inputs[0].clone().requires_grad_(True)
        (result,) = torch.autograd.grad(call(module, latent, *inputs[1:]).square().mean(), latent)
    else:
        with torch.no_grad():
            result = call(module, *inputs)
    if result.is_cuda:
        torch.cuda.synchronize(result.device)
    return result


def random_inputs(task: Task, sizes: Sizes, device: str, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(shape, device=device, dtype=dtype) for shape in task.inputs(sizes)]


def time_task(
    task: Task, modules: dict[str, nn.Module], inputs: list[Tensor], runs: int
) -> tuple[dict[str, float], float]:
    """Median seconds per side, and the largest difference between what the sides returned at warm-up."""
    ours, reference = (step(task, side, modules[side], inputs) for side in SIDES)
    apart = (ours.float() - reference.float()).abs().max().item()
    del ours, reference
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for run in range(runs):
        for side in SIDES if run % 2 == 0 else reversed(SIDES):  # neither is always the first
            start = time.perf_counter()
            step(task, side, modules[side], inputs)
            seconds[side].append(time.perf_counter() - start)
    return {side: statistics.median(taken) for side, taken in seconds.items()}, apart


def cuda_memory(task: Task, side: str, module: nn.Module, inputs: list[Tensor]) -> float:
    """Peak MiB that one step needs, weights included."""
    device = next(module.parameters()).device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    step(task, side, module, inputs)
    return torch.cuda.max_memory_allocated(device) / 2**20


def cpu_memory(index: int, side: str, sizes: Sizes, dtype: torch.dtype, threads: int) -> float:
    """Peak MiB of this process beyond its imports; meant for a process of its own, since a peak never falls.

    Both sides import the same libraries first, so that those weigh on neither.
    """
    import resource

    torch.set_num_threads(threads)
    warnings.simplefilter("ignore", FutureWarning)
    task, unit = TASKS[index], 2**20 if sys.platform == "darwin" else 2**10
    for kind in BUILDERS.values():
        with torch.device("meta"):
            kind("reference", SMALL)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    module = build(task.network, side, sizes, "cpu", dtype)
    step(task, side, module, random_inputs(task, sizes, "cpu", dtype))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit


def measure_cpu_memory(sizes: Sizes, dtype: torch.dtype) -> list[dict[str, float]]:
    """One fresh process per task and side; done first, because a child inherits this process' peak so far."""
    peaks = []
    for index, task in enumerate(TASKS):
        peaks.append({})
        for side in SIDES:
            print(f"measuring the memory of {task.name}, {side}", file=sys.stderr)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                job = pool.submit(cpu_memory, index, side, sizes, dtype, torch.get_num_threads())
                peaks[-1][side] = job.result()
    return peaks


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Every task's measurements, each as soon as it has been made."""
    sizes, dtype = SMALL if args.small else Sizes(), getattr(torch, args.dtype)
    on_cuda = torch.device(args.device).type == "cuda"
    memory = [] if on_cuda else measure_cpu_memory(sizes, dtype)
    modules: dict[str, nn.Module] = {}
    network = ""
    for index, task in enumerate(TASKS):
        if task.network != network:
            network = task.network
            modules.clear()  # free one network before the next
            modules["reference"] = build(network, "reference", sizes, args.device, dtype)
            with torch.device("meta"):
                modules["minidrag"] = BUILDERS[network]("minidrag", sizes).eval()
            share_weights(modules["minidrag"], modules["reference"])
        inputs = random_inputs(task, sizes, args.device, dtype)
        seconds, apart = time_task(task, modules, inputs, args.runs)
        if on_cuda:
            memory.append({side: cuda_memory(task, side, modules[side], inputs) for side in SIDES})
        yield Row(task.name, seconds, memory[index], apart)


def print_table(rows: Iterable[Row]) -> None:
    for number, row in enumerate(rows):
        if number == 0:  # not before: the first row is long in coming
            print(f"{'':26} {'seconds':^26}   {'peak MiB':^26}   largest")
            print(f"{'':26}" + 2 * f" {'minidrag':>9} {'reference':>9} {'ratio':>6}  " + " difference")
        line = f"{row.name:26}"
        for values, form in ((row.seconds, "9.4f"), (row.memory, "9.0f")):
            ours, reference = (values[side] for side in SIDES)
            line += f" {ours:{form}} {reference:{form}} {ours / reference:6.3f}  "
        print(f"{line} {row.apart:10.1e}", flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--device", default=default, help=f"cpu, cuda, cuda:1 (here: {default})")
    parser.add_argument("--runs", type=int, default=5, help="timed runs per task and side (5)")
    parser.add_argument("--small", action="store_true", help="small networks, to see that it works")


def run(args: argparse.Namespace) -> int:
    warnings.simplefilter("ignore", FutureWarning)  # diffusers' own, about its insides
    try:
        import diffusers
        import transformers
    except ImportError:
        print(
            "networks compares with diffusers and transformers, which are not installed: "
            "pip install 'minidrag[bench]'.",
            file=sys.stderr,
        )
        return 2
    if args.runs < 1:
        print("--runs must be at least 1.", file=sys.stderr)
        return 2
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"--device {args.device}: this torch sees no CUDA device.", file=sys.stderr)
        return 2
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    print(f"{versions}, transformers {transformers.__version__}")
    size = "small networks" if args.small else "SD 1.5, latent 64x64, picture 512x512"
    threads = "" if args.device.startswith("cuda") else f", {torch.get_num_threads()} threads"
    print(f"{size}; {args.dtype} on {args.device}{threads}; median of {args.runs}")
    print_table(measure(args))
    return 0
