"""Pickles: tensors as torch.load gives them, nothing run, odd kinds and sizes refused in little memory."""

import collections
import io
import pickle
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, _utils, nn

from weights_convert.pickles import load_tensors

STATE: dict[str, Any] = {
    "bfloat16": torch.randn(3).bfloat16(),
    "bool": torch.tensor([True, False]),
    "double": torch.randn(2, 3).double(),
    "empty": torch.zeros(0, 4),
    "half": torch.randn(4).half(),
    "long": torch.arange(5),
    "parameter": nn.Parameter(torch.randn(2, 2)),
    "row": torch.arange(12.0).reshape(3, 4)[1],
    "scalar": torch.tensor(3.5),
    "transposed": torch.arange(12.0).reshape(3, 4).T,
    "uint8": torch.arange(4, dtype=torch.uint8),
}
FLOAT8 = {"float8": torch.randn(4).to(torch.float8_e4m3fn)}  # only a zip archive has it


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.filterwarnings("ignore")
def test_tensors_are_those_of_torch_load(tmp_path: Path, zipped: bool, protocol: int) -> None:
    layer = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    state = collections.OrderedDict(STATE | dict(layer.state_dict()) | (FLOAT8 if zipped else {}))
    file = tmp_path / "x.pt"
    torch.save(state, file, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    found, reference = load_tensors(file), torch.load(file, weights_only=False)
    assert list(found) == list(reference)
    for name, tensor in reference.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].double(), tensor.detach().double()), name


class Callback:
    """Of a program that is not there when the file is read, which it would run."""

    ran: list[object] = []

    def __init__(self, count: int = 0):
        self.count, self.items = count, {"best": [torch.ones(1)]}

    def __reduce__(self) -> tuple[Any, ...]:
        return self.ran.append, (self.count,), {"items": self.items}


class Slots:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = {Callback: 3}


class Words(list[str]):
    pass


@pytest.mark.parametrize("zipped", [True, False])
def test_everything_but_the_tensors_gets_a_stand_in(tmp_path: Path, zipped: bool) -> None:
    checkpoint = {
        "callbacks": {Callback: {"x": Callback(1)}, "list": [Callback(2), Slots(), Words(["a"])]},
        "state_dict": {"w": torch.arange(3.0), "note": "text", "odd": Callback(4)},
        "optimizer_states": [{"state": {0: torch.zeros(2)}, "lr": collections.defaultdict(list, a=[1])}],
        "hyper_parameters": {
            "path": Path("x"),
            "dtype": torch.float16,
            "device": torch.device("cpu"),
            "n": {1, 2},
        },
        "epoch": 3,
    }
    torch.save(checkpoint, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    Callback.ran.clear()
    found = load_tensors(tmp_path / "x.ckpt")
    assert found.keys() == {"w"} and found["w"].tolist() == [0, 1, 2] and not Callback.ran


def itself() -> dict[str, Any]:
    state: dict[str, Any] = {"w": torch.zeros(2)}
    state["state_dict"] = state
    return state


def overlapping() -> dict[str, Tensor]:
    whole = torch.zeros(100_000)
    return {str(i): whole for i in range(100)}


with_numbers = torch.tensor([1.0, 2.0])
ODD: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (lambda: {"w": torch.eye(3).to_sparse()}, "tensors made by _rebuild_sparse_tensor"),
    "sparse rows": (lambda: {"w": torch.eye(3).to_sparse_csr()}, "tensors made by _rebuild_sparse_tensor"),
    "quantized": (
        lambda: {"w": torch.quantize_per_tensor(with_numbers, 0.1, 0, torch.qint8)},
        "tensors made by _rebuild_qtensor",
    ),
    "meta": (
        lambda: {"w": torch.zeros(10**9, 10**3, device="meta")},
        "tensors made by _rebuild_meta_tensor_no_storage",
    ),
    "nested": (
        lambda: {"w": torch.nested.nested_tensor([with_numbers, with_numbers])},
        "tensors made by _rebuild_nested_tensor",
    ),
    "expanded": (
        lambda: {"w": torch.zeros(1).expand(10**6, 10**6)},
        "but its tensors 4,000,000,000,000",
    ),
    "complex": (lambda: {"w": with_numbers * 1j}, "the tensor w in .* is complex"),
    "complex of 16 bits": (lambda: {"w": torch.zeros(2, dtype=torch.complex32)}, "w in .* is complex"),
    "negative view": (lambda: {"w": (with_numbers * 1j).conj().imag}, "w in .* is complex or a view of one"),
    "conjugate view": (lambda: {"w": (with_numbers * 1j).conj()}, "w in .* is complex or a view of one"),
    "overlapping": (overlapping, "but its tensors 40,000,000"),
    "a module": (lambda: nn.Linear(2, 2), "no named tensors"),
    "a list": (lambda: [torch.zeros(2)], "no named tensors"),
    "nothing": (dict, "no named tensors"),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("ignore")
def test_odd_tensors_are_refused_by_their_kind(tmp_path: Path, kind: str) -> None:
    make, message = ODD[kind]
    torch.save(make(), tmp_path / "x.pt")
    refused(tmp_path / "x.pt", message)


def test_a_state_dict_that_contains_itself(tmp_path: Path) -> None:
    torch.save(itself(), tmp_path / "x.pt")
    assert load_tensors(tmp_path / "x.pt")["w"].tolist() == [0, 0]


@pytest.mark.filterwarnings("ignore")
def test_a_program_is_refused(tmp_path: Path) -> None:
    """torch.load would run it; weights_only=False is all that it takes."""
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "it is a TorchScript program")


