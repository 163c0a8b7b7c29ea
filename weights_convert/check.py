"""A report on a model file or folder: kind, peculiarities, and whether minidrag can load it.

Reads only headers, so it is fast. The verdict is that of the functions that load.
"""

from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch

from minidrag.method.lora import LoRA
from minidrag.weights import load as weights
from minidrag.weights import lora_file
from minidrag.weights.checkpoint import KEYS, NETWORKS
from minidrag.weights.files import PICKLES, Header, read_header
from minidrag.weights.keys import UNET, average_key, network_keys


def check(source: Path) -> Iterator[str]:
    """Yield the report line by line; raises ValueError or OSError if minidrag cannot load `source`."""
    path = weights.TINY if str(source) == "tiny" else weights.local_path(source)
    if path is None:
        raise FileNotFoundError(f"{source} does not exist: give a file or a folder")
    if is_lora(path):
        yield from check_lora(path)
    elif is_vae(path):
        yield f"{path}: not a complete model, so it can only be a VAE"
        vae = weights.open_vae(path, torch.float32)
        yield from describe("vae", vae.header.file)
        yield "minidrag can load it with vae= (--vae on the command line)"
    else:
        yield from check_model(path)


def is_lora(source: Path) -> bool:
    if source.is_dir():
        names = (lora_file.FILE_NAME, lora_file.ADAPTER)
        return not (source / "unet").is_dir() and any((source / name).is_file() for name in names)
    return lora_file.has_adapter(keys_of(source))


def is_vae(source: Path) -> bool:
    if source.is_dir():
        nested = any((source / name).is_dir() for name in NETWORKS)
        return not nested and any(source.glob("diffusion_pytorch_model*"))
    keys = keys_of(source)
    return any("decoder." in key for key in keys) and not any(key.startswith(UNET) for key in keys)


def keys_of(file: Path) -> list[str]:
    """Return the keys in a file; none if it cannot be read, as loading it raises the reason."""
    try:
        return list(read_header(file).shapes)
    except (OSError, ValueError):
        return []


def check_lora(source: Path) -> Iterator[str]:
    yield f"{source}: a LoRA, checked against Stable Diffusion 1.x"
    lora = read_lora(source)
    yield from lora_file.left_out(source)
    layers = f"{len(lora.unet)} layers of the UNet, {len(lora.text_encoder)} of the text encoder"
    yield f"minidrag can load it as a LoRA: {layers}"


def check_model(source: Path) -> Iterator[str]:
    """Report on a whole model, whether it can be loaded or not."""
    if source.is_dir():
        yield f"{source}: a model folder"
        for name in NETWORKS:
            for file in sorted((source / name).glob("*")):
                yield from describe(name, file)
    elif any(key.startswith(UNET) for key in keys_of(source)):
        yield f"{source}: a single-file checkpoint"
        yield from describe("checkpoint", source)
    files, scheduler = weights.open_model(source, None, torch.float32)
    for name, file in files.items():
        if len(KEYS[name](file.header.shapes)) > len(file.keys):
            yield f"  {name}: more layers than in config.json; the last ones are not used"
    if source.is_dir() or weights.find_vocabulary(source.parent):
        weights.open_tokenizer(source, None, files)
    else:
        yield "    no tokenizer beside it: downloaded from the hub, unless --tokenizer gives a folder"
    if (prediction := scheduler.get("prediction_type", "epsilon")) != "epsilon":
        yield f"  scheduler: the UNet predicts {prediction}, not epsilon: good for features, not for editing"
    yield "minidrag can load it"


def describe(name: str, file: Path) -> Iterator[str]:
    """Report on a file of a network, of which there can be several variants, or of a whole checkpoint."""
    path = file.name if name == "checkpoint" else f"{file.parent.name}/{file.name}"
    if file.suffix in PICKLES:
        yield f"  {path}: a pickle, not opened"
    if file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
        return
    try:
        header = read_header(file)
    except (OSError, ValueError):
        yield f"  {path}: not a file to be loaded alone, or a broken one"
        return
    yield f"  {path}: {len(header.shapes)} tensors"
    for network in NETWORKS if name == "checkpoint" else [name]:
        yield from (f"    {line}" for line in describe_network(network, header))
    if set(header.dtypes.values()) == {"F16"} and name != "checkpoint" and "." not in file.stem:
        yield "    float16, although the name says float32"


def describe_network(name: str, header: Header) -> Iterator[str]:
    """Report the tensors, parameters, and dtypes of one network in a file, and whether it is there twice."""
    used = KEYS[name](header.shapes).values()
    if not used:
        yield f"{name}: none"
        return
    count = sum(prod(header.shapes[key]) for key in used)
    dtypes = sorted({header.dtypes[key] for key in used})
    yield f"{name}: {len(used)} tensors, {count:,} parameters, {' and '.join(dtypes)}"
    if name == "unet":
        average = {average_key(key) for key in network_keys(header.shapes, UNET)}
        if present := average & header.shapes.keys():
            state = "complete and used" if present == average else "incomplete and not used"
            yield f"a second UNet, the moving average (EMA): {state}"


def read_lora(file: Path) -> LoRA:
    """Read a LoRA for networks of SD 1.5's sizes; its file does not record the model it is for."""
    read_header(lora_file.find_file(file))  # raises for one that cannot be read, before networks are built
    with torch.device("meta"):
        unet = NETWORKS["unet"](weights.SINGLE_FILE["unet"])
        text_encoder = NETWORKS["text_encoder"](weights.SINGLE_FILE["text_encoder"])
    return lora_file.read(file, unet, text_encoder)
