"""One network from one safetensors file: inspect the file, check that it fits, read it.

The networks have the official files' names, so a file is read straight into them: strictly, tensor by tensor,
with no random initialization before. `keys.py` has the rules for files with other names.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from minidrag.networks.clip import CLIPTextEncoder
from minidrag.networks.unet import UNet
from minidrag.networks.vae import VAE
from minidrag.weights.keys import UNET, text_keys, unet_keys, vae_keys

Shapes = dict[str, tuple[int, ...]]

NETWORKS = {"unet": UNet, "vae": VAE, "text_encoder": CLIPTextEncoder}
KEYS = {"unet": unet_keys, "vae": vae_keys, "text_encoder": text_keys}
PICKLES = {".bin", ".ckpt", ".pt", ".pth"}
UNSUPPORTED = {9: "an inpainting model", 8: "an InstructPix2Pix model"}  # by the UNet's input channels
FOREIGN = {  # by a part of a key
    "conditioner.": "an SDXL checkpoint",
    ".label_emb.": "an SDXL checkpoint",
    ".joint_blocks.": "a Stable Diffusion 3 checkpoint",
    "cond_stage_model.model.": "a Stable Diffusion 2.x checkpoint",
    "lora": "a LoRA file",
}


class Part(NamedTuple):
    """A network on the meta device and the file with its tensors."""

    network: nn.Module
    file: Path
    keys: dict[str, str]  # {name in the network: key in the file}
    shapes: Shapes  # by key in the file


def read_shapes(file: Path) -> Shapes:
    """Read the header of a safetensors file; raises ValueError for any other or a damaged file."""
    convert = f"convert it with `python -m weights_convert safetensors {file} OUT`"
    if file.suffix in PICKLES:
        raise ValueError(f"{file} is a pickle, which can run code when it is loaded: {convert}")
    with open(file, "rb") as opened:  # raises OSError for a missing or unreadable file
        start = opened.read(40)
    if start.startswith(b"PK"):
        raise ValueError(f"{file} is a pickle despite its suffix: rename it to .ckpt and {convert}")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull`")
    try:
        with safe_open(file, "pt") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        size = f"{file.stat().st_size:,} bytes"
        raise ValueError(
            f"{file} ({size}) is truncated or not a safetensors file: download it again ({error})"
        ) from error


def refuse_foreign(shapes: Shapes, file: Path) -> None:
    """Raise ValueError unless the keys are those of a complete SD 1.x checkpoint in the original layout."""
    for mark, kind in FOREIGN.items():
        if any(mark in key for key in shapes):
            raise ValueError(f"{file} is {kind}: give a Stable Diffusion 1.x checkpoint or a model folder")
    if not any(key.startswith(UNET) for key in shapes):
        raise ValueError(
            f"{file} has no tensors named {UNET}*, so it is not a complete checkpoint: pass a VAE as vae=, "
            "or instead of the file the folder it belongs to"
        )


def find_part(name: str, file: Path, config: Any) -> Part:
    """Match a network with the tensors in a file; raises ValueError if they do not fit."""
    shapes = read_shapes(file)
    keys = KEYS[name](shapes)
    with torch.device("meta"):
        network = NETWORKS[name](config)
    if name == "text_encoder":
        # "Clip skip 2" models drop the last layer from their config.json but not always from the file.
        used, layers = network.state_dict(), "text_model.encoder.layers."
        keys = {ours: key for ours, key in keys.items() if ours in used or not ours.startswith(layers)}
    part = Part(network, file, keys, shapes)
    if name == "unet":
        check_channels(part)
    check(part)
    return part


def check_channels(part: Part) -> None:
    channels = part.shapes.get(part.keys.get("conv_in.weight", ""), (0, 4))[1]
    if channels in UNSUPPORTED:
        kind = f"{UNSUPPORTED[channels]} (its UNet has {channels} input channels)"
        raise ValueError(f"{part.file} is {kind}: give the base model")


def check(part: Part) -> None:
    """Raise ValueError, with examples, for tensors that are missing, unexpected or of another shape."""
    wanted = {ours: tuple(tensor.shape) for ours, tensor in part.network.state_dict().items()}
    found = {ours: part.shapes[key] for ours, key in part.keys.items()}
    problems = {
        "missing tensors": [ours for ours in wanted if ours not in found],
        "unexpected tensors": [key for ours, key in part.keys.items() if ours not in wanted],
        "wrong shapes": [
            f"{ours} {list(found[ours])}, expected {list(shape)}"
            for ours, shape in wanted.items()
            # Older files have some linear layers as 1x1 convolutions.
            if ours in found and found[ours] not in (shape, (*shape, 1, 1))
        ],
    }
    lines = [
        f"{problem}: {len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for problem, names in problems.items()
        if names
    ]
    if lines:
        kind = type(part.network).__name__
        raise ValueError(
            f"{part.file} does not fit {kind}: {'; '.join(lines)}: "
            "it is damaged or belongs to another kind of model"
        )


def fill(part: Part, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Read a network's tensors into it on a device and in a dtype, holding at most one tensor twice."""
    tensors = {}
    for name, empty in part.network.state_dict().items():
        # Opened for each tensor: a file that stays mapped keeps all pages that were read in memory.
        with safe_open(part.file, "pt") as file:
            tensor = file.get_tensor(part.keys[name]).reshape(empty.shape)
            # Always a copy: the alignment of a tensor within the file changes how sums are rounded.
            tensors[name] = tensor.to(device, dtype, copy=True)
    part.network.load_state_dict(tensors, strict=True, assign=True)
    return part.network.requires_grad_(False)
