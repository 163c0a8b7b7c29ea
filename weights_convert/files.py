"""Load tensors from safetensors files and pickles, and write files and folders atomically."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from minidrag.system.files import unfinished
from minidrag.weights.checkpoint import FLOATS
from minidrag.weights.files import PICKLES, Header, find_shards, read_header, read_tensor, save_tensors
from minidrag.weights.load import single_file_schedule
from weights_convert.pickles import load_tensors

Tensors = dict[str, Tensor]
PICKLE_INDEX = ".bin.index.json"
INTEGERS = {"BOOL", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64"}  # safetensors' names, as FLOATS


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or folder, and rename it to `target` on success.

    Raises FileExistsError if `target` exists and OSError if writing fails, leaving nothing behind.
    """
    check_free(target)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: {target.parent} is not a folder")
    try:
        with unfinished(target.parent) as part:
            yield part / target.name
            check_free(target)
            if (part / target.name).is_file():
                target.touch(exist_ok=False)  # of two processes, one succeeds; a folder replaces no full one
            (part / target.name).rename(target)
    except OSError as error:
        if error.errno is None:  # not of the system but a sentence of ours, on what was read
            raise
        raise OSError(f"cannot write {target}: {error.strerror or error}") from error


def check_free(target: Path) -> None:
    if os.path.lexists(target):  # a link that leads nowhere is someone's too
        raise FileExistsError(f"{target} already exists: delete it or choose another name")


def save(tensors: Tensors, file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. Tensors that share memory are copied."""
    file.parent.mkdir(parents=True, exist_ok=True)
    separate = {}
    storages = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        copy = storage in storages
        separate[name] = tensor.clone(memory_format=torch.contiguous_format) if copy else tensor.contiguous()
        storages.add(storage)
    save_tensors(separate, file, metadata or {"format": "pt"})


def load(file: Path) -> Tensors:
    """Load the tensors of a safetensors file, a pickle, or all shards of an index; run nothing."""
    if file.name.endswith(PICKLE_INDEX):
        shards = find_shards(file)
        loaded = {shard: load(shard) for shard in set(shards.values())}
        for key, shard in shards.items():
            if key not in loaded[shard]:
                raise ValueError(f"the tensor {key} is not in {shard}, where {file} has it")
        return {key: loaded[shard][key] for key, shard in shards.items()}
    if file.suffix in PICKLES:
        return load_tensors(file)
    header = read_header(file)
    for key, dtype in header.dtypes.items():
        if dtype not in {*FLOATS, *INTEGERS}:
            raise ValueError(f"the tensor {key} in {file} is {dtype}, which cannot be converted")
    return {key: read_tensor(header, key) for key in header.shapes}


def load_checkpoint(file: Path) -> Tensors:
    """Load a file that may be a whole model; schedule keys in other places become empty tensors."""
    tensors = load(file)
    schedule = single_file_schedule(Header(file, dict.fromkeys(tensors, ()), {}, read_metadata(file), {}))
    marks = {
        "v_pred": schedule["prediction_type"] == "v_prediction",
        "ztsnr": schedule["rescale_betas_zero_snr"],
    }
    return tensors | {mark: torch.zeros(0) for mark, present in marks.items() if present}


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file; pickles have none."""
    pickled = file.suffix in PICKLES or file.name.endswith(PICKLE_INDEX)
    return {} if pickled else read_header(file).metadata
