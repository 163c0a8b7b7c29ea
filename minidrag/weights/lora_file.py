"""LoRA files in the common naming styles: diffusers, peft, kohya, and DragDiffusion's own.

Layers are named by their path in the official checkpoint, `...attn1.to_q`.
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

from minidrag.method.lora import Factors, LoRA, target_layers

FILE_NAME = "pytorch_lora_weights.safetensors"  # in a folder, where diffusers looks for it
NOTES = "minidrag"  # the only metadata key written: safetensors writes several in random order
# Key of a plain LoRA in any style, and patterns that identify other kinds of adapter.
KEY = re.compile(
    r"(lora_unet_|lora_te_|text_encoder\.|(?:unet\.)*)(.+?)\."
    r"(?:(?:lora_linear_layer\.|lora\.|lora_)(down|up|A|B)\.weight|alpha)"
)
FOREIGN = {"hada_": "LoHa", "lokr_": "LoKr", "lora_mid": "LoCon in Tucker form"}
FOREIGN |= {"dora_scale|lora_magnitude": "DoRA", r"\.diff(_b)?$": "a file of weight differences"}
STYLES = {  # keys for the UNet, keys for the text encoder, names of down and up
    "peft": ("unet.{}.lora_{}.weight", "text_encoder.{}.lora_{}.weight", "A", "B"),
    "diffusers": ("unet.{}.lora.{}.weight", "text_encoder.{}.lora_linear_layer.{}.weight", "down", "up"),
    "kohya": ("lora_unet_{}.lora_{}.weight", "lora_te_{}.lora_{}.weight", "down", "up"),
}


def read(path: str | Path, unet: nn.Module, text_encoder: nn.Module | None) -> LoRA:
    """Read a LoRA from a file in any style, or from the FILE_NAME in a folder.

    unet, text_encoder: the networks to fit, possibly on the meta device; kohya's keys, which have no dots,
    are matched with their layers. Raises OSError for an unreadable file; ValueError for a broken one, one
    that is not a plain LoRA or one that does not fit.
    """
    path = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
    tensors, metadata = _open(path)
    parts = {"unet": unet, "text_encoder": text_encoder or nn.Module()}
    targets = {part: target_layers(model) for part, model in parts.items()}
    paths = {part: {layer.replace(".", "_"): layer for layer in layers} for part, layers in targets.items()}
    found: dict[str, dict[str, dict[str, Tensor]]] = {part: {} for part in parts}
    try:
        for key, tensor in tensors.items():
            part, layer, role = _parse(key)
            layer = paths[part].get(layer.replace(".", "_"), layer)
            found[part].setdefault(layer, {})[role] = tensor
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        entries = {
            part: {layer: _factors(layer, roles, part, config) for layer, roles in layers.items()}
            for part, layers in found.items()
        }
        check_fit(lora := LoRA(**entries), unet, text_encoder)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return lora


def check_fit(lora: LoRA, unet: nn.Module, text_encoder: nn.Module | None) -> None:
    """Raise ValueError, naming the first few layers, for a LoRA that does not fit its networks."""
    parts = (("UNet", unet, lora.unet), ("text encoder", text_encoder or nn.Module(), lora.text_encoder))
    for name, model, entries in parts:
        layers, wrong = target_layers(model), []
        for path, (down, up, _) in entries.items():
            if path not in layers:
                wrong.append(f"layer {path} does not exist")
                continue
            out, *inside = layers[path].weight.shape
            rank, ones = len(down), [1] * (len(inside) - 1)
            if [*down.shape] != [rank, *inside] or [*up.shape] != [out, rank, *ones]:
                wrong.append(f"{path} is {[out, *inside]}, not {[*up.shape]} times {[*down.shape]}")
        if wrong:
            more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError(f"the LoRA does not fit the {name}: {', '.join(wrong[:3])}{more}")


def _open(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({error}): download it again or, for a pickle, "
            f"convert it with `python -m weights_convert safetensors {path} OUT`"
        ) from None


def _parse(key: str) -> tuple[str, str, str]:
    """Split a key into network (unet, text_encoder), layer as spelled there and role (down, up, alpha)."""
    for pattern, kind in FOREIGN.items():
        if re.search(pattern, key):
            raise ValueError(f"only plain LoRA is supported, and this is {kind} (tensor {key})")
    # The attention processors of diffusers up to 0.23 named the projections differently.
    name = re.sub(r"self_attn\.to_(q|k|v|out)_lora\.", r"self_attn.\1_proj.lora.", key)
    name = name.replace(".processor.", ".").replace("to_out_lora.", "to_out.0.lora.")
    match = KEY.fullmatch(name.replace("_lora.", ".lora."))
    if not match:
        raise ValueError(f"this is not a plain LoRA: it has a tensor {key}")
    prefix, layer, role = match.groups()
    part = "text_encoder" if prefix in ("lora_te_", "text_encoder.") else "unet"
    return part, layer, {"A": "down", "B": "up", None: "alpha"}.get(role, role)


def _factors(layer: str, roles: dict[str, Tensor], part: str, config: dict[str, Any]) -> Factors:
    """Combine the tensors of one layer; alpha is its tensor, else from peft's `config`, else the rank."""
    if "down" not in roles or "up" not in roles or min(roles["down"].shape, default=0) < 1:
        raise ValueError(f"the LoRA of layer {layer} is incomplete")
    rank = len(roles["down"])
    peft = {key.removeprefix(f"{part}."): value for key, value in config.items()}
    patterns = (peft.get("alpha_pattern") or {}).items()
    matching = [alpha for pattern, alpha in patterns if re.match(rf"(.*\.)?({pattern})$", layer)]
    alpha = matching[0] if matching else peft.get("lora_alpha", rank)
    alpha *= math.sqrt(rank) if peft.get("use_rslora") else 1  # rslora scales by alpha / sqrt(rank)
    return Factors(roles["down"], roles["up"], roles["alpha"].item() if "alpha" in roles else alpha)


def to_keys(lora: LoRA, style: str) -> dict[str, Tensor]:
    """The tensors of a LoRA by their keys in a style: peft (diffusers today), diffusers (old) or kohya.

    Only kohya stores alpha; in the other styles it is folded into up, and readers assume alpha = rank.
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
    """Write a file that diffusers loads, completely or not at all; equal content gives equal bytes.

    notes: to be kept in the file's metadata. Raises OSError if writing fails.
    """
    partial = Path(path).with_name(f"{Path(path).name}.part")
    try:
        save_file(to_keys(lora, "peft"), partial, {NOTES: json.dumps(dict(notes or {}), sort_keys=True)})
        os.replace(partial, path)
    except SafetensorError as error:  # a full disk, for example
        raise OSError(errno.EIO, str(error), str(path)) from error
    finally:
        partial.unlink(missing_ok=True)
