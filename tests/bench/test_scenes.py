"""Runs over scenes: stopped and continued, failed cases, tables, settings and folders."""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.dragbench import Counting, learned, to_truth

from minidrag.bench import harness, scenes, tables
from minidrag.bench.cases import Case, Edited, dragging_back, make_cases
from minidrag.config import EditConfig
from minidrag.edit import drag_edit
from minidrag.method.lora import Factors, LoRA, initialize
from minidrag.model import decode, encode
from minidrag.weights.load import load_model


def run(out: Path, edit: Callable[[Case], Edited], count: int = 3) -> list[dict[str, Any]]:
    some = make_cases(count, ["object", "light"], 1)
    results = harness.run_cases(some, edit, learned, out, compare=False)
    scenes.write_report(results, out)
    return results


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("finished")
    run(out, to_truth)
    return out


def test_a_stopped_run_continues_to_the_same_table(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Counting(to_truth, stop=2))
    again = Counting(to_truth)
    run(tmp_path, again)
    assert again.calls == 2
    for name in ("table.json", "table.md", "sheet.png"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_a_failed_case_is_reported_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = run(tmp_path, Counting(to_truth, stop=1, error=FloatingPointError), count=2)
    assert [result["case"] for result in results] == ["light-000"]
    assert "minidrag: object-000 failed: stop" in capsys.readouterr().err
    assert len(run(tmp_path, to_truth, count=2)) == 2


def test_the_table_has_the_means_of_its_cases(finished: Path) -> None:
    table = json.loads((finished / "table.json").read_text())
    results = [json.loads(file.read_text()) for file in sorted(finished.glob("cases/*/result.json"))]
    assert table["cases"] == len(results) == 3 and set(table["kinds"]) == {"all", "object", "light"}
    for name in ("distance", "PSNR outside", "MD"):
        values = [result["rows"]["edit"][name] for result in results]
        cell = table["kinds"]["all"]["edit"][name]
        assert cell["mean"] == pytest.approx(sum(values) / 3) and cell["count"] == 3
        assert cell["low"] <= cell["mean"] <= cell["high"]
    alone = table["kinds"]["light"]["edit"]["distance"]
    assert alone["low"] == alone["mean"] == alone["high"] < 0.3
    assert json.loads((finished / "seconds.json").read_text())["drag"] == 2


def test_every_case_has_its_images(finished: Path) -> None:
    for case in make_cases(3, ["object", "light"], 1):
        folder = finished / "cases" / case.name
        for name, image in {"before": case.before, "edit": case.truth, "truth": case.truth}.items():
            assert Image.open(folder / f"{name}.png").tobytes() == image.tobytes()
        assert Image.open(folder / "raw.png").tobytes() == to_truth(case).raw.tobytes()
        assert (folder / "drag.png").is_file()


def test_the_report_shows_measures_that_are_known(finished: Path) -> None:
    text = (finished / "table.md").read_text()
    assert "| light" in text and "| all" in text and "Rank correlation of MD and distance" in text
    without = json.loads((finished / "table.json").read_text())
    for rows in without["kinds"].values():
        rows["edit"]["IF"] = None
    assert "| IF" in text and "| IF" not in tables.report(without)


def test_a_folder_with_other_settings_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = harness.open_out(None, {"seed": 0})
    assert out == harness.open_out(None, {"seed": 0}) != harness.open_out(None, {"seed": 1})
    with pytest.raises(ValueError, match="other settings"):
        harness.open_out(out, {"seed": 1})


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    scenes.add_arguments(parser)
    return parser.parse_args(words)


def test_settings_from_the_command_line() -> None:
    config = harness.read_config(
        arguments("--config", "official", "--set", "lora_steps=40", "mask_weight=0.5", "lora_targets=qkv")
    )
    assert (config.lora_steps, config.mask_weight, config.lora_targets) == (40, 0.5, "qkv")
    assert config.motion_loss == EditConfig.official().motion_loss
    assert config.keep_background == EditConfig.official().keep_background
    assert harness.read_config(arguments("--config", "paper")) == EditConfig.paper()
    assert harness.read_config(arguments()) == EditConfig()
    for word in ("none", "None", "null"):
        config = harness.read_config(arguments("--set", f"size={word}", "checkpointing=True"))
        assert config == EditConfig(checkpointing=True)
    for wrong in ("lora_stepps=3", "lora_steps=many", "lora_steps"):
        with pytest.raises(ValueError, match=wrong.partition("=")[0]):
            harness.read_config(arguments("--set", wrong))
    with pytest.raises(SystemExit):
        arguments("--cases", "0")


def test_what_comes_back_is_compared_with_the_original(tmp_path: Path) -> None:
    """Backwards, points change places, and the mask lets every handle be one; the true scene comes back."""
    seen: list[Case] = []

    def to_truth_and_home(case: Case) -> Edited:
        seen.append(case)
        return to_truth(case) if len(seen) == 1 else Edited(home.before, home.before, {"drag": 9.0})

    (home,) = make_cases(1, ["light"], 1)
    (x, y), rows, columns = home.handles[0], *np.indices(home.mask.shape)
    narrow = replace(home, mask=np.hypot(columns - x, rows - y) < 5)
    edit = dragging_back(to_truth_and_home)
    (result,) = harness.run_cases([narrow], edit, learned, tmp_path, compare=False)
    there, back = seen
    assert there is narrow and back.before is home.truth
    assert (back.handles, back.targets) == (home.targets, home.handles)
    assert all(back.mask[round(y), round(x)] for x, y in back.handles)
    assert not narrow.mask[round(home.targets[0].y), round(home.targets[0].x)]
    assert result["seconds"]["drag"] == 2.0


@pytest.mark.parametrize("moved", [0, 3])
def test_measures_of_what_comes_back(tmp_path: Path, moved: int) -> None:
    (case,) = make_cases(1, ["object"], 1)
    array = np.roll(np.asarray(case.before), moved, axis=0)

    def edit(_: Case) -> Edited:
        return Edited(case.truth, case.truth, {"drag": 2.0}, Image.fromarray(array))

    (result,) = harness.run_cases([case], edit, learned, tmp_path, compare=False)
    row, difference = result["rows"]["edit"], (array / 255.0 - np.asarray(case.before) / 255.0)[case.mask]
    exact = 10 * np.log10(1 / max((difference**2).mean(), 1e-10))
    assert row["PSNR back"] == pytest.approx(exact, abs=1e-6)
    assert (tmp_path / "cases/object-000/back.png").is_file()


def test_two_processes_may_open_a_new_folder_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one makes the folder just after this one has looked for its settings."""
    out, looked, original = tmp_path / "out", [], os.path.lexists

    def look(path: Path) -> bool:
        looked.append(path)
        found = original(path)
        if len(looked) == 1:
            harness.open_out(out, {"seed": 0})
        return found

    monkeypatch.setattr(os.path, "lexists", look)
    assert harness.open_out(out, {"seed": 0}) == out and len(looked) > 1
    assert json.loads((out / "settings.json").read_text()) == {"seed": 0}


def test_a_loras_loss_is_compared_with_that_of_the_model_alone() -> None:
    model, prompt = load_model("tiny", device="cpu"), "a red ball"
    clean = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    assert harness.lora_loss(model, LoRA({}, {}), clean, prompt) == 1
    entries = initialize(model.unet, 4, "qkv", torch.Generator().manual_seed(4)).unet
    entries = {path: Factors(x.down, 0.3 * torch.randn_like(x.up), x.alpha) for path, x in entries.items()}
    found = harness.lora_loss(model, LoRA(entries, {}), clean, prompt)

    def loss() -> float:
        """Equation 2 one sample at a time."""
        total, noises = 0.0, torch.randn(20, 4, 16, 16, generator=torch.Generator().manual_seed(2**32))
        for t, noise in zip(range(0, 1000, 50), noises, strict=True):
            alpha = model.schedule.alphas_cumprod[t].item()
            noisy = alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise
            predicted = model.unet(noisy, t, model.encode_text(prompt)).noise[0]
            total += (predicted - noise).square().mean().item()
        return total

    with torch.no_grad():
        without = loss()
        for path, (down, up, alpha) in entries.items():
            weight: Any = model.unet.get_submodule(path).weight
            weight += alpha / len(down) * up @ down
        assert found == pytest.approx(loss() / without, rel=1e-5) and abs(found - 1) > 0.01


def test_a_reconstruction_is_compared_with_what_the_autoencoder_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIDRAG_CACHE", str(tmp_path / "cache"))
    model, (case,) = load_model("tiny", device="cpu"), make_cases(1, ["light"], 1)
    config = EditConfig(steps=4, inversion_steps=3, drag_levels=1, drag_steps=1, hold_steps=0, lora_steps=0)
    out = tmp_path / "out"
    (result,) = harness.run_cases([case], harness.editor(model, config, 0), learned, out, compare=False)
    points = [[(40.0, 40.0)], [(50.0, 40.0)]]  # another drag of the same image has the same reconstruction
    found = drag_edit(model, case.before, *points, prompt=case.prompt, config=config).reconstruction
    autoencoded = decode(model, encode(model, case.before, config)[0])
    error = np.mean((np.asarray(found, float) - np.asarray(autoencoded, float)) ** 2)
    decibels = 10 * np.log10(255**2 / error)
    assert result["rows"]["edit"]["PSNR reconstruction"] == pytest.approx(decibels, abs=1e-6)
    assert 15 < decibels < 60
