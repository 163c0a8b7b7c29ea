"""Load tensors from safetensors files and pickles, and write files and folders atomically."""

import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minidrag.weights.checkpoint import PICKLES, read_shapes

Tensors = dict[str, Tensor]


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or folder, and rename it to `target` on success.

    Raises FileExistsError if `target` exists and OSError if writing fails, leaving nothing behind.
    """
    if target.exists():
        raise FileExistsError(f"{target} already exists: delete it or choose another name")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: {target.parent} is not a folder")
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        unfinished.rename(target)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {target}: {error}") from error
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        unfinished.unlink(missing_ok=True)


def save(tensors: Tensors, file: Path) -> None:
    """Write a safetensors file. Tensors that share memory are copied."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unshared, seen = {}, set()
    for name, tensor in tensors.items():
        shared = tensor.untyped_storage().data_ptr() in seen
        seen.add(tensor.untyped_storage().data_ptr())
        unshared[name] = (
            tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
        )
    save_file(unshared, file, metadata={"format": "pt"})


def load(file: Path) -> Tensors:
    """Load the tensors of a safetensors file or a pickle. Never unpickles anything but tensors."""
    if file.suffix not in PICKLES:
        read_shapes(file)
        return load_file(file)
    try:
        values = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} contains Python objects, which can run code, or is not a PyTorch pickle: "
            "use a .safetensors file of the same model"
        ) from error
    except Exception as error:  # damaged files raise many exception types
        raise ValueError(f"{file} is truncated or not a PyTorch pickle: download it again") from error
    while isinstance(values, dict) and isinstance(values.get("state_dict"), dict):
        values = values["state_dict"]
    items = values.items() if isinstance(values, dict) else ()
    tensors = {str(name): value for name, value in items if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{file} has no named tensors: expected a model file")
    return tensors
