"""What a LoRA consists of, and its files in all the spellings that are about.

Layers go by their paths, `...attn1.to_q`, as in the official checkpoint. The method can be read without this.
"""

import errno
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minidrag.method.lora import Factors, LoRA, check, target_layers

FILE_NAME = "pytorch_lora_weights.safetensors"  # where everybody looks who is given a folder
NOTES = "minidrag"  # the only metadata key that is written: safetensors puts several in random order
# A file's key in any spelling, and patterns of keys that give other kinds of adapters away.
KEY = re.compile(
    r"(lora_unet_|lora_te_|text_encoder\.|(?:unet\.)*)(.+?)\."
    r"(?:(?:lora_linear_layer\.|lora\.|lora_)(down|up|A|B)\.weight|alpha)"
)
FOREIGN = {"hada_": "LoHa", "lokr_": "LoKr", "lora_mid": "LoCon in Tucker form"}
FOREIGN |= {"dora_scale|lora_magnitude": "DoRA", r"\.diff(_b)?$": "a file of weight differences"}
STYLES = {  # names for the UNet and for the text encoder, and the words for down and up
    "peft": ("unet.{}.lora_{}.weight", "text_encoder.{}.lora_{}.weight", "A", "B"),
    "diffusers": ("unet.{}.lora.{}.weight", "text_encoder.{}.lora_linear_layer.{}.weight", "down", "up"),
    "kohya": ("lora_unet_{}.lora_{}.weight", "lora_te_{}.lora_{}.weight", "down", "up"),
}


def read(path: str | Path, unet: nn.Module, text_encoder: nn.Module | None) -> LoRA:
    """Reads a LoRA in any common spelling: diffusers, peft, kohya, and DragDiffusion's `unet.unet.`.

    The models lend the paths of their layers, whose dots kohya's names lack; they may be meta-device ones.
    A folder stands for its file FILE_NAME. Raises OSError; ValueError where the file is broken, holds
    something other than plain LoRA, or does not fit.
    """
    path = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
    tensors, metadata = _open(path)
    parts = {"unet": unet, "text_encoder": text_encoder or nn.Module()}
    names = {part: {name.replace(".", "_"): name for name in target_layers(model)} for part, model in parts.items()}
    found: dict[str, dict[str, dict[str, Tensor]]] = {part: {} for part in parts}
    try:
        for key, tensor in tensors.items():
            part, name, role = _parse(key)
            name = names[part].get(name.replace(".", "_"), name)
            found[part].setdefault(name, {})[role] = tensor
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        entries = {
            part: {name: _factors(name, roles, part, config) for name, roles in layers.items()}
            for part, layers in found.items()
        }
        check(lora := LoRA(**entries), unet, text_encoder)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return lora


def _open(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}): fetch it again, or, if it is a pickle, "
            f"convert it with `python -m weights_convert safetensors {path} OUT`"
        ) from None


def _parse(key: str) -> tuple[str, str, str]:
    """A file's key -> (unet or text_encoder, the layer as it is spelled there, down or up or alpha)."""
    for pattern, kind in FOREIGN.items():
        if re.search(pattern, key):
            raise ValueError(f"only plain LoRA can be read, and this is {kind} (tensor {key})")
    # The attention processors of diffusers up to 0.23 had names of their own for the projections.
    name = re.sub(r"self_attn\.to_(q|k|v|out)_lora\.", r"self_attn.\1_proj.lora.", key)
    name = name.replace(".processor.", ".").replace("to_out_lora.", "to_out.0.lora.")
    match = KEY.fullmatch(name.replace("_lora.", ".lora."))
    if not match:
        raise ValueError(f"this is no plain LoRA, it has a tensor {key}")
    prefix, layer, role = match.groups()
    part = "text_encoder" if prefix in ("lora_te_", "text_encoder.") else "unet"
    return part, layer, {"A": "down", "B": "up", None: "alpha"}.get(role, role)


def _factors(name: str, roles: dict[str, Tensor], part: str, config: dict[str, Any]) -> Factors:
    """Takes alpha from its tensor, else from `config`, which is peft's as kept in metadata, else the rank."""
    if "down" not in roles or "up" not in roles or min(roles["down"].shape, default=0) < 1:
        raise ValueError(f"the LoRA for {name} is not whole")
    rank = len(roles["down"])
    peft = {key.removeprefix(f"{part}."): value for key, value in config.items()}
    patterns = (peft.get("alpha_pattern") or {}).items()
    matching = [alpha for pattern, alpha in patterns if re.match(rf"(.*\.)?({pattern})$", name)]
    alpha = matching[0] if matching else peft.get("lora_alpha", rank)
    alpha *= math.sqrt(rank) if peft.get("use_rslora") else 1  # its scale is alpha / sqrt(rank)
    return Factors(roles["down"], roles["up"], roles["alpha"].item() if "alpha" in roles else alpha)


def to_keys(lora: LoRA, style: str) -> dict[str, Tensor]:
    """The tensors of a LoRA under the names of a style: peft (diffusers today), diffusers (old), kohya.

    Only kohya's has a place for alpha; elsewhere it is multiplied into up, and readers take it for the rank.
    """
    unet, text_encoder, down, up = STYLES[style]
    tensors = {}
    for pattern, entries in ((unet, lora.unet), (text_encoder, lora.text_encoder)):
        for path, factors in entries.items():
            name = path.replace(".", "_") if style == "kohya" else path
            scale = 1 if style == "kohya" else factors.alpha / len(factors.down)
            tensors[pattern.format(name, down)] = factors.down.contiguous()
            tensors[pattern.format(name, up)] = (scale * factors.up).contiguous()
            if style == "kohya":
                tensors[pattern.partition("{}")[0] + name + ".alpha"] = torch.tensor(float(factors.alpha))
    return tensors


def write(lora: LoRA, path: str | Path, notes: Mapping[str, str] | None = None) -> None:
    """Writes the file that diffusers loads, whole or not at all; the same content makes the same bytes.

    notes: whatever is to be kept with it; `read_notes` gives them back. Raises OSError where writing fails.
    """
    part = Path(path).with_name(f"{Path(path).name}.part")
    try:
        save_file(to_keys(lora, "peft"), part, {NOTES: json.dumps(dict(notes or {}), sort_keys=True)})
        os.replace(part, path)
    except SafetensorError as error:  # a full disk, among others
        raise OSError(errno.EIO, str(error), str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def read_notes(path: str | Path) -> dict[str, str]:
    """The notes in a file that `write` made; other files have none."""
    return json.loads(_open(path)[1].get(NOTES, "{}"))
