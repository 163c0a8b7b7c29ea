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
    psnr = check.autoencode(model(), some)
    pixels = np.stack([np.asarray(render(scene), float) for scene in some])
    halved = np.rint((pixels / 127.5 - 1) / 2 * 127.5 + 127.5)
    errors = ((pixels - halved) ** 2).mean(axis=(1, 2, 3))
    assert psnr == pytest.approx((10 * np.log10(255**2 / errors)).mean())


@pytest.mark.parametrize(("values", "status"), [((32, 28), 0), ((33, 27.9), 1), ((31.9, 29), 1)])
def test_exit_status_is_zero_only_if_every_aim_is_met(
    values: tuple[float, float],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(check, "load_model", lambda source: None)
    monkeypatch.setattr(check, "autoencode", lambda *_: values[0])
    monkeypatch.setattr(check, "reconstruct", lambda *_: values[1])
    assert bench.main(["tiny"]) == status
    vae, inversion = capsys.readouterr().out.splitlines()
    assert vae.endswith("ok" if values[0] >= 32 else "FAILED") and f"{values[0]:.2f} dB" in vae
    assert inversion.endswith("ok" if values[1] >= 28 else "FAILED") and f"{values[1]:.2f} dB" in inversion


def test_a_missing_model_gives_a_one_line_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert bench.main(["tiny", str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err
