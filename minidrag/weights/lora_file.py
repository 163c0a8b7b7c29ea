"""LoRA files in the common naming styles: diffusers, peft, kohya, and DragDiffusion's own.

Layers are named by their path in the official checkpoint, `...attn1.to_q`.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minidrag.method.lora import Factors, LoRA, check_fit, target_layers
from minidrag.system.files import parse_json, write_whole
from minidrag.weights import configs
from minidrag.weights.checkpoint import FLOATS
from minidrag.weights.configs import SHORT, check_switches
from minidrag.weights.files import (
    Header,
    Json,
    check_object,
    read_header,
    read_object,
    read_tensor,
    save_tensors,
)

FILE_NAME = "pytorch_lora_weights.safetensors"  # in a folder, where diffusers looks for it
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # in a folder that peft writes
NOTES = "minidrag"  # the only metadata key written: safetensors writes several in random order
KEY = re.compile(
    r"(lora_unet_|lora_te_|text_encoder\.|base_model\.model\.|(?:unet\.)*)(.+?)\."
    r"(?:(?:lora_linear_layer\.|lora\.|lora_)(down|up|A|B)(?:\.\w+)?\.weight|alpha)"
)
LEFT_OUT = re.compile(r"bundle_emb\.([^.]*)\.")  # embeddings of textual inversion beside a LoRA
MODELS = {  # that a LoRA is for, by a part of a key
    r"(double|single|joint)_blocks|^transformer\.|single_transformer": "Flux or Stable Diffusion 3",
    r"^lora_te[12]_|^text_encoder_2\.|^lora_unet_(in|out)put_blocks_|^lora_unet_middle_block_": "SDXL",
    r"attentions[._]\d+[._]transformer_blocks[._][1-9]": "SDXL",
}
FOREIGN = {  # other kinds of adapters, by a part of a key
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "LoCon in Tucker form",
    "dora_scale|lora_magnitude": "DoRA",
    r"\boft_": "OFT",
    r"\.[wb]_norm$|\.diff(_b)?$": "a file of weight differences",
    r"^lora_vae_|^vae\.": "a LoRA of a VAE",
    "^emb_params$|^<.*>$|^clip_[lg]$|^string_to_param": "an embedding of textual inversion",
}
STYLES = {  # keys for the UNet, keys for the text encoder, names of down and up
    "peft": ("unet.{}.lora_{}.weight", "text_encoder.{}.lora_{}.weight", "A", "B"),
    "diffusers": ("unet.{}.lora.{}.weight", "text_encoder.{}.lora_linear_layer.{}.weight", "down", "up"),
    "kohya": ("lora_unet_{}.lora_{}.weight", "lora_te_{}.lora_{}.weight", "down", "up"),
}
LARGEST = 1e6  # an alpha, of which usual ones are 1 to 256
NETWORKS = {  # that a LoRA's layer belongs to, by the start of its key; peft's keys do not name it
    "lora_te_": "text_encoder",
    "text_encoder.": "text_encoder",
    "base_model.model.": None,
    "": None,
}
Keys = dict[str, dict[str, dict[str, str]]]  # by network, layer, and role (down, up, alpha)


def read(path: str | Path, unet: nn.Module, text_encoder: nn.Module | None) -> LoRA:
    """Read a LoRA from a file in any style, or from the one in a folder (`find_file`).

    unet, text_encoder: the networks to fit, possibly on the meta device; kohya's keys, which have no dots,
    are matched with their layers. Raises OSError for an unreadable file; ValueError for a broken one, one
    that is not a plain LoRA or one that does not fit.
    """
    header = read_header(find_file(Path(path)))
    models = {"unet": unet, "text_encoder": text_encoder or nn.Module()}
    try:
        layers = sort_keys(header, models)
        config = adapter_config(header)
        entries = {
            name: {layer: read_factors(header, layer, keys, config[name]) for layer, keys in network.items()}
            for name, network in layers.items()
        }
        check_fit(lora := LoRA(**entries), unet, text_encoder)
    except ValueError as error:
        raise ValueError(f"{header.file}: {error}") from None
    return lora


def find_file(path: Path) -> Path:
    """The file of a LoRA: `path` itself, or in a folder FILE_NAME or peft's ADAPTER; OSError for neither."""
    if not path.is_dir():
        return path
    for name in (FILE_NAME, ADAPTER):
        if (path / name).is_file():
            return path / name
    folders = [str(path / name) for name in ("unet", "text_encoder") if (path / name / ADAPTER).is_file()]
    remedy = f"give {' or '.join(folders)}" if folders else "give the LoRA's file"
    raise FileNotFoundError(f"{path} has neither {FILE_NAME} nor {ADAPTER}: {remedy}")


