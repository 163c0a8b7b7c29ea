"""Ablations: values to try, runs over scenes, and runs over DragBench."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.dragbench import LENGTHS, TINY, Distance, learned, shift, to_truth, write_folder

from minidrag.bench import __main__ as bench
from minidrag.bench import ablate, dragbench, scenes
from minidrag.bench.cases import Case, Edited
from minidrag.config import EditConfig


def test_an_ablation_over_scenes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    used = []

    def editor(model: object, config: EditConfig, seed: int, back: bool) -> Callable[[Case], Edited]:
        used.append(config.block)
        return to_truth

    monkeypatch.setattr(ablate, "editor", editor)
    monkeypatch.setattr(scenes, "load", lambda args: None)
    monkeypatch.setattr(scenes, "fidelity", lambda: None)
    monkeypatch.setattr(scenes, "learned_measures", lambda model, network: learned)
    monkeypatch.setattr(scenes, "settings_of", lambda model, config, *_: {"block": config.block})
    parser = argparse.ArgumentParser()
    ablate.add_arguments(parser)
    words = ["--over", "block", "--values", "1", "2", "--cases", "1", "--kinds", "light"]
    assert ablate.run(parser.parse_args([*words, "--out", str(tmp_path)])) == 0
    assert used == [1, 2]
    table = json.loads((tmp_path / "block.json").read_text())
    assert list(table) == ["no edit", "1", "2"]
    assert table["no edit"]["remaining"]["mean"] == pytest.approx(1, abs=0.05)
    assert ablate.report("block", table) in capsys.readouterr().out


def test_an_ablation_over_dragbench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "DragBench")
    monkeypatch.setattr(dragbench, "fidelity", Distance)
    monkeypatch.setattr(ablate, "editor", lambda *_: shift)
    words = ["ablate", "--over", "block", "--values", "1", "2", "--dragbench", str(folder), *TINY]
    out = tmp_path / "out"
    assert bench.main([*words, "--out", str(out)]) == 0
    table = json.loads((out / "block.json").read_text())
    assert list(table) == ["no edit", "1", "2"]
    assert table["no edit"]["MD"]["mean"] == pytest.approx(sum(LENGTHS) / 4)
    assert table["no edit"]["IF"]["mean"] == 1 and table["1"] == table["2"] != table["no edit"]
    assert (out / "block.md").read_text() in capsys.readouterr().out
