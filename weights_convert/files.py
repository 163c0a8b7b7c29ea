"""Reading whatever holds tensors, and writing so that a target is there whole or not at all."""

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
    """Gives a path beside `target` to write a file or a folder to; it becomes `target` once all went well.

    Raises FileExistsError rather than replace anything, OSError where writing fails; nothing is left then.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists already: remove it or give another name")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} is no folder, so {target.name} cannot be written there")
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        unfinished.rename(target)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{target} could not be written, nothing of it is left: {error}") from error
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        unfinished.unlink(missing_ok=True)


def save(tensors: Tensors, file: Path) -> None:
    """Writes a safetensors file; tensors that share memory are written each in full."""
    file.parent.mkdir(parents=True, exist_ok=True)
    whole, seen = {}, set()
    for name, tensor in tensors.items():
        shared = tensor.untyped_storage().data_ptr() in seen
        seen.add(tensor.untyped_storage().data_ptr())
        whole[name] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
    save_file(whole, file, metadata={"format": "pt"})


def load(file: Path) -> Tensors:
    """The tensors of a safetensors file or a pickle; of the latter nothing but tensors is ever unpickled."""
    if file.suffix not in PICKLES:
        read_shapes(file)
        return load_file(file)
    try:
        values = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds Python objects beside its tensors, or is no pickle of PyTorch; objects can run "
            "code, so it is not opened: look for a .safetensors file of the same model"
        ) from error
    except Exception as error:  # whatever damaged data makes PyTorch raise
        raise ValueError(f"{file} is cut short or no pickle of PyTorch: fetch it again") from error
    while isinstance(values, dict) and isinstance(values.get("state_dict"), dict):
        values = values["state_dict"]
    items = values.items() if isinstance(values, dict) else ()
    tensors = {str(name): value for name, value in items if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{file} holds no named tensors, so it is no model file")
    return tensors
