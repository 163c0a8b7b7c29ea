"""What a model file or folder is, what is odd about it, and whether minidrag can load it.

Only the headers are read, so that this takes no time.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open

from minidrag.method.ddim import Schedule
from minidrag.networks.tokenizer import Tokenizer, read_json
from minidrag.weights import lora_file
from minidrag.weights import model as weights
from minidrag.weights.checkpoint import NAMES, NETWORKS, PICKLES, find_part, read_shapes
from minidrag.weights.keys import TEXT, UNET, VAE, average_key, within

PREFIXES = {"unet": UNET, "vae": VAE, "text_encoder": TEXT}
OFFICIAL = {  # bytes of the files of stable-diffusion-v1-5/stable-diffusion-v1-5, and of a few others
    "unet": {3_438_167_540: "float32", 1_719_125_304: "float16", 3_463_726_498: "SD 2.1 float32"},
    "vae": {334_643_276: "float32", 167_335_342: "float16", 334_641_190: "vae-ft-mse-840000"},
    "text_encoder": {492_265_874: "float32", 246_144_864: "float16", 1_361_597_018: "SD 2.1 float32"},
    "checkpoint": {4_265_146_304: "v1-5-pruned-emaonly", 7_703_324_286: "v1-5-pruned"},
}


@dataclass
class Header:
    """A safetensors file without its data; shapes and dtypes go by the names in the file."""

    file: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]
    length: int

    @classmethod
    def read(cls, file: Path) -> "Header":
        """Raises ValueError, in a sentence, for a file that is no whole safetensors file."""
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
            yield "tensors not aligned: the header's length is odd"


def check(source: Path) -> Iterator[str]:
    """The report, line by line; where minidrag cannot load `source`, it ends in a ValueError or OSError."""
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist")
    if source.is_file():
        yield from check_file(source)
    elif (source / "unet").is_dir() or (source / "model_index.json").is_file():
        yield from check_model_folder(source)
    else:
        yield f"{source}: a folder without unet, so it can only be a VAE"
        yield from check_network_folder(source, "vae")
        weights.vae_part(source, torch.float32)
        yield "minidrag can load it with vae="


def check_model_folder(folder: Path) -> Iterator[str]:
    yield f"{folder}: a model folder"
    for name in NETWORKS:
        yield from check_network_folder(folder / name, name)
    parts = weights.folder_parts(folder, list(NETWORKS), torch.float32)
    for name, part in parts.items():
        if len(NAMES[name](part.shapes)) > len(part.names):
            yield f"  {name}: more layers than config.json wants; the last ones go unused"
    Tokenizer.load(weights.tokenizer_folder(folder, None))
    values = read_json(folder / "scheduler/scheduler_config.json", {})
    if (prediction := values.pop("prediction_type", "epsilon")) != "epsilon":
        yield f"  scheduler: the UNet tells {prediction}, not noise: good for features, not for editing"
    Schedule.from_json(values)
    yield "minidrag can load it"


def check_network_folder(folder: Path, name: str) -> Iterator[str]:
    """One network's files, of which there may be several variants."""
    for file in sorted(folder.glob("*")):
        if file.suffix == ".safetensors":
            header = Header.read(file)
            yield f"  {folder.name}/{header.describe(name)}"
            yield from (f"    {line}" for line in [*network(name, header), *header.quirks()])
            if set(header.dtypes.values()) == {"F16"} and "." not in file.stem:
                yield "    float16 under a name that promises float32"
        elif file.suffix in PICKLES:
            yield f"  {folder.name}/{file.name}: a pickle, not opened"


def network(name: str, header: Header) -> Iterator[str]:
    """How many parameters a file has of a network, and what is odd about its names and dtypes."""
    keys, names = within(header.shapes, PREFIXES[name]), NAMES[name](header.shapes)
    if not names:
        yield f"{name}: none"
        return
    count = sum(prod(header.shapes[key]) for key in names.values())
    kinds = sorted({header.dtypes[key] for key in names.values()})
    yield f"{name}: {len(names)} tensors, {count:,} parameters, {' and '.join(kinds)}"
    if len(kinds) > 1:
        yield "mixed dtypes: each tensor is cast by itself"
    if name == "vae" and any(re.search(r"\.attentions\.0\.query\.", key) for key in keys):
        yield "the VAE's attention has its names of before 2023: query, key, value, proj_attn"
    if name == "text_encoder":
        yield from text_quirks(keys, header)
    if name == "unet":
        average = {average_key(key) for key in keys}
        if there := average & header.shapes.keys():
            used = "which is used" if there == average else "not whole and not used"
            yield f"a second UNet, the average (EMA), {used}"


def text_quirks(keys: list[str], header: Header) -> Iterator[str]:
    if not any("text_model." in key for key in keys):
        yield "the text encoder's names lack text_model."
    for key in keys:
        if key.endswith("position_ids"):
            yield f"position_ids as {header.dtypes[key]}: ignored"
    if any(re.search(r"vision_model|projection|logit_scale", key) for key in keys):
        yield "other parts of CLIP than the text encoder: ignored"


PARTS = {"time_embedding.": "UNet", "text_model.": "text encoder", "embeddings.": "text encoder"}


def check_file(file: Path) -> Iterator[str]:
    header = Header.read(file)
    alone = [part for start, part in PARTS.items() if any(key.startswith(start) for key in header.shapes)]
    if any("lora" in key for key in header.shapes):
        yield f"{file}: a LoRA file, {len(header.shapes)} tensors, held against Stable Diffusion 1.x"
        read_lora(file)
        yield "minidrag can load it as a LoRA"
    elif any(key.startswith(UNET) for key in header.shapes):
        yield from check_checkpoint(header)
    elif alone:
        yield f"{file}: the {alone[0]} of a model, {len(header.shapes)} tensors"
        raise ValueError(f"a {alone[0]} is loaded with the rest of its model: give the model's folder")
    else:
        yield f"{file}: no whole checkpoint, so it can only be a VAE"
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
        yield "    no buffers of the schedule: not needed"
    yield from (f"    {line}" for line in header.quirks())
    weights.single_file_parts(header.file, list(NETWORKS))
    place = header.file.parent
    if not any((folder / "vocab.json").is_file() for folder in (place / "tokenizer", place)):
        yield "    no tokenizer beside it: the hub's is fetched, unless tokenizer= names another"
    yield "minidrag can load it"


def read_lora(file: Path) -> lora_file.LoRA:
    """Reads a LoRA for a model of SD 1.5's sizes: a LoRA's file does not tell what it is for."""
    with torch.device("meta"):
        unet = NETWORKS["unet"](weights.SINGLE_FILE["unet"])
        text_encoder = NETWORKS["text_encoder"](weights.SINGLE_FILE["text_encoder"])
    return lora_file.read(file, unet, text_encoder)
