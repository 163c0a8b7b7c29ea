"""On a device that is not the CPU: nothing is mixed up, and what comes out is what the CPU alone gives."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import checkpoints
from support.elsewhere import Distant, elsewhere
from test_demo import FAST, demo
from torch import nn

from minidrag import edit
from minidrag.bench.metrics import distances, picture_features
from minidrag.config import EditConfig
from minidrag.edit import drag_edit
from minidrag.method import lora
from minidrag.method.drag import Drag, optimise
from minidrag.tiny.scenes import random_scene, render
from minidrag.weights.model import Model, load_model

QUICK = EditConfig(steps=4, inversion_steps=3, drag_steps=2, lora_rank=2, lora_steps=2, lora_batch=2, size=64)
PAIR: dict[str, Any] = {"handles": [(40, 50)], "targets": [(90, 30)], "prompt": "a ball"}
PICTURE = render(random_scene(random.Random(5)))
LEVELS = 3  # of 255; measured 1: off the CPU torch adds in another order
MASK = torch.zeros(128, 128)
MASK[10:110, 10:110] = 1


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write_folder(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture
def load(folder: Path) -> Callable[..., Model]:
    """load(device, dtype) gives the small model there."""

    def load(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Model:
        model = load_model(folder, device="cpu", dtype=dtype)
        for network in (model.unet, model.vae, model.text_encoder):
            network.to(device)
        return model

    return load


def apart(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of two pictures' levels, of 255."""
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


def is_distant(network: nn.Module) -> bool:
    return all(isinstance(weight, Distant) for weight in network.parameters())


def test_the_device_refuses_what_a_gpu_refuses() -> None:
    with elsewhere() as device:
        there, here = torch.ones(2, 3).to(device), torch.ones(2, 3)
        assert there.device == torch.zeros(1, device=device).device == torch.device(device)
        assert torch.equal((2 * there + torch.tensor(1.0)).cpu(), 3 * here)
        for mixed in (lambda: there + here, lambda: here[there.long()], lambda: torch.cat([there, here])):
            with pytest.raises(RuntimeError, match="two devices"):
                mixed()
        with pytest.raises(RuntimeError, match="float64"):
            there.double()


@pytest.mark.parametrize(("masked", "checkpointing"), [(True, False), (False, True)])
def test_an_edit_is_the_same_there(load: Callable[..., Model], masked: bool, checkpointing: bool) -> None:
    told: dict[str, Any] = {**PAIR, "mask": MASK if masked else None}
    config = replace(QUICK, checkpointing=checkpointing)
    expected = drag_edit(load(), PICTURE, config=config, **told)
    with elsewhere() as device:
        model = load(device)
        found = drag_edit(model, PICTURE, config=config, **told)
        assert isinstance(found.dragged, Distant) and is_distant(model.unet)
    assert (found.paths, found.losses) == (expected.paths, pytest.approx(expected.losses, rel=1e-4))
    for name in ("raw", "picture", "reconstruction"):
        assert apart(getattr(found, name), getattr(expected, name)) <= LEVELS


def test_only_the_unet_is_there_during_the_drag(
    load: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[list[bool]] = []

    def noting(*given: Any) -> Drag:
        places.append([is_distant(network) for network in (model.unet, model.vae, model.text_encoder)])
        return optimise(*given)

    monkeypatch.setattr(edit, "optimise", noting)
    with elsewhere() as device:
        model = load(device)
        drag_edit(model, PICTURE, config=QUICK, **PAIR)
        assert all(is_distant(network) for network in (model.unet, model.vae, model.text_encoder))
    assert places == [[True, False, False]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_a_models_precision(load: Callable[..., Model], dtype: torch.dtype) -> None:
    with elsewhere() as device:
        made = drag_edit(load(device, dtype), PICTURE, mask=MASK, config=QUICK, **PAIR)
        assert made.dragged.dtype == torch.float32 and len(made.losses) == 2
        trained = [factors.up for path, factors in made.lora.unet.items() if path.startswith("up_blocks.3")]
        assert all(up.dtype == torch.float32 and up.any() for up in trained)


def test_a_lora_that_is_merged_there(load: Callable[..., Model]) -> None:
    with elsewhere() as device:
        model = load(device)
        trained = edit.fit_lora(model, PICTURE, config=QUICK)
        lora.attach(model.unet, trained, model.text_encoder)
        lora.merge(model.unet)
        assert is_distant(model.unet)


def test_the_command_runs_there(
    load: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIDRAG_CACHE", str(tmp_path / "cache"))
    PICTURE.save(tmp_path / "photo.png")
    told = [*FAST, str(tmp_path / "photo.png"), "--drag", "40,50:90,30"]
    monkeypatch.setattr(demo, "load_model", lambda *asked, **options: load())
    assert demo.main([*told, "--out", str(tmp_path / "here")]) == 0
    monkeypatch.setenv("MINIDRAG_CACHE", str(tmp_path / "another"))
    with elsewhere() as device:
        monkeypatch.setattr(demo, "load_model", lambda *asked, **options: load(device))
        assert demo.main([*told, "--out", str(tmp_path / "there")]) == 0
        assert demo.main([*told, "--out", str(tmp_path / "again")]) == 0, "with the LoRA that was kept"
    for name in ("edited.png", "comparison.png"):
        here, there, again = (Image.open(tmp_path / out / name) for out in ("here", "there", "again"))
        # With two threads two runs were seen 1 or 2 levels apart, on the plain CPU too; with one never.
        assert apart(there, here) <= LEVELS and apart(again, there) <= LEVELS
    kept, used = ((tmp_path / out / "lora.safetensors").read_bytes() for out in ("there", "again"))
    assert kept == used


def test_distances_are_measured_there(load: Callable[..., Model]) -> None:
    def measured(model: Model) -> list[float]:
        pictures = PICTURE, PICTURE.rotate(90)
        before, after = (picture_features(model, shown, "a ball", size=64) for shown in pictures)
        return distances(before, after, PAIR["handles"], PAIR["targets"], PICTURE.size)

    expected = measured(load())
    with elsewhere() as device:
        assert measured(load(device)) == expected
