"""Every kind of bad input, in every place that takes such a file: one sentence that names it, and no output.

The functions and commands run in this process, with files of a small untrained model.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from minidrag.weights import load as weights
from minidrag.weights import lora_file
from minidrag.weights.load import load_model
from weights_convert.__main__ import main

SIZES = ("unet", "vae", "text_encoder")
DEEP = b"[" * 100_000


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def content(data: bytes) -> Callable[[Path], None]:
    return lambda path: void(path.write_bytes(data))


def hole(path: Path) -> None:
    """A file of 100 GB that takes no space."""
    with open(path, "wb") as opened:
        opened.truncate(10**11)


def void(_: object) -> None:
    pass


SPECIAL: dict[str, Callable[[Path], None]] = {
    "pipe": fifo,
    "endless device": link("/dev/zero"),
    "folder": lambda path: path.mkdir(),
    "hole": hole,
    "empty": content(b""),
    "noise": content(bytes(range(256)) * 4),
    "web page": content(b"<!DOCTYPE html><html></html>"),
    "zip": content(b"PK\x03\x04" + bytes(60)),
    "deep": content(DEEP),
    "deep object": content(b'{"a":' * 100_000),
    "not UTF-8": content(b'{"a": "\xff\xfe"}'),
    "list": content(b"[1, 2]"),
    "number": content(b"3"),
    "null": content(b"null"),
}
JSON = [
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
    "tokenizer/added_tokens.json",
    "tokenizer/tokenizer.json",
]
WEIGHTS = [f"{name}/{weights.STEMS[name]}.safetensors" for name in SIZES]


PYTHON = ("object is not", "has no attribute", "unexpected EOF", "unhashable", "Traceback", "argument '")


def one_line(message: str) -> str:
    """The message, which must be a sentence of ours about a file."""
    assert message and "\n" not in message.strip() and "/" in message and len(message) < 1000, message
    for phrase in (
        "object is not",
        "has no attribute",
        "unexpected EOF",
        "unhashable",
        "Traceback",
        "argument",
    ):
        assert phrase not in message
    return message


@pytest.fixture
def model(untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr("minidrag.weights.hub.snapshot_download", fail)
    return Path(shutil.copytree(untrained, tmp_path / "model"))


@pytest.fixture(scope="module")
def unet(untrained: Path) -> nn.Module:
    return weights.open_model(untrained, None, torch.float32)[0]["unet"].network


def damage(file: Path, kind: str) -> None:
    file.unlink(missing_ok=True)
    SPECIAL[kind](file)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        call()
    error = caught.value
    named = isinstance(error, OSError) and error.strerror
    return one_line(f"{error.filename}: {named}" if isinstance(error, OSError) and named else str(error))


def command(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Last line that a failing command prints."""
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert code == (1 if arguments[0] == "check" else 2), printed
    return one_line((printed.out if arguments[0] == "check" else printed.err).splitlines()[-1])


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", [*JSON, *WEIGHTS])
def test_every_file_of_a_model_folder(
    model: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(model / name, kind)
    message = refusal(lambda: load_model(model, device="cpu"))
    assert Path(name).stem in message
    assert command(capsys, "check", model) == f"minidrag cannot load it: {message}"


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".json", ".gguf", ""])
def test_every_file_given_by_name(
    model: Path, unet: nn.Module, tmp_path: Path, kind: str, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a model, a VAE, or a LoRA, and to every command."""
    file, out = tmp_path / f"given{suffix}", tmp_path / "out"
    SPECIAL[kind](file)
    calls = {
        "model": lambda: load_model(file, device="cpu"),
        "vae": lambda: load_model(model, vae=file, device="cpu"),
        "tokenizer": lambda: load_model(model, tokenizer=file, device="cpu"),
        "lora": lambda: lora_file.read(file, unet, None),
        "left out": lambda: lora_file.left_out(file),
    }
    for name, call in calls.items():
        assert "given" in refusal(call), name
    assert "given" in command(capsys, "check", file)
    for arguments in (["folder"], ["safetensors"], ["half"], ["lora", "--to", "peft"]):
        assert "given" in command(capsys, arguments[0], file, out, *arguments[1:])
        assert not out.exists() and sorted(tmp_path.iterdir()) == [file, tmp_path / "model"]


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_weight_file_of_a_folder_to_convert(
    model: Path, tmp_path: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pickled = Path(name).with_name(Path(name).name.replace("model.safetensors", "model.bin"))
    for file in (name, str(pickled).replace("encoder/model", "encoder/pytorch_model")):
        (model / name).unlink(missing_ok=True)
        damage(model / file, kind)
        for arguments in (["safetensors"], ["half"]):
            command(capsys, *arguments, model, tmp_path / "out")
            assert not (tmp_path / "out").exists()
        if (model / file).is_dir():
            (model / file).rmdir()
        else:
            (model / file).unlink()


def test_untouched_files_pass_everywhere(model: Path, tmp_path: Path) -> None:
    """The refusals above are of the damage, not of the model."""
    assert main(["check", str(model)]) == 0
    for arguments in (["safetensors"], ["half"]):
        assert main([*arguments, str(model), str(tmp_path / arguments[0])]) == 0
        assert load_model(tmp_path / arguments[0], device="cpu", dtype=torch.float16)
    state = load_file(model / WEIGHTS[0])
    torch.save(state, tmp_path / "x.bin")
    assert main(["safetensors", str(tmp_path / "x.bin"), str(tmp_path / "x.safetensors")]) == 0
    assert load_file(tmp_path / "x.safetensors").keys() == state.keys()
    assert json.loads((model / JSON[0]).read_text())["_class_name"] == "UNet2DConditionModel"
