"""The LoRA cache: what its key depends on, damaged files, and places that cannot be written."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from support.command import PHOTO, raising
from support.loras import read_notes

from minidrag.app import lora_cache
from minidrag.app.lora_cache import cache_folder, cache_key, find_lora, notes
from minidrag.config import EditConfig
from minidrag.edit import train_lora
from minidrag.method.lora import LoRA
from minidrag.method.progress import Progress
from minidrag.model import Model, encode
from minidrag.system import pictures
from minidrag.weights.load import load_model

CONFIG = EditConfig(size=64, lora_steps=1, lora_batch=1)

pytestmark = pytest.mark.usefixtures("workdir")


@pytest.fixture
def model(untrained: Path) -> Model:
    return load_model(untrained, device="cpu")


@pytest.fixture
def image() -> Image.Image:
    return pictures.load_image(Path("photo.png"))


def test_the_key_depends_on_everything_that_decides_a_lora(
    model: Model, image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EditConfig(size=64)

    def key(**other: Any) -> str:
        values: dict[str, Any] = {"image": image, "prompt": "a ball", "config": config, "seed": 0}
        return cache_key(model, **(values | other))

    keys = [key(), key(prompt="a red ball"), key(seed=1), key(image=image.rotate(90))]
    for name, value in {
        "lora_rank": 3,
        "lora_steps": 3,
        "lora_targets": "qkvo",
        "lora_batch": 3,
        "lora_lr": 1e-3,
        "lora_lr_ratio": 2.0,
        "size": 72,
    }.items():
        keys.append(key(config=replace(config, **{name: value})))
    monkeypatch.setattr(lora_cache, "versions", lambda: {"torch": "another"})
    keys.append(key())
    with torch.no_grad():
        model.unet.conv_in.weight.mul_(1.01)
    keys.append(key())
    assert len(set(keys)) == len(keys)
    same = replace(config, drag_steps=5, mask_weight=0.5, keep_background=False)
    assert key(config=same, image=image.copy()) == keys[-1]


def find(
    model: Model, image: Image.Image, prompt: str, config: EditConfig, seed: int, *progress: Progress
) -> tuple[LoRA, str]:
    def train() -> LoRA:
        return train_lora(model, encode(model, image, config), prompt, config, seed, *progress)

    return find_lora(model, image, prompt, config, seed, train)


def test_no_steps_are_no_lora(model: Model, image: Image.Image) -> None:
    found = find(model, image, "a ball", replace(CONFIG, lora_steps=0), 3)
    assert found == (({}, {}), "none (--lora-steps)") and not cache_folder().exists()


def test_a_lora_is_trained_once(model: Model, image: Image.Image) -> None:
    progress = Progress(show=False)
    trained, origin = find(model, image, "a ball", CONFIG, 3, progress)
    (file,) = cache_folder().iterdir()
    assert origin == f"trained and cached in {file}" and list(progress.seconds) == ["LoRA"]
    assert (
        read_notes(file)
        == notes(model, "a ball", CONFIG, 3)
        == {
            "prompt": "a ball",
            "model": model.source,
            "lora_rank": "16",
            "lora_targets": "qk",
            "lora_steps": "1",
            "lora_batch": "1",
            "lora_lr": "0.0005",
            "lora_lr_ratio": "8.0",
            "seed": "3",
        }
    )
    progress = Progress(show=False)
    cached, origin = find(model, image, "a ball", CONFIG, 3, progress)
    assert origin == f"reused from {file}" and progress.seconds == {}
    assert cached.unet.keys() == trained.unet.keys() and not cached.text_encoder
    for path, factors in trained.unet.items():
        assert torch.equal(cached.unet[path].down, factors.down)
        assert torch.equal(cached.unet[path].up, factors.up)
        assert cached.unet[path].alpha == factors.alpha


def change_tensors(file: Path, change: Callable[[torch.Tensor], torch.Tensor], **metadata: str) -> None:
    tensors = {name: change(tensor) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata)


def replace_by(put: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(file: Path) -> None:
        file.unlink()
        put(file)

    return replace


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:500]),
    "empty": lambda file: file.write_bytes(b""),
    "another format": lambda file: file.write_bytes(Path("photo.png").read_bytes()),
    "NaN": lambda file: change_tensors(file, lambda tensor: tensor * torch.nan),
    "noise": lambda file: change_tensors(file, torch.randn_like),
    "other metadata": lambda file: change_tensors(file, torch.clone, lora_adapter_metadata="[1, 2]"),
    "a pipe": replace_by(os.mkfifo),
    "a folder": replace_by(Path.mkdir),
    "a folder with files": replace_by(lambda file: (file / "deep").mkdir(parents=True)),
    "a device": replace_by(lambda file: file.symlink_to("/dev/zero")),
    "a link to nothing": replace_by(lambda file: file.symlink_to("nowhere")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_lora_is_trained_again(model: Model, image: Image.Image, damage: str) -> None:
    find(model, image, "a ball", CONFIG, 3)
    (cached,) = cache_folder().iterdir()
    intact = cached.read_bytes()
    DAMAGE[damage](cached)
    assert find(model, image, "a ball", CONFIG, 3)[1] == f"trained and cached in {cached}"
    assert cached.read_bytes() == intact and list(cache_folder().iterdir()) == [cached]
    assert find(model, image, "a ball", CONFIG, 3)[1] == f"reused from {cached}"


def test_processes_that_train_the_same_lora_do_not_meet(model: Model, image: Image.Image) -> None:
    lora, barrier = train_lora(model, encode(model, image, CONFIG), "", CONFIG, 0), threading.Barrier(4)

    def keep(_: int) -> Path:
        barrier.wait()
        for _ in range(5):
            file = lora_cache.write(lora, cache_folder(), "key", {}, [])
            assert lora_cache.read(file, model).unet.keys() == lora.unet.keys()
        return file

    with ThreadPoolExecutor(4) as pool:
        (file,) = set(pool.map(keep, range(4)))
    assert list(cache_folder().iterdir()) == [file]


def test_a_home_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIDRAG_CACHE", "~nosuchuser/cache")
    with pytest.raises(
        ValueError, match="^there is no home folder for ~nosuchuser/cache: set MINIDRAG_CACHE"
    ):
        cache_folder()


def test_a_run_goes_on_if_the_cache_cannot_be_made(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIDRAG_CACHE", "photo.png")
    assert start(*PHOTO, "--out", "out") == 0
    assert "LoRA: trained, but not cached: photo.png/lora/" in capsys.readouterr().out
    assert Path("out/lora.safetensors").exists()


def test_a_lora_is_returned_if_the_disk_is_full(
    model: Model, image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "minidrag.weights.files.save_file", raising(SafetensorError("No space left on device"))
    )
    trained, origin = find(model, image, "", CONFIG, 0)
    assert trained.unet and origin.startswith("trained, but not cached: ")
    assert origin.endswith(" cannot be written (No space left on device)")
    assert not list(cache_folder().iterdir())


def test_the_cache_is_in_the_home_folder_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("MINIDRAG_CACHE", "")
    assert cache_folder() == Path("/home/someone/.cache/minidrag/lora")
    monkeypatch.delenv("MINIDRAG_CACHE")
    assert cache_folder() == Path("/home/someone/.cache/minidrag/lora")
    monkeypatch.setenv("MINIDRAG_CACHE", "~/elsewhere")
    assert cache_folder() == Path("/home/someone/elsewhere/lora")
