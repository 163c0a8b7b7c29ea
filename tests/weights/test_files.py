"""Weight files: whole or in shards, regular files only, and the permissions of what is written."""

import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from support import checkpoints
from support.checkpoints import Tensors, split
from torch import Tensor
from transformers import CLIPTextModel

from minidrag.method.lora import Factors, LoRA
from minidrag.weights import lora_file
from minidrag.weights.files import read_header, read_tensor, save_tensors
from minidrag.weights.load import load_model
from weights_convert.__main__ import main


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write_folder(tmp_path_factory.mktemp("clean") / "model")


@pytest.fixture(scope="module")
def expected(clean: Path) -> Tensors:
    return checkpoints.outputs(load_model(clean, device="cpu"))


@pytest.fixture
def folder(clean: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "model"))


# --- shards ---


def shard(folder: Path) -> list[Path]:
    return [split(folder / file) for file in checkpoints.FILES.values()]


def test_shards_of_every_network_load(folder: Path, expected: Tensors) -> None:
    shard(folder)
    assert checkpoints.same(checkpoints.outputs(load_model(folder, device="cpu")), expected)
    model = load_model(folder, vae=folder / "vae", device="cpu")
    assert checkpoints.same(checkpoints.outputs(model), expected)


def test_shards_written_by_the_reference_libraries_load(folder: Path, expected: Tensors) -> None:
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    text = CLIPTextModel.from_pretrained(folder / "text_encoder")
    for name, model in {"unet": unet, "text_encoder": text}.items():
        (folder / checkpoints.FILES[name]).unlink()
        model.save_pretrained(folder / name, max_shard_size="1MB" if name == "unet" else "30KB")
        assert len(list((folder / name).glob("*-of-*.safetensors"))) > 1
    assert checkpoints.same(checkpoints.outputs(load_model(folder, device="cpu")), expected)


def test_shards_of_the_fp16_variant(folder: Path) -> None:
    for file in checkpoints.FILES.values():
        split(folder / file, ".fp16")
    load_model(folder, device="cpu")
    assert load_model(folder, device="cpu", dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize("command", ["safetensors", "half"])
def test_shards_are_converted_as_a_whole(
    folder: Path, expected: Tensors, command: str, tmp_path: Path
) -> None:
    index = shard(folder)[0]
    assert main([command, str(folder), str(tmp_path / "out")]) == 0
    found = checkpoints.outputs(load_model(tmp_path / "out", device="cpu"))
    tolerance = 0 if command == "safetensors" else 0.05
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=tolerance, rtol=tolerance)
    assert main(["half", str(index), str(tmp_path / "unet.safetensors")]) == 0
    assert len(read_header(tmp_path / "unet.safetensors").shapes) == 686


def test_pickled_shards_are_converted_as_a_whole(folder: Path, expected: Tensors, tmp_path: Path) -> None:
    indices = [split(folder / file, suffix=".bin") for file in checkpoints.FILES.values()]
    assert indices[2].name == "pytorch_model.bin.index.json"
    assert main(["safetensors", str(folder), str(tmp_path / "out")]) == 0
    assert checkpoints.same(checkpoints.outputs(load_model(tmp_path / "out", device="cpu")), expected)
    assert main(["safetensors", str(indices[0]), str(tmp_path / "unet.safetensors")]) == 0


