"""Opens the weights of one network: checks that they fit, then reads them.

The networks have the official files' names, so a file is read straight into them: strictly, tensor by tensor,
with no random initialization before. `keys.py` has the rules for files with other names.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from minidrag.networks.clip import CLIPTextEncoder
from minidrag.networks.unet import UNet
from minidrag.networks.vae import VAE
from minidrag.weights.files import Header, read_tensor
from minidrag.weights.keys import PREFIXES, UNET, text_keys, unet_keys, vae_keys

LABELS = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder"}
NETWORKS = {"unet": UNet, "vae": VAE, "text_encoder": CLIPTextEncoder}
KEYS = {"unet": unet_keys, "vae": vae_keys, "text_encoder": text_keys}
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}  # safetensors' names of the dtypes that are read
CLIP_LAYERS = "text_model.encoder.layers."
UNSUPPORTED = {9: "an inpainting model", 8: "an InstructPix2Pix model"}  # by the UNet's input channels
FOREIGN = {  # by a part of a key
    "conditioner.": "an SDXL checkpoint",
    ".label_emb.": "an SDXL checkpoint",
    ".joint_blocks.": "a Stable Diffusion 3 checkpoint",
    "cond_stage_model.model.": "a Stable Diffusion 2.x checkpoint",
    "lora": "a LoRA file",
}
ALONE = {  # the network in a file without others, by the start of a key
    "time_embed": "UNet",
    "text_model.": "text encoder",
    "embeddings.": "text encoder",
    "decoder.": "VAE",
    "first_stage_model.": "VAE",
}


class NetworkFile(NamedTuple):
    """A network on the meta device and the header of the files with its tensors."""

    network: Any  # a module with its config
    header: Header
    keys: dict[str, str]  # {name in the network: key in the files}


def check_complete(header: Header, names: list[str]) -> None:
    """Raise ValueError unless a file is an SD 1.x checkpoint in the original layout with these networks."""
    file = header.file
    keys = header.shapes
    for mark, kind in FOREIGN.items():
        if any(mark in key for key in keys):
            raise ValueError(f"{file} is {kind}: give a Stable Diffusion 1.x checkpoint or a model folder")
    absent = [name for name in names if not any(key.startswith(PREFIXES[name]) for key in keys)]
    if "unet" in absent:
        alone = [kind for start, kind in ALONE.items() if any(key.startswith(start) for key in keys)]
        content = f"is the {alone[0]} of a model" if alone else f"has no tensors named {UNET}*"
        remedy = "pass it as --vae" if "VAE" in alone else "give the model folder that it belongs to"
        raise ValueError(f"{file} {content}, so it is not a complete checkpoint: {remedy}")
    check_absent(str(file), absent)


def check_absent(source: str, absent: list[str]) -> None:
    """Raise ValueError, with the remedy, if a checkpoint or a folder lacks networks."""
    if absent == ["vae"]:
        raise ValueError(f"{source} is a model, but it has no VAE: give one with --vae")
    if absent:
        kinds = " and ".join(f"no {LABELS[name]}" for name in absent)
        raise ValueError(
            f"{source} has {kinds}, so it is not a complete model: give one; if this UNet was trained "
            "alone, put it into a copy of its base model"
        )


def match(name: str, header: Header, config: Any) -> NetworkFile:
    """Match a network with the tensors under a header; raises ValueError if they do not fit."""
    keys = KEYS[name](header.shapes)
    with torch.device("meta"):
        network = NETWORKS[name](config)
    if name == "text_encoder":
        # "Clip skip 2" models drop the last layer from their config.json but not always from the file.
        used = network.state_dict()
        keys = {ours: key for ours, key in keys.items() if ours in used or not ours.startswith(CLIP_LAYERS)}
    file = NetworkFile(network, header, keys)
    if name == "unet":
        check_channels(file)
    check_tensors(file)
    return file


def check_channels(file: NetworkFile) -> None:
    shape = file.header.shapes.get(file.keys.get("conv_in.weight", ""), ())
    if len(shape) > 1 and shape[1] in UNSUPPORTED:
        kind = f"{UNSUPPORTED[shape[1]]} (its UNet has {shape[1]} input channels)"
        raise ValueError(f"{file.header.file} is {kind}: give the base model")


def check_tensors(file: NetworkFile) -> None:
    """Raise ValueError, with examples, for missing, unexpected and misshapen tensors, and for integers."""
    expected = {ours: tuple(tensor.shape) for ours, tensor in file.network.state_dict().items()}
    shapes = {ours: file.header.shapes[key] for ours, key in file.keys.items()}
    dtypes = {ours: file.header.dtypes[key] for ours, key in file.keys.items()}
    problems = {
        "missing tensors": [ours for ours in expected if ours not in shapes],
        "unexpected tensors": [key for ours, key in file.keys.items() if ours not in expected],
        "wrong shapes": [
            f"{ours} {list(shapes[ours])}, expected {list(shape)}"
            for ours, shape in expected.items()
            # Older files have some linear layers as 1x1 convolutions.
            if ours in shapes and shapes[ours] not in (shape, (*shape, 1, 1))
        ],
        "tensors that are not floating point": [
            f"{ours} {dtype}" for ours, dtype in dtypes.items() if dtype not in FLOATS
        ],
    }
    lines = [
        f"{problem}: {len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for problem, names in problems.items()
        if names
    ]
    if lines:
        kind = type(file.network).__name__
        raise ValueError(
            f"{file.header.file} does not fit {kind}: {'; '.join(lines)}: "
            "it is damaged or belongs to another kind of model"
        )


def load_weights(file: NetworkFile, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Read a network's tensors into it on a device and in a dtype, holding at most one tensor twice."""
    tensors = {}
    for name, empty in file.network.state_dict().items():
        tensor = read_tensor(file.header, file.keys[name]).reshape(empty.shape)
        # Always a copy: the alignment of a tensor within the file changes how sums are rounded.
        tensors[name] = tensor.to(device, dtype, copy=True)
    file.network.load_state_dict(tensors, strict=True, assign=True)
    return file.network.requires_grad_(False)
