"""The LoRA cache: what its key depends on, damaged files, and places that cannot be written."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from support.command import PHOTO, raising
from support.loras import read_notes

from minidrag import images
from minidrag.app import lora_cache
from minidrag.app.lora_cache import cache_folder, cache_key, find_lora, notes
from minidrag.app.progress import Progress
from minidrag.config import EditConfig
from minidrag.weights import lora_file
from minidrag.weights.model import Model, load_model

CONFIG = EditConfig(size=64, lora_steps=1, lora_batch=1)

pytestmark = pytest.mark.usefixtures("workdir")


@pytest.fixture
def model(untrained: Path) -> Model:
    return load_model(untrained, device="cpu")


@pytest.fixture
def image() -> Image.Image:
    return images.load_image(Path("photo.png"))


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


def test_no_steps_are_no_lora(model: Model, image: Image.Image) -> None:
    found = find_lora(model, image, "a ball", replace(CONFIG, lora_steps=0), 3)
    assert found == (({}, {}), "none (--lora-steps)") and not cache_folder().exists()


def test_a_lora_is_trained_once(model: Model, image: Image.Image) -> None:
    progress = Progress(show=False)
    trained, origin = find_lora(model, image, "a ball", CONFIG, 3, progress)
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
            "seed": "3",
        }
    )
    progress = Progress(show=False)
    cached, origin = find_lora(model, image, "a ball", CONFIG, 3, progress)
    assert origin == f"reused from {file}" and progress.seconds == {}
    assert cached.unet.keys() == trained.unet.keys() and not cached.text_encoder
    for path, factors in trained.unet.items():
        assert torch.equal(cached.unet[path].down, factors.down)
        assert torch.equal(cached.unet[path].up, factors.up)
        assert cached.unet[path].alpha == factors.alpha


@pytest.mark.parametrize("damage", ["truncated", "empty", "another format"])
def test_a_damaged_lora_is_trained_again(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    assert start(*PHOTO, "--out", "first") == 0
    (cached,) = cache_folder().iterdir()
    intact = cached.read_bytes()
    photo = Path("photo.png").read_bytes()
    cached.write_bytes({"truncated": intact[:500], "empty": b"", "another format": photo}[damage])
    capsys.readouterr()
    assert start(*PHOTO, "--out", "second") == 0
    assert f"LoRA: trained and cached in {cached}\n" in capsys.readouterr().out
    assert cached.read_bytes() == intact


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
    monkeypatch.setattr(lora_file, "save_file", raising(SafetensorError("No space left on device")))
    trained, origin = find_lora(model, image, "", CONFIG, 0)
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
