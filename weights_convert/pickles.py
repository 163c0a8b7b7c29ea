"""Tensors from PyTorch's pickles, of which nothing is run.

A pickle names the functions and classes to build its objects with. Here only those that describe a tensor are
known, and they are ours; every other name gets an inert stand-in, so that the tensors of a training
checkpoint can be read without its callbacks. Kinds and sizes are checked before any number is read.
"""

import errno
import io
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from minidrag.system.files import SparingUnpickler, check_regular

MAGIC = 0x1950A86A20F9469CFC6C  # first object of a file by PyTorch before 1.6, which is not a zip archive
PICKLE_LIMIT = 8 * 2**20  # bytes of descriptions, each an object; those of Stable Diffusion are below 1 MB
STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
    "UntypedStorage": torch.uint8,
}
DTYPES = {*STORAGES.values(), torch.uint16, torch.uint32, torch.uint64}
DTYPES |= {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}
STORAGES |= {"ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128}
ODD = {  # functions that build other kinds of tensors
    "_rebuild_sparse_tensor": "sparse",
    "_rebuild_sparse_csr_tensor": "sparse",
    "_rebuild_qtensor": "quantized",
    "_rebuild_meta_tensor_no_storage": "without numbers (on the meta device)",
    "_rebuild_nested_tensor": "nested",
    "_rebuild_wrapper_subclass": "of a class of its own",
    "_rebuild_device_tensor_from_numpy": "of another device",
    "_rebuild_device_tensor_from_cpu_tensor": "of another device",
}


class Storage(NamedTuple):
    """Numbers that tensors share."""

    key: str
    dtype: torch.dtype
    count: int  # of numbers
    place: str  # device


Places = dict[str, tuple[int, int]]  # first byte and number of bytes of each storage in a file


class Described(NamedTuple):
    """A tensor by its storage and the layout in it; or why it cannot be read."""

    storage: Storage | None
    offset: Any = 0
    size: Any = ()
    stride: Any = ()
    dtype: torch.dtype = torch.float32
    odd: str = ""


class StandIn:
    """Takes the place of any object, with whatever it would have been built from, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "StandIn":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any):
        pass

    def ignore(self, *_: Any, **__: Any) -> "StandIn":
        return self

    __call__ = __setstate__ = __setitem__ = append = extend = add = update = ignore


class Items(dict[Any, Any]):
    """A dictionary that can be told its attributes, which are not kept."""

    def __setstate__(self, state: Any) -> None:
        pass


def plain(storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> Described:
    """A tensor; after requires_grad and hooks may come what turns the sign of its numbers."""
    if more[2:] and isinstance(more[2], dict) and any(more[2].values()):
        return Described(None, odd="a view with other signs")
    if not isinstance(storage, Storage):
        return Described(None, odd="broken")
    return Described(storage, offset, size, stride, storage.dtype)


def typed(storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> Described:
    """A tensor whose storage has bytes; its dtype comes after requires_grad and hooks."""
    found, dtype = plain(storage, offset, size, stride, *more[:2], *more[3:]), more[2]
    return found._replace(dtype=dtype) if isinstance(dtype, torch.dtype) else Described(None, odd="broken")


def first(tensor: Any, *_: Any) -> Any:
    return tensor


def of_class(function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    known = function in (plain, typed, first) and isinstance(arguments, tuple)
    return function(*arguments) if known else Described(None, odd="of a class of its own")


KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): Items,
    ("collections", "defaultdict"): lambda *_: Items(),
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_parameter"): first,
    ("torch._utils", "_rebuild_parameter_with_state"): first,
    ("torch._utils", "_rebuild_tensor"): plain,
    ("torch._utils", "_rebuild_tensor_v2"): plain,
    ("torch._utils", "_rebuild_tensor_v3"): typed,
    ("torch._tensor", "_rebuild_from_type_v2"): of_class,
}


class Unpickler(SparingUnpickler):
    """Builds descriptions of tensors and stand-ins."""

    def __init__(self, file: Any):
        super().__init__(file, encoding="utf-8", errors="replace")
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.cuda", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if module == "torch._utils" and name in ODD:
            return lambda *_: Described(None, odd=ODD[name])
        return KNOWN.get((module, name), StandIn)

    def persistent_load(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            return StandIn()
        _, dtype, key, place, count, *view = pid
        whole = isinstance(dtype, torch.dtype) and type(count) is int and count >= 0 and not any(view)
        if not whole:
            return StandIn()
        return self.storages.setdefault(str(key), Storage(str(key), dtype, count, str(place)))


class Limited:
    """The beginning of a file, for the pickles in it."""

    def __init__(self, file: BinaryIO):
        self.file = file

    def read(self, count: int) -> bytes:
        return self.file.read(min(count, self.left()))

    def readline(self) -> bytes:
        return self.file.readline(self.left())

    def left(self) -> int:
        return max(PICKLE_LIMIT - self.file.tell(), 0)


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Read the named tensors of a pickle; raises ValueError for a broken one, or tensors of an odd kind."""
    size = check_regular(file).stat().st_size
    try:
        with open(file, "rb") as opened:
            zipped = zipfile.is_zipfile(opened)
            opened.seek(0)
            values, places = read_zip(opened, size) if zipped else read_stream(opened, size)
    except Exception as error:  # damaged files raise many exception types
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that: a place before the start
            raise
        reason = f" ({error})" if isinstance(error, pickle.UnpicklingError) else ""
        raise ValueError(f"{file} is truncated or not a PyTorch pickle{reason}: download it again") from error
    described = dict(named_tensors(values, file))
    if not described:
        raise ValueError(f"{file} has no named tensors: expected a model file")
    for name, tensor in described.items():
        if problem := problem_of(tensor, places):
            raise ValueError(f"the tensor {name} in {file} is {problem}: save plain tensors, on the CPU")
    written = sum(prod(tensor.size) * tensor.dtype.itemsize for tensor in described.values())
    if written > 4 * size:
        raise ValueError(f"{file} has {size:,} bytes, but its tensors {written:,}: save each once")
    return read_numbers(file, described, places)


def named_tensors(values: Any, file: Path) -> Iterator[tuple[str, Described]]:
    """The tensors of a state dict, or of the one in a training checkpoint."""
    seen = []
    while isinstance(values, dict) and isinstance(values.get("state_dict"), dict):
        if any(values is one for one in seen):
            raise ValueError(f"the state_dict in {file} contains itself: save its tensors alone")
        seen.append(values)
        values = values["state_dict"]
    for name, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, Described) and isinstance(name, (str, int)):
            yield str(name), value


