"""Tensors from PyTorch's pickles, of which nothing is run.

A pickle names the functions and classes that build its objects. `torch.load` gets an unpickler that knows
PyTorch's own for plain tensors and puts an inert stand-in in the place of every other, so that the tensors of
a training checkpoint can be read without its callbacks.
"""

import collections
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, _utils

from minidrag.system.files import check_regular
from minidrag.system.pickles import SparingUnpickler

ZIP = b"PK\x03\x04"  # begins the files of PyTorch 1.6 and later
LIMIT = 8 * 2**20  # bytes of descriptions, each an object; those of Stable Diffusion are below 1 MB
NESTED = 4  # how deep a training checkpoint may have its state_dict


class Unsupported(Exception):
    """A sentence on a valid pickle that cannot be converted."""


class StandIn:
    """Any other object of a pickle: takes all that it is built from, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "StandIn":
        return super().__new__(cls)

    def ignore(self, *_: Any, **__: Any) -> None:
        pass

    __init__ = __call__ = __setitem__ = append = extend = add = ignore


class Bytes:
    """The storage type of a storage that has none."""

    dtype = torch.uint8


REBUILD = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3")  # of torch._utils
KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda function, kind, arguments, *_: function(*arguments),
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *_: tensor,
    ("torch.storage", "UntypedStorage"): Bytes,
}


class Beginning:
    """The first bytes of a file, where its pickles are; a damaged one may ask for any number of them."""

    def __init__(self, file: Any):
        self.file = file

    def read(self, count: int) -> bytes:
        return self.file.read(min(count, self.rest()))

    def readline(self) -> bytes:
        return self.file.readline(self.rest())

    def rest(self) -> int:
        return max(LIMIT - self.file.tell(), 0)


class Unpickler(SparingUnpickler):
    """Builds plain tensors, containers, and stand-ins; `torch.load` adds the storages."""

    def __init__(self, file: Any, **options: Any):
        super().__init__(Beginning(file), **options)

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if module == "torch._utils" and name in REBUILD:
            return getattr(_utils, name)
        if (module, name) not in KNOWN and name.startswith("_rebuild_"):
            raise Unsupported(f"it has tensors made by {name}: save plain tensors, on the CPU")
        return KNOWN.get((module, name), StandIn)

    def load_build(self) -> None:
        self.stack.pop()  # type: ignore[attr-defined]  # a state, which no plain tensor has

    dispatch = {**SparingUnpickler.dispatch, pickle.BUILD[0]: load_build}


class Inert:
    """The parts of the module `pickle` that `torch.load` calls."""

    Unpickler = Unpickler

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        return Unpickler(file, **options).load()


OPTIONS: dict[str, Any] = {
    "encoding": "utf-8",
    "errors": "replace",
    "map_location": "cpu",
    "pickle_module": Inert,
    "weights_only": False,
}


class Stream(io.BufferedReader):
    """A file without a descriptor: through one, `torch.load` would try to unpack a tar archive."""

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Read the named tensors of a pickle, those of an archive lazily.

    Raises ValueError for a damaged file and for tensors that are not plain.
    """
    size = check_regular(file).stat().st_size
    with Stream(io.FileIO(file)) as opened:
        try:
            values = load(file, size) if opened.peek()[: len(ZIP)] == ZIP else torch.load(opened, **OPTIONS)
        except Unsupported as error:
            raise ValueError(f"{file} cannot be converted: {error}") from None
        except Exception as error:  # damaged files raise many exception types
            raise ValueError(f"{file} is truncated or not a PyTorch pickle: download it again") from error
    for _ in range(NESTED):
        if isinstance(values, dict) and isinstance(values.get("state_dict"), dict):
            values = values["state_dict"]
    pairs = values.items() if isinstance(values, dict) else ()
    tensors = {str(name): tensor for name, tensor in pairs if isinstance(tensor, Tensor)}
    check(file, size, tensors)
    return tensors


def load(file: Path, size: int) -> Any:
    """Load the objects of a zip archive that unpacks to at most its size and has no program."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if any(entry.filename.endswith("constants.pkl") for entry in entries):
        raise Unsupported("it is a TorchScript program: save its state_dict")  # torch.load would run it
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > size:
        raise Unsupported(f"it would unpack to {unpacked:,} bytes")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise Unsupported("it is compressed")
    return torch.load(str(file), mmap=True, **OPTIONS)


def check(file: Path, size: int, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError for no tensors, complex ones, and for overlapping ones that would fill the disk."""
    if not tensors:
        raise ValueError(f"{file} has no named tensors: expected a model file")
    for name, tensor in tensors.items():
        if tensor.is_complex() or tensor.is_neg():
            raise ValueError(f"the tensor {name} in {file} is complex or a view of one: save plain tensors")
    written = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if written > 4 * size:
        raise ValueError(f"{file} has {size:,} bytes, but its tensors {written:,}: save each once")
