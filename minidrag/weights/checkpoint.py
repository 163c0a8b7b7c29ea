"""One network from its weights: inspect the file or the shards, check that they fit, read them.

The networks have the official files' names, so a file is read straight into them: strictly, tensor by tensor,
with no random initialization before. `keys.py` has the rules for files with other names.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from minidrag.networks.clip import CLIPTextEncoder
from minidrag.networks.unet import UNet
from minidrag.networks.vae import VAE
from minidrag.weights.files import Header, read_header, read_tensor
from minidrag.weights.keys import PREFIXES, UNET, text_keys, unet_keys, vae_keys

LABELS = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder"}
NETWORKS = {"unet": UNet, "vae": VAE, "text_encoder": CLIPTextEncoder}
KEYS = {"unet": unet_keys, "vae": vae_keys, "text_encoder": text_keys}
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}  # safetensors' names of the dtypes that are read
UNSUPPORTED = {9: "an inpainting model", 8: "an InstructPix2Pix model"}  # by the UNet's input channels
FOREIGN = {  # by a part of a key
    "conditioner.": "an SDXL checkpoint",
    ".label_emb.": "an SDXL checkpoint",
    ".joint_blocks.": "a Stable Diffusion 3 checkpoint",
    "cond_stage_model.model.": "a Stable Diffusion 2.x checkpoint",
    "lora": "a LoRA file",
}
ALONE = {  # a network in a file of its own, by the start of a key
    "time_embed": "UNet",
    "text_model.": "text encoder",
    "embeddings.": "text encoder",
    "decoder.": "VAE",
    "first_stage_model.": "VAE",
}


class Part(NamedTuple):
    """A network on the meta device and the header of the files with its tensors."""

    network: nn.Module
    header: Header
    keys: dict[str, str]  # {name in the network: key in the files}


def refuse_incomplete(header: Header, names: list[str]) -> None:
    """Raise ValueError unless a file is an SD 1.x checkpoint in the original layout with these networks."""
    file, keys = header.file, header.shapes
    for mark, kind in FOREIGN.items():
        if any(mark in key for key in keys):
            raise ValueError(f"{file} is {kind}: give a Stable Diffusion 1.x checkpoint or a model folder")
    absent = [name for name in names if not any(key.startswith(PREFIXES[name]) for key in keys)]
    if "unet" in absent:
        alone = [kind for start, kind in ALONE.items() if any(key.startswith(start) for key in keys)]
        found = f"is the {alone[0]} of a model" if alone else f"has no tensors named {UNET}*"
        remedy = "pass it as --vae" if "VAE" in alone else "give the model folder that it belongs to"
        remedy = remedy if alone else "pass a VAE as --vae, or give the folder that the file belongs to"
        raise ValueError(f"{file} {found}, so it is not a complete checkpoint: {remedy}")
    refuse_absent(str(file), absent)


def refuse_absent(source: str, absent: list[str]) -> None:
    """Raise ValueError for a checkpoint or a folder without some of its networks; with the remedy."""
    if absent == ["vae"]:
        raise ValueError(f"{source} is a model, but it has no VAE: give one with --vae")
    if absent:
        kinds = " and ".join(f"no {LABELS[name]}" for name in absent)
        raise ValueError(
            f"{source} has {kinds}, so it is not a complete model: give one, for a UNet that was trained "
            "alone a copy of its base model with this UNet in it"
        )


def find_part(name: str, file: Path, config: Any) -> Part:
    """Match a network with the tensors in a file or an index; raises ValueError if they do not fit."""
    return match_part(name, read_header(file), config)


def match_part(name: str, header: Header, config: Any) -> Part:
    keys = KEYS[name](header.shapes)
    with torch.device("meta"):
        network = NETWORKS[name](config)
    if name == "text_encoder":
        # "Clip skip 2" models drop the last layer from their config.json but not always from the file.
        used, layers = network.state_dict(), "text_model.encoder.layers."
        keys = {ours: key for ours, key in keys.items() if ours in used or not ours.startswith(layers)}
    part = Part(network, header, keys)
    if name == "unet":
        check_channels(part)
    check(part)
    return part


def check_channels(part: Part) -> None:
    channels = (*part.header.shapes.get(part.keys.get("conv_in.weight", ""), ()), 0, 0)[1]
    if channels in UNSUPPORTED:
        kind = f"{UNSUPPORTED[channels]} (its UNet has {channels} input channels)"
        raise ValueError(f"{part.header.file} is {kind}: give the base model")


def check(part: Part) -> None:
    """Raise ValueError, with examples, for missing, unexpected and misshapen tensors, and for integers."""
    wanted = {ours: tuple(tensor.shape) for ours, tensor in part.network.state_dict().items()}
    found = {ours: part.header.shapes[key] for ours, key in part.keys.items()}
    problems = {
        "missing tensors": [ours for ours in wanted if ours not in found],
        "unexpected tensors": [key for ours, key in part.keys.items() if ours not in wanted],
        "wrong shapes": [
            f"{ours} {list(found[ours])}, expected {list(shape)}"
            for ours, shape in wanted.items()
            # Older files have some linear layers as 1x1 convolutions.
            if ours in found and found[ours] not in (shape, (*shape, 1, 1))
        ],
        "tensors that are not floating point": [
            f"{ours} {part.header.dtypes[key]}"
            for ours, key in part.keys.items()
            if part.header.dtypes[key] not in FLOATS
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
            f"{part.header.file} does not fit {kind}: {'; '.join(lines)}: "
            "it is damaged or belongs to another kind of model"
        )


def fill(part: Part, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Read a network's tensors into it on a device and in a dtype, holding at most one tensor twice."""
    tensors = {}
    for name, empty in part.network.state_dict().items():
        tensor = read_tensor(part.header, part.keys[name]).reshape(empty.shape)
        # Always a copy: the alignment of a tensor within the file changes how sums are rounded.
        tensors[name] = tensor.to(device, dtype, copy=True)
    part.network.load_state_dict(tensors, strict=True, assign=True)
    return part.network.requires_grad_(False)
