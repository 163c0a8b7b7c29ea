"""One network out of one safetensors file: what the file holds, whether it fits, and reading it.

The networks bear the official files' names, so that a file is read straight into them: strictly, tensor by
tensor, with nothing drawn at random first. `names.py` has the rules for files that spell names otherwise.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from minidrag.networks.clip import CLIPConfig, CLIPTextEncoder
from minidrag.networks.unet import UNet, UNetConfig
from minidrag.networks.vae import VAE, VAEConfig
from minidrag.weights.keys import UNET, text_keys, unet_keys, vae_keys

Shapes = dict[str, tuple[int, ...]]

NETWORKS = {"unet": UNet, "vae": VAE, "text_encoder": CLIPTextEncoder}
CONFIGS = {"unet": UNetConfig, "vae": VAEConfig, "text_encoder": CLIPConfig}
NAMES = {"unet": unet_keys, "vae": vae_keys, "text_encoder": text_keys}
PICKLES = {".bin", ".ckpt", ".pt", ".pth"}
MASKED = {9: "an inpainting model", 8: "an InstructPix2Pix model"}  # by their UNet's input channels
FOREIGN = {  # by what their tensors' names have in them
    "conditioner.": "an SDXL checkpoint",
    ".label_emb.": "an SDXL checkpoint",
    ".joint_blocks.": "a Stable Diffusion 3 checkpoint",
    "cond_stage_model.model.": "a Stable Diffusion 2.x checkpoint",
    "lora": "a LoRA file",
}


class Part(NamedTuple):
    """A network without values yet and the file that has them.

    names: {name in the network: name in the file}. shapes: of the file's tensors, by the file's names.
    """

    network: nn.Module
    file: Path
    names: dict[str, str]
    shapes: Shapes


def read_shapes(file: Path) -> Shapes:
    """Looks a safetensors file over without reading its tensors; raises ValueError where it is none."""
    convert = f"convert it with `python -m weights_convert safetensors {file} OUT`"
    if file.suffix in PICKLES:
        raise ValueError(f"{file} is a pickle, which could run code when it is read: {convert}")
    with open(file, "rb") as opened:  # also tells a file that may not be read
        start = opened.read(40)
    if start.startswith(b"PK"):
        raise ValueError(
            f"{file} is named safetensors but is a pickle of PyTorch: rename it to .ckpt and {convert}"
        )
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file} is a Git LFS pointer, not the file that it stands for: run `git lfs pull`")
    try:
        with safe_open(file, "pt") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        size = f"{file.stat().st_size:,} bytes"
        raise ValueError(
            f"{file} ({size}) is cut short or no safetensors file: fetch it again ({error})"
        ) from error


def refuse_foreign(shapes: Shapes, file: Path) -> None:
    """Raises ValueError unless the names are those of a whole SD 1.x checkpoint in the original layout."""
    for mark, kind in FOREIGN.items():
        if any(mark in key for key in shapes):
            raise ValueError(f"{file} is {kind}: give a Stable Diffusion 1.x checkpoint or a model's folder")
    if not any(key.startswith(UNET) for key in shapes):
        raise ValueError(
            f"{file} has no tensors named {UNET}*, so it is no whole checkpoint: give a VAE alone as vae=, "
            "and for a network of a model folder give the folder"
        )


def find_part(name: str, file: Path, config: Any) -> Part:
    """Pairs a network with its tensors in a file; raises ValueError where they do not fit."""
    shapes = read_shapes(file)
    names = NAMES[name](shapes)
    with torch.device("meta"):
        network = NETWORKS[name](config)
    if name == "text_encoder":
        # "Clip skip 2" models leave out the last layer in their config.json and sometimes not in the file.
        used, layer = network.state_dict(), "text_model.encoder.layers."
        names = {ours: key for ours, key in names.items() if ours in used or not ours.startswith(layer)}
    part = Part(network, file, names, shapes)
    if name == "unet":
        check_channels(part)
    check(part, name)
    return part


def check_channels(part: Part) -> None:
    channels = part.shapes.get(part.names.get("conv_in.weight", ""), (0, 4))[1]
    if channels in MASKED:
        raise ValueError(
            f"{part.file} is {MASKED[channels]} (its UNet has {channels} input channels): give the base model"
        )


def check(part: Part, name: str) -> None:
    """Raises ValueError, naming some, for tensors that are missing, left over or of another shape."""
    wanted = {ours: tuple(tensor.shape) for ours, tensor in part.network.state_dict().items()}
    found = {ours: part.shapes[key] for ours, key in part.names.items()}
    same = [ours for ours in wanted if ours in found]
    problems = {
        "missing": [ours for ours in wanted if ours not in found],
        "not known": [key for ours, key in part.names.items() if ours not in wanted],
        # Older files hold some linear layers as convolutions of 1x1.
        "of another shape": [
            f"{ours} {list(found[ours])}, not {list(wanted[ours])}"
            for ours in same
            if found[ours] not in (wanted[ours], (*wanted[ours], 1, 1))
        ],
    }
    lines = [
        f"{len(names)} tensors {problem} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for problem, names in problems.items()
        if names
    ]
    if lines:
        raise ValueError(
            f"{part.file} does not fit the {name.replace('_', ' ')}: {'; '.join(lines)}: "
            "it is damaged or belongs to another kind of model"
        )


def fill(part: Part, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Reads a network's tensors from its file onto a device, in a dtype, at most one of them held twice."""
    tensors = {}
    for name, empty in part.network.state_dict().items():
        # Opened anew each time: a file that stays mapped keeps every page that was read through it in memory.
        with safe_open(part.file, "pt") as file:
            tensor = file.get_tensor(part.names[name]).reshape(empty.shape)
            # Always a copy: where a tensor lies in the file decides how sums are rounded.
            tensors[name] = tensor.to(device, dtype, copy=True)
    part.network.load_state_dict(tensors, strict=True, assign=True)
    return part.network.requires_grad_(False)