def test_a_tar_archive_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyTorch wrote in 2016."""
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("opened a tar archive"))
    with tarfile.TarFile(tmp_path / "x.pt", "w") as opened:
        for name in ("storages", "tensors", "pickle"):
            opened.addfile(tarfile.TarInfo(name))
    refused(tmp_path / "x.pt", "is truncated or not a PyTorch pickle")


def test_no_state_is_set(tmp_path: Path) -> None:
    """A pickle could set attributes of functions that are used again."""
    pickled = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}(X\x01\x00\x00\x00aK\x01ub."
    refused(archive(tmp_path / "x.pt", pickled), "no named tensors")
    assert not vars(_utils._rebuild_tensor_v2)


def refused(file: Path, message: str) -> None:
    """Assert that a file is refused in one sentence that names it, in little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as caught:
            load_tensors(file)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def archive(file: Path, pickled: bytes, *, compression: int = zipfile.ZIP_STORED, size: int = 8) -> Path:
    with zipfile.ZipFile(file, "w", compression) as opened:
        opened.writestr("x/data.pkl", pickled)
        opened.writestr("x/version", "3\n")
        with opened.open("x/data/0", "w") as storage:
            for start in range(0, size, 2**20):
                storage.write(bytes(min(2**20, size - start)))
    return file


def described(size: object, stride: object, offset: object = 0, count: int = 2) -> bytes:
    """A pickle that describes a tensor of a storage of `count` numbers."""
    rebuild, place = torch.zeros(1).__reduce_ex__(2)[0], object()

    class Tensors(pickle.Pickler):
        def persistent_id(self, obj: object) -> object:
            return ("storage", torch.FloatStorage, "0", "cpu", count) if obj is place else None

    class Fake:
        def __reduce__(self) -> Any:
            return rebuild, (place, offset, size, stride, False, collections.OrderedDict())

    buffer = io.BytesIO()
    Tensors(buffer, 2).dump({"w": Fake()})
    return buffer.getvalue()


LAYOUTS = {
    "right": ((2,), (1,), 0),
    "beyond": ((2,), (4,), 0),
    "offset": ((2,), (1,), 1),
    "negative": ((2,), (-1,), 1),
    "many": ((10**12,), (1,), 0),
    "float": ((2.0,), (1,), 0),
    "dimensions": ((2,), (1, 1), 0),
    "text": ("ab", (1,), 0),
    "a storage beyond the file": ((10**6,), (1,), 0, 10**6),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts_outside_of_the_storage_are_refused(tmp_path: Path, kind: str) -> None:
    file = archive(tmp_path / "x.pt", described(*LAYOUTS[kind]))
    if kind == "right":
        assert load_tensors(file)["w"].tolist() == [0, 0]
    else:
        refused(file, "is truncated or not a PyTorch pickle")


def test_an_archive_that_unpacks_to_much_is_refused(tmp_path: Path) -> None:
    bomb = archive(tmp_path / "x.pt", described((2,), (1,)), compression=zipfile.ZIP_DEFLATED, size=3 * 10**8)
    assert bomb.stat().st_size < 10**6
    refused(bomb, r"it would unpack to 300,000,\d+ bytes")


def test_an_archive_with_an_impossible_place_is_refused(tmp_path: Path) -> None:
    file = archive(tmp_path / "x.pt", described((2,), (1,)))
    content = bytearray(file.read_bytes())
    entry = content.rindex(b"PK\x01\x02") + 42  # of the storage: where in the file it begins
    content[entry : entry + 4] = b"\xff" * 4
    file.write_bytes(content)
    refused(file, "is truncated or not a PyTorch pickle")


STREAMS = {
    "empty": b"",
    "web page": b"<!DOCTYPE html>",
    "a number": pickle.dumps(3),
    "magic alone": pickle.dumps(0x1950A86A20F9469CFC6C, 2),
    "a text without an end": b"c" + b"x" * 10**7,
    "a large index": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "a large text": b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"x.",
    "a large array of bytes": b"\x80\x05\x96" + (2**33).to_bytes(8, "little") + b"x.",
    "zip": b"PK\x03\x04" + bytes(100),
    "zip without a pickle": b"PK\x05\x06" + bytes(18),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_broken_files_are_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "x.ckpt").write_bytes(STREAMS[kind])
    refused(tmp_path / "x.ckpt", "is truncated or not a PyTorch pickle")


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    for zipped in (True, False):
        torch.save({"w": torch.zeros(1000)}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
        data = (tmp_path / "x.pt").read_bytes()
        for end in (100, len(data) // 2, len(data) - 30):
            (tmp_path / "x.pt").write_bytes(data[:end])
            refused(tmp_path / "x.pt", "truncated")