def test_check_describes_shards(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard(folder)
    assert main(["check", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "diffusion_pytorch_model.safetensors.index.json: 686 tensors" in out and "unet: 686 tensors" in out


def refusals(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[str]:
    """Words of load_model, check, and every conversion about a folder; nothing is written."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_model(folder, device="cpu")
    yield str(caught.value)
    assert main(["check", str(folder)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == f"minidrag cannot load it: {caught.value}"
    for command in ("safetensors", "half"):
        assert main([command, str(folder), str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and not (tmp_path / "out").exists()
        yield error


def test_a_missing_shard_and_a_missing_tensor_are_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = split(folder / checkpoints.FILES["unet"])
    weight_map = json.loads(index.read_text())["weight_map"]
    first = index.with_name(weight_map["conv_in.weight"])
    with safe_open(first, "pt") as opened:
        kept = {key: opened.get_tensor(key) for key in opened.keys() if key != "conv_in.weight"}  # noqa: SIM118
    save_file(kept, first)
    for message in refusals(folder, tmp_path, capsys):
        assert "the tensor conv_in.weight is not in" in message and first.name in message
    first.unlink()
    for message in refusals(folder, tmp_path, capsys):
        assert f"{first} is missing, one of the shards" in message


OUTSIDE = [
    "../x.safetensors",
    "/etc/x.safetensors",
    "a/../../x.safetensors",
    "..",
    "",
    3,
    None,
    "C:\\x.safetensors",
]


@pytest.mark.parametrize("name", [*OUTSIDE, "diffusion_pytorch_model.safetensors.index.json"])
def test_names_of_shards_that_lead_elsewhere_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: object
) -> None:
    index = split(folder / checkpoints.FILES["unet"])
    weight_map = json.loads(index.read_text())["weight_map"] | {"conv_in.bias": name}
    index.write_text(json.dumps({"weight_map": weight_map}))
    for message in refusals(folder, tmp_path, capsys):
        assert f"names a shard {name!r}" in message


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": [1]}', "[", "[" * 100_000])
def test_a_broken_index_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    index = split(folder / checkpoints.FILES["vae"])
    index.write_text(content)
    for message in refusals(folder, tmp_path, capsys):
        assert str(index) in message


def test_one_of_several_shards_is_no_model(folder: Path, tmp_path: Path) -> None:
    index = split(folder / checkpoints.FILES["vae"])
    one = index.with_name("diffusion_pytorch_model-00002-of-00003.safetensors")
    for vae in (None, one):
        with pytest.raises(ValueError, match="is one of 3 shards: give their folder"):
            load_model(one if vae is None else folder, vae=vae, device="cpu")
    assert main(["check", str(one)]) == 1
    assert main(["half", str(one), str(tmp_path / "out")]) == 2
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"safetensors\.index\.json is missing"):
        load_model(folder, device="cpu")


# --- headers ---


@pytest.mark.parametrize("length", [0x4B50, 0x0280, 0x04034B50])
def test_any_length_of_the_header_is_one(tmp_path: Path, length: int) -> None:
    """A length has the bytes of "PK" or of a pickle's start; that does not make the file one."""
    text = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", length) + text.ljust(length) + struct.pack("<2f", 1, 2))
    assert file.read_bytes()[:2] in (b"PK", b"\x80\x02")
    assert read_tensor(read_header(file), "a").tolist() == [1, 2]


# --- permissions ---


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_get_the_permissions_of_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        tensors = {"a": torch.ones(2)}
        save_tensors(tensors, tmp_path / "a.safetensors", {})
        lora_file.write(
            LoRA({"x": Factors(torch.ones(1, 2), torch.ones(2, 1), 1.0)}, {}), tmp_path / "b.safetensors"
        )
        torch.save(tensors, tmp_path / "x.pt")
        assert main(["safetensors", str(tmp_path / "x.pt"), str(tmp_path / "c.safetensors")]) == 0
    finally:
        os.umask(before)
    modes = {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert modes == {0o666 & ~mask}


@pytest.mark.parametrize("target", ["nowhere", "loop"])
def test_a_link_that_leads_nowhere_is_not_replaced(
    tmp_path: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / "loop"
    link.symlink_to(tmp_path / target)
    tensors: dict[str, Tensor] = {"a": torch.ones(2)}
    torch.save(tensors, tmp_path / "x.pt")
    assert main(["safetensors", str(tmp_path / "x.pt"), str(link)]) == 2
    assert "already exists" in capsys.readouterr().err and link.is_symlink()
