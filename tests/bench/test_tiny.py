"""Check of the small model: its measurements and exit status. Real values need the trained model."""

import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import minidrag.bench.__main__ as bench
from minidrag.bench import tiny as check
from minidrag.bench.tiny import Line
from minidrag.tiny.scenes import SIDE, render
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
    psnr, spread, ratio = check.check_vae(model(), some)
    pixels = np.stack([np.asarray(render(scene), float) for scene in some])
    halved = np.rint((pixels / 127.5 - 1) / 2 * 127.5 + 127.5)
    errors = ((pixels - halved) ** 2).mean(axis=(1, 2, 3))
    assert psnr.value == f"{(10 * np.log10(255**2 / errors)).mean():.2f} dB" and psnr.met is False
    assert len(spread.value.split()) == 4 and spread.met is None
    assert ratio.met is True


@pytest.mark.slow
def test_captions_match_their_own_scene_only() -> None:
    some = check.held_out(4)
    images = [render(scene) for scene in some]
    assert check.check_captions(some, images)[0].met is True
    swapped = check.check_captions(some, images[::-1])[0]
    assert swapped.met is False and swapped.value == "0%"


def test_the_sheet_shows_the_first_images() -> None:
    images = [render(scene) for scene in check.held_out(7)]
    page = np.asarray(check.sample_sheet(images))
    assert (page[4 : 4 + SIDE, 4 : 4 + SIDE] == np.asarray(images[0])).all()
    assert (page[8 + SIDE : 8 + 2 * SIDE, 4 : 4 + SIDE] == np.asarray(images[6])).all()


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ([Line("a", "1", ">= 1", True), Line("b", "2")], 0),
        ([Line("a", "1", ">= 1", True), Line("b", "2", ">= 3", False)], 1),
        ([Line("a", "no diffusers", "<= 1", None)], 1),
    ],
)
def test_exit_status_is_zero_only_if_every_aim_is_met(
    lines: list[Line], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "load_model", lambda source: None)
    monkeypatch.setattr(check, "check", lambda model, args: lines)
    assert bench.main(["tiny"]) == status


def test_all_lines_are_printed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "load_model", lambda source: None)
    for name in ("check_vae", "check_inversion", "check_captions"):
        monkeypatch.setattr(check, name, lambda *_, name=name: [Line(name, "1", "1", True)])
    monkeypatch.setattr(check, "check_parity", lambda *_: Line("parity", "none", "same"))
    monkeypatch.setattr(check, "sample_images", lambda *_: [render(scene) for scene in check.held_out(1)])
    assert bench.main(["tiny", "--out", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    written = json.loads((tmp_path / "check.json").read_text())
    assert [line["name"] for line in written][:4] == [
        "check_vae",
        "check_inversion",
        "check_captions",
        "parity",
    ]
    assert all(line["name"] in shown for line in written) and "not measured" in shown
    assert (tmp_path / "samples.png").is_file()


def test_a_missing_model_gives_a_one_line_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert bench.main(["tiny", str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err