def has_adapter(keys: Iterable[str]) -> bool:
    """True for the keys of a LoRA, or of another kind of adapter."""
    patterns = re.compile("|".join(["lora", "^bundle_emb", *FOREIGN]))
    return any(patterns.search(key) for key in keys)


def left_out(path: str | Path) -> list[str]:
    """Sentences on the parts of a LoRA's file that are not used."""
    matches = [LEFT_OUT.match(key) for key in read_header(find_file(Path(path))).shapes]
    names = sorted({match[1] for match in matches if match})
    listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return [f"the LoRA's file also has embeddings ({listed}), which are not used"] if names else []


def sort_keys(header: Header, models: Mapping[str, nn.Module]) -> Keys:
    """The keys of a LoRA's tensors by network, layer, and role; raises ValueError for one of another kind."""
    paths = {
        network: {path.replace(".", "_"): path for path in target_layers(model)}
        for network, model in models.items()
    }
    # transformers 5.6 dropped the text encoder's prefix.
    paths["text_encoder"] |= {
        name.removeprefix("text_model_"): path for name, path in paths["text_encoder"].items()
    }
    keys: Keys = {network: {} for network in models}
    for key in (key for key in header.shapes if not LEFT_OUT.match(key)):
        network, layer, role = parse(key)
        name = layer.replace(".", "_")
        if network is None:
            text = name in paths["text_encoder"] and name not in paths["unet"]
            network = "text_encoder" if text else "unet"
        roles = keys[network].setdefault(paths[network].get(name, layer), {})
        if role in roles:
            raise ValueError(f"the LoRA of layer {layer} is there twice, as {roles[role]} and as {key}")
        roles[role] = key
    if not any(keys.values()):
        raise ValueError("there is no LoRA in the file")
    return keys


def adapter_config(header: Header) -> dict[str, Json]:
    """peft's configuration of the adapters, by network: in the metadata, or in a file that peft needs too."""
    place = f"the lora_adapter_metadata of {header.file}"
    values = check_object(parse_json(header.metadata.get("lora_adapter_metadata", "{}"), place), place)
    if any(key.startswith("base_model.model.") for key in header.shapes):
        file = header.file.with_name(ADAPTER_CONFIG)
        if not file.is_file():
            raise ValueError(f"{file} is missing, which has the alpha of an adapter that peft wrote")
        values = {"lora_alpha": 8} | read_object(file)  # 8 by default
    # Keys of one network have its name as a prefix; keys of a single adapter have none.
    prefixes = {"unet": "unet.", "text_encoder": "text_encoder."}
    return {
        network: check_adapter({key.removeprefix(prefix): value for key, value in values.items()})
        for network, prefix in prefixes.items()
    }


def check_adapter(config: Json) -> Json:
    """Return peft's configuration; raises ValueError for one that plain factors and alphas do not express."""
    check_switches(configs.ADAPTER, config)
    alpha = config.get("lora_alpha", 1)
    if not is_alpha(alpha):
        raise ValueError(f"the adapter has lora_alpha = {SHORT.repr(alpha)}: expected a number")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError("the adapter's alpha_pattern is not a table of layers")
    for pattern, alpha in patterns.items():
        if not re.fullmatch(r"\^?([\w-]|\\?\.)+\$?", pattern) or not is_alpha(alpha):
            entry = SHORT.repr({pattern: alpha})
            raise ValueError(f"the adapter's alpha_pattern has {entry}: expected a layer and a number")
    return config


