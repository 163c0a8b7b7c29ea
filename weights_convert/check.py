"""A report on a model file or folder: kind, peculiarities, and whether minidrag can load it.

Reads only headers, so it is fast.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open

from minidrag.method.lora import LoRA
from minidrag.weights import lora_file
from minidrag.weights import model as weights
from minidrag.weights.checkpoint import KEYS, NETWORKS, PICKLES, find_part, read_shapes
from minidrag.weights.configs import load_tokenizer, read_json, read_schedule
from minidrag.weights.keys import TEXT, UNET, VAE, average_key, network_keys

PREFIXES = {"unet": UNET, "vae": VAE, "text_encoder": TEXT}
OFFICIAL = {  # sizes in bytes of the files in stable-diffusion-v1-5/stable-diffusion-v1-5 and a few others
    "unet": {3_438_167_540: "float32", 1_719_125_304: "float16", 3_463_726_498: "SD 2.1 float32"},
    "vae": {334_643_276: "float32", 167_335_342: "float16", 334_641_190: "vae-ft-mse-840000"},
    "text_encoder": {492_265_874: "float32", 246_144_864: "float16", 1_361_597_018: "SD 2.1 float32"},
    "checkpoint": {4_265_146_304: "v1-5-pruned-emaonly", 7_703_324_286: "v1-5-pruned"},
}


@dataclass
class Header:
    """The header of a safetensors file."""

    file: Path
    shapes: dict[str, tuple[int, ...]]  # by key
    dtypes: dict[str, str]  # by key
    metadata: dict[str, str]
    length: int  # of the header in bytes

    @classmethod
    def read(cls, file: Path) -> "Header":
        """Read the header; raises ValueError for a file that is not a complete safetensors file."""
        shapes = read_shapes(file)
        with safe_open(file, "pt") as opened:
            dtypes = {key: opened.get_slice(key).get_dtype() for key in shapes}
            metadata = opened.metadata() or {}
        with open(file, "rb") as raw:
            return cls(file, shapes, dtypes, metadata, int.from_bytes(raw.read(8), "little"))

    def describe(self, kind: str) -> str:
        size = self.file.stat().st_size
        known = ", ".join(f"{label} {number:,}" for number, label in OFFICIAL[kind].items())
        official = f"the official {OFFICIAL[kind][size]}" if size in OFFICIAL[kind] else f"official: {known}"
        return f"{self.file.name}: {len(self.shapes)} tensors, {size:,} bytes ({official})"

    def quirks(self) -> Iterator[str]:
        if not self.metadata:
            yield "no metadata in the header"
        if self.length % 8:
            yield "unaligned tensors: the header's length is not a multiple of 8"


def check(source: Path) -> Iterator[str]:
    """Yield the report line by line; raises ValueError or OSError if minidrag cannot load `source`."""
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: give a file or a folder")
    if source.is_file():
        yield from check_file(source)
    elif (source / "unet").is_dir() or (source / "model_index.json").is_file():
        yield from check_model_folder(source)
    else:
        yield f"{source}: a folder without a UNet, so it can only be a VAE"
        yield from check_network_folder(source, "vae")
        weights.vae_part(source, torch.float32)
        yield "minidrag can load it with vae="


def check_model_folder(folder: Path) -> Iterator[str]:
    yield f"{folder}: a model folder"
    for name in NETWORKS:
        yield from check_network_folder(folder / name, name)
    parts = weights.folder_parts(folder, list(NETWORKS), torch.float32)
    for name, part in parts.items():
        if len(KEYS[name](part.shapes)) > len(part.keys):
            yield f"  {name}: more layers than in config.json; the last ones are not used"
    load_tokenizer(weights.tokenizer_folder(folder, None))
    scheduler = read_json(folder / "scheduler/scheduler_config.json", {})
    if (prediction := scheduler.get("prediction_type", "epsilon")) != "epsilon":
        yield f"  scheduler: the UNet predicts {prediction}, not epsilon: good for features, not for editing"
    read_schedule(scheduler)
    yield "minidrag can load it"


def check_network_folder(folder: Path, name: str) -> Iterator[str]:
    """Report on each file of a network, of which there can be several variants."""
    for file in sorted(folder.glob("*")):
        if file.suffix == ".safetensors":
            header = Header.read(file)
            yield f"  {folder.name}/{header.describe(name)}"
            yield from (f"    {line}" for line in [*network(name, header), *header.quirks()])
            if set(header.dtypes.values()) == {"F16"} and "." not in file.stem:
                yield "    float16, although the name says float32"
        elif file.suffix in PICKLES:
            yield f"  {folder.name}/{file.name}: a pickle, not opened"


def network(name: str, header: Header) -> Iterator[str]:
    """Report the parameter count of one network in a file, and peculiarities of its keys and dtypes."""
    keys, used = network_keys(header.shapes, PREFIXES[name]), KEYS[name](header.shapes).values()
    if not used:
        yield f"{name}: none"
        return
    count = sum(prod(header.shapes[key]) for key in used)
    dtypes = sorted({header.dtypes[key] for key in used})
    yield f"{name}: {len(used)} tensors, {count:,} parameters, {' and '.join(dtypes)}"
    if len(dtypes) > 1:
        yield "mixed dtypes: each tensor is cast on its own"
    if name == "vae" and any(re.search(r"\.attentions\.0\.query\.", key) for key in keys):
        yield "the VAE's attention has its keys from before 2023: query, key, value, proj_attn"
    if name == "text_encoder":
        yield from text_quirks(keys, header)
    if name == "unet":
        average = {average_key(key) for key in keys}
        if there := average & header.shapes.keys():
            state = "complete and used" if there == average else "incomplete and not used"
            yield f"a second UNet, the moving average (EMA): {state}"


def text_quirks(keys: list[str], header: Header) -> Iterator[str]:
    if not any("text_model." in key for key in keys):
        yield "the text encoder's keys lack the prefix text_model."
    for key in keys:
        if key.endswith("position_ids"):
            yield f"position_ids as {header.dtypes[key]}: ignored"
    if any(re.search(r"vision_model|projection|logit_scale", key) for key in keys):
        yield "parts of CLIP other than the text encoder: ignored"


PARTS = {"time_embedding.": "UNet", "text_model.": "text encoder", "embeddings.": "text encoder"}


def check_file(file: Path) -> Iterator[str]:
    header = Header.read(file)
    alone = [part for start, part in PARTS.items() if any(key.startswith(start) for key in header.shapes)]
    if any("lora" in key for key in header.shapes):
        yield f"{file}: a LoRA file, {len(header.shapes)} tensors, checked against Stable Diffusion 1.x"
        read_lora(file)
        yield "minidrag can load it as a LoRA"
    elif any(key.startswith(UNET) for key in header.shapes):
        yield from check_checkpoint(header)
    elif alone:
        yield f"{file}: the {alone[0]} of a model, {len(header.shapes)} tensors"
        raise ValueError(f"a {alone[0]} is loaded with the rest of its model: give the model folder")
    else:
        yield f"{file}: not a complete checkpoint, so it can only be a VAE"
        find_part("vae", file, weights.SINGLE_FILE["vae"])
        yield f"  {header.describe('vae')}"
        yield from (f"    {line}" for line in [*network("vae", header), *header.quirks()])
        yield "minidrag can load it with vae="


def check_checkpoint(header: Header) -> Iterator[str]:
    yield f"{header.file}: a single-file checkpoint"
    yield f"  {header.describe('checkpoint')}"
    for name in NETWORKS:
        yield from (f"    {line}" for line in network(name, header))
    if "alphas_cumprod" not in header.shapes:
        yield "    no schedule buffers: not needed"
    yield from (f"    {line}" for line in header.quirks())
    weights.single_file_parts(header.file, list(NETWORKS))
    if not weights.find_vocabulary(header.file.parent):
        yield "    no tokenizer beside it: downloaded from the hub, unless tokenizer= gives a folder"
    yield "minidrag can load it"


def read_lora(file: Path) -> LoRA:
    """Read a LoRA for networks of SD 1.5's sizes; its file does not record the model it is for."""
    with torch.device("meta"):
        unet = NETWORKS["unet"](weights.SINGLE_FILE["unet"])
        text_encoder = NETWORKS["text_encoder"](weights.SINGLE_FILE["text_encoder"])
    return lora_file.read(file, unet, text_encoder)
