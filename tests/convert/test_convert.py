"""Conversion: the result loads with the same outputs, here and in diffusers, or is not written at all."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from safetensors.torch import load_file
from support import checkpoints
from support.checkpoints import Tensors

import weights_convert
import weights_convert.convert as convert_module
from minidrag.system.files import PART
from minidrag.weights import load as weights
from minidrag.weights.load import load_model
from weights_convert.__main__ import main


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Assume the sizes of the small models for single files, and fail a test that accesses the hub."""
    monkeypatch.setattr(weights, "SINGLE_FILE", checkpoints.SMALL)
    monkeypatch.setattr(
        "minidrag.weights.hub.snapshot_download", lambda *_, **__: pytest.fail("accessed the hub")
    )


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write_folder(tmp_path_factory.mktemp("clean") / "model")


@pytest.fixture(scope="module")
def tensors(clean: Path) -> dict[str, Tensors]:
    return checkpoints.read(clean)


@pytest.fixture(scope="module")
def expected(clean: Path) -> Tensors:
    return outputs(clean)


@pytest.fixture
def folder(clean: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "model"))


@pytest.fixture
def single(clean: Path, tensors: dict[str, Tensors], tmp_path: Path) -> Path:
    """A single file like v1-5-pruned with its tokenizer beside it."""
    shutil.copytree(clean / "tokenizer", tmp_path / "tokenizer")
    return checkpoints.write(tmp_path / "model.safetensors", checkpoints.pruned(tensors))


def outputs(source: Path) -> Tensors:
    return checkpoints.outputs(load_model(source, device="cpu"))