def is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST


def parse(key: str) -> tuple[str | None, str, str]:
    """Split a key into network (unet, text_encoder), layer as spelled there and role (down, up, alpha)."""
    for pattern, kind in FOREIGN.items():
        if re.search(pattern, key):
            raise ValueError(f"only plain LoRA is supported, and this is {kind} (tensor {key})")
    for pattern, model in MODELS.items():
        if re.search(pattern, key):
            raise ValueError(f"this is a LoRA for {model} (tensor {key}): give one for Stable Diffusion 1.x")
    # The attention processors of diffusers up to 0.23 named the projections differently.
    name = re.sub(r"self_attn\.to_(q|k|v|out)_lora\.", r"self_attn.\1_proj.lora.", key)
    name = name.replace(".processor.", ".").replace("to_out_lora.", "to_out.0.lora.")
    match = KEY.fullmatch(name.replace("_lora.", ".lora."))
    if not match:
        raise ValueError(f"this is not a plain LoRA: it has a tensor {key}")
    prefix, layer, role = match.groups()
    return NETWORKS.get(prefix, "unet"), layer, {"A": "down", "B": "up", None: "alpha"}.get(role, role)


def read_factors(header: Header, layer: str, keys: Mapping[str, str], config: Json) -> Factors:
    """Read the tensors of one layer; alpha is its tensor, else from peft's `config`, else the rank."""
    shapes = [header.shapes[keys[role]] for role in ("down", "up") if role in keys]
    if len(shapes) < 2 or min(shapes[0], default=0) < 1:
        raise ValueError(f"the LoRA of layer {layer} is incomplete")
    down, up = (read_factor(header, keys[role]) for role in ("down", "up"))
    alpha = read_alpha(header, keys["alpha"]) if "alpha" in keys else alpha_in(config, layer, len(down))
    return Factors(down, up, alpha)


def read_factor(header: Header, key: str) -> Tensor:
    if header.dtypes[key] not in FLOATS:
        raise ValueError(
            f"the tensor {key} is {header.dtypes[key]}: only floating point numbers are supported"
        )
    tensor = read_tensor(header, key)
    tensor = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # little can be computed in 8 bits
    if not tensor.isfinite().all():
        raise ValueError(f"the tensor {key} has numbers that are not finite: its training has failed")
    return tensor


def read_alpha(header: Header, key: str) -> float:
    shape = header.shapes[key]
    dtype = header.dtypes[key]
    if prod(shape) != 1 or not (dtype in FLOATS or re.fullmatch(r"[IU]\d+", dtype)):
        raise ValueError(f"the tensor {key} is {dtype} {list(shape)}: expected one number")
    alpha = read_tensor(header, key).double().item()
    if not abs(alpha) <= LARGEST:
        raise ValueError(f"the tensor {key} is {alpha:g}: expected a number from {-LARGEST:g} to {LARGEST:g}")
    return alpha


def alpha_in(config: Json, layer: str, rank: int) -> float:
    """Return the alpha of a layer in peft's configuration, or the rank."""
    patterns = (config.get("alpha_pattern") or {}).items()
    matching = [alpha for pattern, alpha in patterns if names_layer(pattern, layer)]
    alpha = matching[0] if matching else config.get("lora_alpha", rank)
    return alpha * (math.sqrt(rank) if config.get("use_rslora") else 1)  # rslora: alpha / sqrt(rank)


def names_layer(pattern: str, layer: str) -> bool:
    """True if peft's pattern, the end of a layer's path or after ^ all of it, names a layer.

    Compared literally: peft would run any regular expression, and there are some that never end.
    """
    name = pattern.replace("\\", "").removesuffix("$")
    return f".{layer}".endswith(f".{name}") or layer == name.removeprefix("^")


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

    notes: strings for the file's metadata. Raises OSError if writing fails.
    """
    tensors = to_keys(lora, "peft")
    metadata = {NOTES: json.dumps(dict(notes or {}), sort_keys=True)}
    write_whole(Path(path), lambda file: save_tensors(tensors, file, metadata))