def read_zip(opened: BinaryIO, size: int) -> tuple[Any, Places]:
    """Objects of a file by PyTorch 1.6 or later, and the places of its storages."""
    with zipfile.ZipFile(opened) as archive:
        files = {info.filename: info for info in archive.infolist()}
        unpacked = sum(info.file_size for info in archive.infolist())
        if unpacked > size:
            raise pickle.UnpicklingError(f"it would unpack to {unpacked:,} bytes")
        if any(info.compress_type != zipfile.ZIP_STORED for info in files.values()):
            raise pickle.UnpicklingError("it is compressed")
        main = next(info for name, info in files.items() if name.rpartition("/")[2] == "data.pkl")
        root = main.filename.removesuffix("data.pkl")
        if main.file_size > PICKLE_LIMIT:
            raise pickle.UnpicklingError("it describes too much")
        if f"{root}byteorder" in files and archive.read(f"{root}byteorder") == b"big":
            raise pickle.UnpicklingError("its numbers are big-endian")
        values = Unpickler(io.BytesIO(archive.read(main))).load()
    places = {}
    for name, info in files.items():
        if name.startswith(f"{root}data/"):
            opened.seek(info.header_offset + 26)  # in the entry's own header: lengths of its name and extras
            start = info.header_offset + 30 + sum(struct.unpack("<2H", opened.read(4)))
            places[name.removeprefix(f"{root}data/")] = (start, min(info.file_size, max(size - start, 0)))
    return values, places


def read_stream(opened: BinaryIO, size: int) -> tuple[Any, Places]:
    """Objects of a file by PyTorch before 1.6, and the places of its storages."""
    limited = Limited(opened)
    if Unpickler(limited).load() != MAGIC:
        raise ValueError("another file")
    for _ in ("protocol", "system"):
        Unpickler(limited).load()
    unpickler = Unpickler(limited)
    values, places = unpickler.load(), {}
    for key in Unpickler(limited).load():
        (count,) = struct.unpack("<q", opened.read(8))
        length = count * unpickler.storages[str(key)].dtype.itemsize
        places[str(key)] = (opened.tell(), length)
        if not 0 <= length <= size - opened.tell():
            raise ValueError("truncated")
        opened.seek(length, io.SEEK_CUR)
    return values, places


def problem_of(tensor: Described, places: Places) -> str:
    """A word on what keeps a tensor from being read; "" for nothing."""
    storage, numbers = tensor.storage, [tensor.offset]
    if tensor.odd or storage is None:
        return tensor.odd
    for shape in (tensor.size, tensor.stride):
        numbers += shape if isinstance(shape, (list, tuple)) else [None]
    if any(type(number) is not int or number < 0 for number in numbers):
        return "broken"
    if tensor.dtype not in DTYPES:
        return f"of the kind {str(tensor.dtype).removeprefix('torch.')}"
    if storage.place == "meta":
        return "without numbers (on the meta device)"
    if storage.key not in places or len(tensor.size) != len(tensor.stride):
        return "broken"
    stored, count = places[storage.key][1] // tensor.dtype.itemsize, prod(tensor.size)
    if count > stored:
        return f"expanded: it has {count:,} numbers, of which {stored:,} are stored"
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.size, tensor.stride, strict=True))
    return "larger than what is stored of it" if count and last >= stored else ""


def read_numbers(file: Path, described: Mapping[str, Described], places: Places) -> dict[str, Tensor]:
    flats: dict[tuple[str, torch.dtype], Tensor] = {}
    tensors = {}
    with open(file, "rb") as opened:
        for name, tensor in described.items():
            assert tensor.storage is not None
            key = tensor.storage.key, tensor.dtype
            if key not in flats:
                start, length = places[key[0]]
                buffer = bytearray(length - length % tensor.dtype.itemsize)
                opened.seek(start)
                opened.readinto(buffer)
                flats[key] = torch.frombuffer(buffer, dtype=tensor.dtype) if buffer else torch.empty(0)
            flat = flats[key].to(tensor.dtype)
            tensors[name] = flat.as_strided(tensor.size, tensor.stride, tensor.offset)
    return tensors
