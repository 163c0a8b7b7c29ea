"""Check of the small model: its measurements and exit status. Real values need the trained model."""

import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import minidrag.bench.__main__ as bench
from minidrag.bench import tiny as check
from minidrag.bench.tiny import Measurement
from minidrag.tiny.scenes import render
from minidrag.tiny.train import TrainConfig, scenes


class Halves:
    """Autoencoder that halves the contrast, with latents of the image's size."""

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([image, image[:, :1]], dim=1) / 2, torch.ones(())

    def decode(self, latent: Tensor) -> Tensor:
        return latent[:, :3]


def model() -> Any:
    return types.SimpleNamespace(vae=Halves(), device=torch.device("cpu"), dtype=torch.float32)


def test_held_out_scenes_are_not_training_scenes() -> None:
    trained = list(scenes(TrainConfig(), 0, 300))
    assert not set(check.held_out(50)) & set(trained)
    assert check.held_out(3) == check.held_out(50)[:3] == list(scenes(TrainConfig(), -3, 3))[::-1]


def test_autoencoder_measurements() -> None:
    some = check.held_out(check.BATCH + 1)
    psnr = check.check_vae(model(), some)
    pixels = np.stack([np.asarray(render(scene), float) for scene in some])
    halved = np.rint((pixels / 127.5 - 1) / 2 * 127.5 + 127.5)
    errors = ((pixels - halved) ** 2).mean(axis=(1, 2, 3))
    assert psnr.value == f"{(10 * np.log10(255**2 / errors)).mean():.2f} dB" and psnr.met is False


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ([Measurement("a", "1", ">= 1", True), Measurement("b", "2", ">= 2", True)], 0),
        ([Measurement("a", "1", ">= 1", True), Measurement("b", "2", ">= 3", False)], 1),
    ],
)
def test_exit_status_is_zero_only_if_every_aim_is_met(
    lines: list[Measurement], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "load_model", lambda source: None)
    monkeypatch.setattr(check, "check", lambda model: lines)
    assert bench.main(["tiny"]) == status


def test_all_measurements_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "load_model", lambda source: None)
    monkeypatch.setattr(check, "check_vae", lambda *_: Measurement("autoencoder", "1", "1", True))
    monkeypatch.setattr(check, "check_inversion", lambda *_: Measurement("inversion", "1", "2", False))
    assert bench.main(["tiny"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[0] for line in lines] == ["autoencoder", "inversion"]
    assert lines[1].endswith("FAILED")


def test_a_missing_model_gives_a_one_line_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert bench.main(["tiny", str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err
