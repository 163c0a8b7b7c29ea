"""Files of weights: safetensors and the JSON beside them.

A network's tensors are in one safetensors file, or in several, the shards, that an index lists.
"""

import errno
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minidrag.system.files import check_regular, read_json

Json = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

PICKLES = {".bin", ".ckpt", ".pt", ".pth"}
FORMATS = {  # of other programs, by suffix
    ".gguf": "a GGUF file",
    ".h5": "a TensorFlow file",
    ".msgpack": "a Flax file",
    ".onnx": "an ONNX file",
}
LAYOUT = "give the model in PyTorch's layout, as .safetensors"
INDEX = ".safetensors.index"  # model.safetensors.index.json, of a variant model.safetensors.index.fp16.json
SHARD_NAME = re.compile(r"[^/\\:\0]+\.(safetensors|bin)")  # in the folder of the index
SHARD = re.compile(r"-\d{5}-of-(\d{5})\.")  # model-00001-of-00007.safetensors
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")


class Header(NamedTuple):
    """Shapes and dtypes of the tensors in a safetensors file, or in the shards of an index."""

    file: Path  # the safetensors file or the index
    shapes: Shapes  # by key
    dtypes: dict[str, str]  # by key
    metadata: dict[str, str]  # of the file, or of the first shard
    shards: dict[str, Path]  # the file that has a tensor, by key


def read_object(path: Path, default: Json | None = None) -> Json:
    """Read a JSON object; default: returned for a missing file."""
    if default is not None and not path.exists():
        return default
    return check_object(read_json(path), str(path))


def check_object(values: Any, name: str) -> Json:
    if not isinstance(values, dict):
        raise ValueError(f"{name} is not a JSON object: download it again")
    return values


def weight_file(stem: Path, infix: str) -> Path | None:
    """Return the file or else the index with a network's tensors. infix: "" or ".fp16"."""
    whole = stem.with_name(f"{stem.name}{infix}.safetensors")
    index = stem.with_name(f"{stem.name}{INDEX}{infix}.json")
    return next((file for file in (whole, index) if file.exists()), None)


def read_header(file: Path) -> Header:
    """Read the header of a safetensors file, or of every shard of an index.

    Raises ValueError for any other or a damaged file and OSError for one that is missing.
    """
    if file.suffix == ".json":
        return read_sharded(file)
    check_not_shard(file)
    return read_whole(file)


def check_not_shard(file: Path) -> None:
    """Raise ValueError for the name of one shard of several."""
    shard = SHARD.search(file.name)
    if shard and int(shard[1]) > 1:
        raise ValueError(f"{file} is one of {int(shard[1])} shards: give their folder")


def read_whole(file: Path) -> Header:
    """Read the header of one safetensors file."""
    if file.suffix in PICKLES:
        raise ValueError(f"{file} is a pickle, which can run code when it is loaded: {conversion(file)}")
    size = check_regular(file).stat().st_size
    try:
        with safe_open(file, "np") as opened:  # PyTorch's would reserve memory for the whole file
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
            shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
            dtypes = {key: str(part.get_dtype()) for key, part in slices.items()}
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(diagnose(file, size)) from error
    return Header(file, shapes, dtypes, metadata, dict.fromkeys(shapes, file))


def conversion(file: Path) -> str:
    return f"convert it with `python -m weights_convert safetensors {file} OUT`"


def diagnose(file: Path, size: int) -> str:
    """Say what a file is that is not a safetensors file, and what to do with it."""
    # Only now: a valid file can begin with any eight bytes, the length of its header.
    with open(file, "rb") as opened:
        start = opened.read(40)
    suffix = ".gguf" if start.startswith(b"GGUF") else ".h5" if start.startswith(b"\x89HDF") else file.suffix
    if suffix in FORMATS:
        return f"{file} is {FORMATS[suffix]}: {LAYOUT}"
    if start.startswith(PICKLE_STARTS):
        return f"{file} is a pickle despite its suffix: rename it to .ckpt and {conversion(file)}"
    if start.startswith(b"version https://git-lfs"):
        return f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull`"
    return f"{file} is truncated or not a safetensors file: download it again (it has {size:,} bytes)"


def read_index(index: Path) -> dict[str, Path]:
    """Read the shard of each tensor, by its key; raises ValueError for names that lead out of the folder."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map, so it is not an index of shards: download it again")
    for name in weight_map.values():
        if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
            raise ValueError(f"{index} names a shard {name!r}: expected the name of a file beside it")
    return {key: index.with_name(name) for key, name in weight_map.items()}


def find_shards(index: Path) -> dict[str, Path]:
    """Read the shard of each tensor, by its key; raises FileNotFoundError if one is missing."""
    shards = read_index(index)
    for shard in sorted(set(shards.values())):
        if not shard.exists():
            raise FileNotFoundError(f"{shard} is missing, one of the shards of {index}: download it again")
    return shards


def read_sharded(index: Path) -> Header:
    """Read the headers of all shards of an index, in which every tensor of the index must be."""
    shards = find_shards(index)
    headers = {shard: read_whole(shard) for shard in sorted(set(shards.values()))}
    for key, shard in shards.items():
        if key not in headers[shard].shapes:
            raise ValueError(f"the tensor {key} is not in {shard}, where {index} has it: download both again")
    shapes = {key: headers[shard].shapes[key] for key, shard in shards.items()}
    dtypes = {key: headers[shard].dtypes[key] for key, shard in shards.items()}
    return Header(index, shapes, dtypes, next(iter(headers.values())).metadata, shards)


def read_tensor(header: Header, key: str) -> Tensor:
    # Opened for each tensor: a file that stays mapped keeps all pages that were read in memory.
    file = header.shards[key]
    try:
        with safe_open(file, "pt") as opened:
            return opened.get_tensor(key)
    except RuntimeError as error:  # PyTorch's, for a file larger than the memory
        raise OSError(errno.ENOMEM, str(error), str(file)) from error


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; raises OSError if that fails."""
    path.touch()  # with the permissions that the umask leaves; safetensors 0.8 would make it private
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file(dict(tensors), path, dict(metadata))
    except SafetensorError as error:  # a full disk, for example
        match = re.search(r"os error (\d+)", str(error))
        code = int(match[1]) if match else errno.EIO
        raise OSError(code, os.strerror(code) if match else str(error), str(path)) from error
    path.chmod(mode)