def convert(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run a command that fails; return the one line that it prints to stderr."""
    assert convert(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    return printed.err


# --- single file to folder ---


def test_folder_from_single_file(single: Path, tmp_path: Path, expected: Tensors) -> None:
    assert convert("folder", single, tmp_path / "out") == 0
    assert checkpoints.same(outputs(tmp_path / "out"), expected)
    weights_file = tmp_path / "out/unet/diffusion_pytorch_model.safetensors"
    assert len(load_file(weights_file)) == 686  # only the moving average


def test_diffusers_loads_the_folder_with_the_same_outputs(single: Path, tmp_path: Path) -> None:
    assert convert("folder", single, tmp_path / "out") == 0
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out").to(torch.float64)
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    ours = checkpoints.outputs(load_model(tmp_path / "out", device="cpu", dtype=torch.float64))
    words = pipeline.tokenizer(["a cat", ""], padding="max_length", truncation=True, return_tensors="pt")
    latent = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        text = pipeline.text_encoder(words.input_ids).last_hidden_state
        noise = pipeline.unet(latent, 681, text).sample
        image = pipeline.vae.decode(latent / pipeline.vae.config.scaling_factor).sample
    for name, reference in {"text": text, "noise": noise, "image": image}.items():
        torch.testing.assert_close(ours[name], reference, atol=1e-9, rtol=0)
    assert pipeline.scheduler.config.steps_offset == 1


def test_folder_with_and_without_a_tokenizer(
    single: Path, clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(tmp_path / "tokenizer")
    assert convert("folder", single, tmp_path / "without") == 0
    assert "no tokenizer found" in capsys.readouterr().out
    assert convert("folder", single, tmp_path / "with", "--tokenizer", clean) == 0
    assert "no tokenizer" not in capsys.readouterr().out
    load_model(tmp_path / "with", device="cpu")
    assert "has a vocab.json" in refused(
        capsys, "folder", single, tmp_path / "x", "--tokenizer", tmp_path / "without"
    )


def test_folder_with_a_broken_tokenizer(
    single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer/merges.txt").unlink()
    assert "merges.txt is missing" in refused(capsys, "folder", single, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- pickles to safetensors ---


def to_pickles(folder: Path) -> None:
    """Convert a folder to the pickles that transformers and diffusers wrote before safetensors."""
    for name, file in checkpoints.FILES.items():
        pickle = "pytorch_model.bin" if name == "text_encoder" else "diffusion_pytorch_model.bin"
        torch.save(load_file(folder / file), (folder / file).with_name(pickle))
        (folder / file).unlink()


def test_safetensors_from_a_folder_of_pickles(folder: Path, tmp_path: Path, expected: Tensors) -> None:
    to_pickles(folder)
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker/pytorch_model.bin").write_bytes(b"unneeded")
    assert convert("safetensors", folder, tmp_path / "out") == 0
    assert checkpoints.same(outputs(tmp_path / "out"), expected)
    assert not list((tmp_path / "out").rglob("*.bin")) and not (tmp_path / "out/safety_checker").exists()


def test_safetensors_from_a_mixed_folder_and_from_a_vae(
    folder: Path, tmp_path: Path, expected: Tensors
) -> None:
    unet = folder / checkpoints.FILES["unet"]
    torch.save({"conv_in.weight": torch.zeros(1)}, unet.with_suffix(".bin"))  # safetensors has priority
    vae = folder / checkpoints.FILES["vae"]
    torch.save(load_file(vae), vae.with_suffix(".bin"))
    vae.unlink()
    assert convert("safetensors", folder, tmp_path / "whole") == 0
    assert checkpoints.same(outputs(tmp_path / "whole"), expected)
    assert convert("safetensors", folder / "vae", tmp_path / "vae") == 0
    model = load_model(tmp_path / "whole", vae=tmp_path / "vae", device="cpu")
    assert checkpoints.same(checkpoints.outputs(model), expected)


@pytest.mark.parametrize("zipped", [True, False])
def test_safetensors_from_a_checkpoint(single: Path, tmp_path: Path, expected: Tensors, zipped: bool) -> None:
    state = {"state_dict": load_file(single), "global_step": 470000, "pytorch-lightning_version": "1.4.2"}
    torch.save(state, tmp_path / "model.ckpt", _use_new_zipfile_serialization=zipped)
    assert convert("safetensors", tmp_path / "model.ckpt", tmp_path / "out.safetensors") == 0
    assert checkpoints.same(outputs(tmp_path / "out.safetensors"), expected)


def test_shared_and_non_contiguous_tensors(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    state = {"a": whole, "b": whole, "c": whole.T, "d": whole[1], "n": 3}
    torch.save(state, tmp_path / "x.pt")
    assert convert("safetensors", tmp_path / "x.pt", tmp_path / "x.safetensors") == 0
    written = load_file(tmp_path / "x.safetensors")
    assert written.keys() == {"a", "b", "c", "d"}
    assert all(torch.equal(written[name], state[name]) for name in written)


class Harmful:
    """An object whose unpickling creates a folder."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_but_tensors_is_unpickled(tmp_path: Path, zipped: bool) -> None:
    """A training checkpoint keeps its tensors; of everything else in it nothing is called."""
    state = {"state_dict": {"w": torch.arange(3.0)}, "callbacks": {Harmful: [Harmful(tmp_path / "harm")]}}
    torch.save(state, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    assert convert("safetensors", tmp_path / "x.ckpt", tmp_path / "out.safetensors") == 0
    assert checkpoints.same(load_file(tmp_path / "out.safetensors"), state["state_dict"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.safetensors", "x.ckpt"]


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "text": lambda data: b"<!DOCTYPE html>",
    "no tensors": lambda data: data,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_pickles(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    file = tmp_path / "x.bin"
    torch.save({"epoch": 3} if kind == "no tensors" else {"w": torch.zeros(1000)}, file)
    file.write_bytes(BROKEN[kind](file.read_bytes()))
    assert str(file) in refused(capsys, "safetensors", file, tmp_path / "out")
    assert sorted(left.name for left in tmp_path.iterdir()) == ["x.bin"]


# --- float32 to float16 ---


def test_half_of_a_folder(folder: Path, tensors: dict[str, Tensors], tmp_path: Path) -> None:
    text = tensors["text_encoder"] | {"text_model.embeddings.position_ids": checkpoints.position_ids()}
    checkpoints.write(folder / checkpoints.FILES["text_encoder"], text)
    assert convert("half", folder, tmp_path / "out") == 0
    written = sorted(file.name for file in (tmp_path / "out").rglob("*.safetensors"))
    assert written == ["diffusion_pytorch_model.fp16.safetensors"] * 2 + ["model.fp16.safetensors"]
    encoder = load_file(tmp_path / "out/text_encoder/model.fp16.safetensors")
    assert encoder.pop("text_model.embeddings.position_ids").dtype == torch.int64
    assert {tensor.dtype for tensor in encoder.values()} == {torch.float16}
    halves = load_model(tmp_path / "out", device="cpu", dtype=torch.float16)
    whole = load_model(folder, device="cpu", dtype=torch.float16)
    assert checkpoints.same(halves.unet.state_dict(), whole.unet.state_dict())


def test_half_of_a_single_file_repairs_position_ids(
    tensors: dict[str, Tensors], clean: Path, tmp_path: Path
) -> None:
    checkpoint = checkpoints.emaonly(tensors)
    name = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    checkpoint[name] = checkpoint[name].float()
    checkpoint[name][0, 76] = 75.99
    file = checkpoints.write(tmp_path / "model.safetensors", checkpoint)
    assert convert("half", file, tmp_path / "half.safetensors") == 0
    written = load_file(tmp_path / "half.safetensors")
    assert torch.equal(written.pop(name), checkpoints.position_ids())
    assert written.pop("model_ema.num_updates").dtype == torch.int64
    assert {tensor.dtype for tensor in written.values()} == {torch.float16}
    load_model(tmp_path / "half.safetensors", tokenizer=clean, device="cpu")


def test_half_refuses_values_beyond_float16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = checkpoints.write(tmp_path / "x.safetensors", {"a": torch.ones(2), "big": torch.tensor([7e4])})
    assert "big" in refused(capsys, "half", file, tmp_path / "out.safetensors")
    assert "no weights" in refused(capsys, "half", tmp_path, tmp_path / "out")


# --- LoRA ---


@pytest.mark.parametrize("style", ["peft", "diffusers", "kohya"])
def test_lora_between_styles(tmp_path: Path, style: str) -> None:
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    keys = {f"unet.unet.{layer}.lora.down.weight": down, f"unet.unet.{layer}.lora.up.weight": up}
    file = checkpoints.write(tmp_path / "lora.safetensors", keys)
    assert convert("lora", file, tmp_path / "out.safetensors", "--to", style) == 0
    assert convert("lora", tmp_path / "out.safetensors", tmp_path / "back.safetensors", "--to", "peft") == 0
    torch.save(keys, tmp_path / "lora.bin")
    assert convert("safetensors", tmp_path / "lora.bin", tmp_path / "unpickled.safetensors") == 0
    assert load_file(tmp_path / "unpickled.safetensors").keys() == keys.keys()
    back = load_file(tmp_path / "back.safetensors")
    assert torch.equal(back[f"unet.{layer}.lora_A.weight"], down)
    assert torch.equal(back[f"unet.{layer}.lora_B.weight"], up)
    assert convert("check", file) == convert("check", tmp_path / "out.safetensors") == 0


def test_unsupported_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {"lora_unet_down_blocks_0_attentions_0_proj_in.hada_w1_a": torch.zeros(2, 2)}
    file = checkpoints.write(tmp_path / "loha.safetensors", keys)
    assert "LoHa" in refused(capsys, "lora", file, tmp_path / "out", "--to", "peft")
    assert convert("check", file) == 1
    assert not (tmp_path / "out").exists()


# --- failures ---


def test_ctrl_c_leaves_nothing(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, save = sorted(tmp_path.iterdir()), convert_module.save

    def stop(tensors: Tensors, file: Path) -> None:
        save(tensors, file)
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_module, "save", stop)
    assert convert("folder", single, tmp_path / "out") == 130
    assert "stopped" in capsys.readouterr().err and sorted(tmp_path.iterdir()) == before


def test_what_a_killed_conversion_left_is_swept(single: Path, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    left = tmp_path / f"{PART}{process.pid}-x"
    left.mkdir()
    (left / "out").write_text("half of it")
    assert convert("half", single, tmp_path / "out") == 0
    assert not left.exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("command", ["half", "folder"])
def test_what_appears_meanwhile_is_not_replaced(
    single: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    out, save = tmp_path / "out", convert_module.save

    def write_both(*arguments: Any) -> None:
        save(*arguments)
        out.write_text("of another process")

    monkeypatch.setattr(convert_module, "save", write_both)
    assert "already exists" in refused(capsys, command, single, out)
    assert out.read_text() == "of another process" and not list(tmp_path.glob(".*"))


def test_sources_of_the_wrong_kind(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert "is already a folder" in refused(capsys, "folder", folder, out)
    (tmp_path / "x.ckpt").write_bytes(b"")
    assert "weights_convert safetensors" in refused(capsys, "folder", tmp_path / "x.ckpt", out)
    assert "give that file" in refused(capsys, "safetensors", tmp_path, out)
    assert "nothing to convert" in refused(capsys, "safetensors", folder / "unet/config.json", out)
    assert "there is no file" in refused(capsys, "half", tmp_path / "nothing.safetensors", out)
    assert not out.exists()


def test_targets_that_exist_or_have_no_folder(
    single: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = single.read_bytes()
    assert "already exists" in refused(capsys, "half", single, single)
    assert "already exists" in refused(capsys, "folder", single, folder)
    assert single.read_bytes() == before
    assert "is not a folder" in refused(capsys, "half", single, tmp_path / "no/such/place.safetensors")
    assert "is not a folder" in refused(capsys, "half", folder, single / "below a file")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, which nobody can write to")
def test_unwritable_target(single: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source in (single, folder):
        assert "cannot write /proc/out" in refused(capsys, "half", source, "/proc/out")


@pytest.fixture
def disk_full() -> Iterator[None]:
    """Limit files to 2 MB: for the writer, the same as a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("command", ["folder", "half of a file", "half of a folder", "safetensors", "lora"])
def test_disk_full(
    single: Path,
    folder: Path,
    tmp_path: Path,
    command: str,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    lora = checkpoints.write(tmp_path / "lora.safetensors", big_lora())
    torch.save(load_file(single), tmp_path / "model.ckpt")
    source, *more = {
        "folder": [single],
        "half of a file": [single],
        "half of a folder": [folder],
        "safetensors": [tmp_path / "model.ckpt"],
        "lora": [lora, "--to", "peft"],
    }[command]
    before = sorted(tmp_path.iterdir())
    request.getfixturevalue("disk_full")
    message = refused(capsys, command.split()[0], source, tmp_path / "out", *more)
    assert f"cannot write {tmp_path / 'out'}" in message
    assert sorted(tmp_path.iterdir()) == before


def big_lora() -> Tensors:
    """A file above the limit, by an absurd rank."""
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    rank = 20_000
    return {f"{layer}.lora_A.weight": torch.zeros(rank, 32), f"{layer}.lora_B.weight": torch.zeros(32, rank)}


# --- check ---


def checked(capsys: pytest.CaptureFixture[str], source: Path) -> tuple[int, str]:
    code = convert("check", source)
    return code, capsys.readouterr().out


def test_check_of_a_folder(
    folder: Path, tensors: dict[str, Tensors], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints.write(folder / checkpoints.FILES["vae"], checkpoints.legacy_vae(tensors["vae"]))
    text = {key.removeprefix("text_model."): tensor for key, tensor in tensors["text_encoder"].items()}
    ids = {"embeddings.position_ids": checkpoints.position_ids().float(), "logit_scale": torch.tensor(4.6)}
    checkpoints.write(folder / checkpoints.FILES["text_encoder"], text | ids)
    checkpoints.write(folder / checkpoints.FILES["unet"], checkpoints.half_mixed(tensors["unet"]))
    torch.save({}, folder / "unet/diffusion_pytorch_model.bin")
    code, out = checked(capsys, folder)
    parameters = sum(tensor.numel() for tensor in tensors["unet"].values())
    for line in (
        "a model folder",
        f"unet: 686 tensors, {parameters:,} parameters, F16 and F32",
        "diffusion_pytorch_model.bin: a pickle",
        "minidrag can load it",
    ):
        assert line in out, line
    assert code == 0
    load_model(folder, device="cpu")


def test_check_of_extra_layers_and_float16_without_an_infix(
    folder: Path, tensors: dict[str, Tensors], capsys: pytest.CaptureFixture[str]
) -> None:
    config = folder / "text_encoder/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 2}))
    half = {key: tensor.half() for key, tensor in tensors["unet"].items()}
    checkpoints.write(folder / checkpoints.FILES["unet"], half)
    code, out = checked(capsys, folder)
    assert code == 0 and out.count("float16, although the name says float32") == 1
    assert "text_encoder: more layers than in config.json" in out
    assert load_model(folder, device="cpu").text_encoder.config.num_hidden_layers == 2


def test_check_of_another_prediction(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scheduler = folder / "scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction"}))
    code, out = checked(capsys, folder)
    assert code == 0 and "the UNet predicts v_prediction, not epsilon" in out
    assert load_model(folder, device="cpu").prediction == "v_prediction"


def test_check_of_single_files(
    single: Path, tensors: dict[str, Tensors], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = checked(capsys, single)
    assert code == 0 and "a single-file checkpoint" in out and "(EMA): complete and used" in out
    assert "no tokenizer" not in out
    shutil.rmtree(tmp_path / "tokenizer")
    kept = {key: t for key, t in load_file(single).items() if key not in checkpoints.BUFFERS}
    del kept["model_ema.diffusion_modelout0weight"]
    checkpoints.write(single, kept)
    code, out = checked(capsys, single)
    assert code == 0 and "(EMA): incomplete and not used" in out
    assert "no tokenizer" in out
    vae = checkpoints.write(tmp_path / "vae.safetensors", checkpoints.ldm_vae(tensors["vae"], ""))
    code, out = checked(capsys, vae)
    assert code == 0 and "with vae=" in out and "vae: 248 tensors" in out


def test_check_of_a_vae_folder(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = checked(capsys, clean / "vae")
    assert code == 0 and "vae: 248 tensors" in out and "with vae=" in out


Damage = Callable[[Path, dict[str, Tensors]], Path]  # model folder and its tensors -> path to check


def damaged(name: str, change: Callable[[bytes], bytes]) -> Damage:
    def damage(folder: Path, _: dict[str, Tensors]) -> Path:
        (folder / name).write_bytes(change((folder / name).read_bytes()))
        return folder

    return damage


def changed(name: str, values: dict[str, object]) -> Damage:
    def damage(folder: Path, _: dict[str, Tensors]) -> Path:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))
        return folder

    return damage


def without(name: str) -> Damage:
    def damage(folder: Path, _: dict[str, Tensors]) -> Path:
        (folder / name).unlink()
        return folder

    return damage


def unet_with(change: Callable[[Tensors], Tensors], single: bool = False) -> Damage:
    def damage(folder: Path, tensors: dict[str, Tensors]) -> Path:
        unet = change(tensors["unet"])
        if single:
            return checkpoints.write(folder / "x.safetensors", checkpoints.emaonly(tensors | {"unet": unet}))
        checkpoints.write(folder / checkpoints.FILES["unet"], unet)
        return folder

    return damage


def channels(count: int) -> Callable[[Tensors], Tensors]:
    return lambda unet: unet | {"conv_in.weight": torch.zeros(32, count, 3, 3)}


def file_of(*names: str) -> Damage:
    return lambda folder, _: checkpoints.write(folder / "x.safetensors", {n: torch.zeros(1) for n in names})


def file_with(content: bytes, name: str) -> Damage:
    def damage(folder: Path, _: dict[str, Tensors]) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return damage


def pickled(folder: Path, _: dict[str, Tensors]) -> Path:
    to_pickles(folder)
    return folder


def new_folder(folder: Path, _: dict[str, Tensors]) -> Path:
    (folder / "new").mkdir()
    return folder / "new"


LORA, OUT = "lora_unet_down_blocks_0_attentions_0_proj_in", "model.diffusion_model.out.0.weight"
UNLOADABLE: dict[str, tuple[Damage, str]] = {
    "nothing": (lambda folder, _: folder / "nothing", "does not exist"),
    "empty folder": (new_folder, "config.json is missing"),
    "truncated in a folder": (damaged(checkpoints.FILES["vae"], lambda data: data[:-1]), "is truncated"),
    "empty in a folder": (damaged(checkpoints.FILES["unet"], lambda data: b""), "is truncated"),
    "empty file": (file_with(b"", "x.safetensors"), "is truncated or not a safetensors file"),
    "web page": (file_with(b"<!DOCTYPE html>", "x.safetensors"), "is truncated or not a safetensors file"),
    "pickle": (file_with(b"PK\x03\x04", "x.ckpt"), "is a pickle"),
    "pickle with another suffix": (file_with(b"PK\x03\x04", "x.safetensors"), "is a pickle"),
    "Git LFS pointer": (file_with(b"version https://git-lfs.github.com", "x.safetensors"), "git lfs pull"),
    "folder of pickles": (pickled, "has only pickles"),
    "no config": (without("unet/config.json"), "unet/config.json is missing"),
    "no weights": (without(checkpoints.FILES["text_encoder"]), "model.safetensors is missing"),
    "no vocabulary": (without("tokenizer/vocab.json"), "has a vocab.json: copy"),
    "no merges": (without("tokenizer/merges.txt"), "merges.txt is missing"),
    "another UNet": (changed("unet/config.json", {"act_fn": "gelu"}), "only 'silu' is supported"),
    "another schedule": (
        changed("scheduler/scheduler_config.json", {"beta_schedule": "squaredcos_cap_v2"}),
        "only 'scaled_linear' or 'linear' is supported",
    ),
    "missing tensors": (
        unet_with(lambda unet: {key: t for key, t in unet.items() if "mid_block.attentions" not in key}),
        "missing tensors: 26 (mid_block.attentions.0.",
    ),
    "unexpected tensors": (
        unet_with(lambda unet: unet | {"x": torch.zeros(1)}),
        "unexpected tensors: 1 (x)",
    ),
    "wrong shapes": (
        unet_with(lambda unet: unet | {"conv_out.bias": torch.zeros(5)}),
        "wrong shapes: 1 (conv_out.bias [5], expected [4])",
    ),
    "inpainting folder": (unet_with(channels(9)), "an inpainting model"),
    "inpainting file": (unet_with(channels(9), single=True), "an inpainting model"),
    "InstructPix2Pix folder": (unet_with(channels(8)), "an InstructPix2Pix model"),
    "InstructPix2Pix file": (unet_with(channels(8), single=True), "an InstructPix2Pix model"),
    "SDXL": (file_of(OUT, "conditioner.embedders.0.transformer.x"), "an SDXL checkpoint"),
    "SD 2.x": (file_of(OUT, "cond_stage_model.model.ln_final.weight"), "a Stable Diffusion 2.x checkpoint"),
    "SD 3": (file_of("model.diffusion_model.joint_blocks.0.x"), "a Stable Diffusion 3 checkpoint"),
    "UNet alone": (lambda folder, _: folder / checkpoints.FILES["unet"], "give the model folder"),
    "text encoder alone": (lambda folder, _: folder / checkpoints.FILES["text_encoder"], "the model folder"),
    "LoHa": (file_of(f"{LORA}.hada_w1_a"), "this is LoHa"),
    "LoKr": (file_of(f"{LORA}.lokr_w1"), "this is LoKr"),
    "DoRA": (file_of(f"{LORA}.dora_scale"), "this is DoRA"),
}


# `check` also accepts VAEs and LoRAs, so for these its errors differ.
NOT_A_MODEL = {"nothing", "empty folder", "UNet alone", "text encoder alone", "LoHa", "LoKr", "DoRA"}


@pytest.mark.parametrize("kind", UNLOADABLE)
def test_check_and_load_model_raise_the_same_errors(
    folder: Path, tensors: dict[str, Tensors], capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    damage, sentence = UNLOADABLE[kind]
    source = damage(folder, tensors)
    code, out = checked(capsys, source)
    last = out.splitlines()[-1]
    assert code == 1 and last.startswith("minidrag cannot load it: ") and sentence in last
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_model(source, device="cpu")
    if kind not in NOT_A_MODEL:
        assert last == f"minidrag cannot load it: {caught.value}"


def test_help_from_a_process() -> None:
    code = [sys.executable, "-m", "weights_convert", "--help"]
    root = str(Path(weights_convert.__file__).parents[1])
    done = subprocess.run(code, capture_output=True, text=True, cwd=root, check=True)
    assert all(command in done.stdout for command in COMMANDS)


COMMANDS = {"check": 1, "folder": 2, "safetensors": 2, "half": 2, "lora": 2}  # number of paths


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_requires_its_paths(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="^0$"):
        main([command, "--help"])
    assert ("OUT" in capsys.readouterr().out) == (COMMANDS[command] == 2)
    assert main([command]) == 2
    message = capsys.readouterr().err
    assert "required: SOURCE" in message and ("OUT" in message) == (COMMANDS[command] == 2)
