"""Ablations: values to try, runs over scenes and over DragBench, and the plot."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.dragbench import LENGTHS, TINY, Distance, learned, shift, to_truth, write_folder

from minidrag.bench import __main__ as bench
from minidrag.bench import ablate, dragbench, tables
from minidrag.bench.cases import Case, Edited
from minidrag.config import EditConfig


def test_the_usual_values_are_valid() -> None:
    for field, values in ablate.VALUES.items():
        for value in values:
            assert getattr(ablate.configured(EditConfig(), {field: value}), field) == value
    assert ablate.chosen_values("block", ["1", "3"]) == (1, 3)
    with pytest.raises(ValueError, match="--values"):
        ablate.chosen_values("size", None)


def test_an_ablation_over_scenes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    used = []

    def editor(model: object, config: EditConfig, seed: int, back: bool) -> Callable[[Case], Edited]:
        used.append(config.block)
        return to_truth

    monkeypatch.setattr(ablate, "editor", editor)
    monkeypatch.setattr(ablate, "load", lambda args: None)
    monkeypatch.setattr(ablate, "fidelity", lambda: None)
    monkeypatch.setattr(ablate, "learned_measures", lambda model, network: learned)
    monkeypatch.setattr(ablate, "settings_of", lambda model, config, *_: {"block": config.block})
    parser = argparse.ArgumentParser()
    ablate.add_arguments(parser)
    words = ["--over", "block", "--values", "1", "2", "--cases", "1", "--kinds", "light"]
    assert ablate.run(parser.parse_args([*words, "--out", str(tmp_path)])) == 0
    assert used == [1, 2]
    table = json.loads((tmp_path / "block.json").read_text())
    assert list(table) == ["no edit", "1", "2"]
    assert table["no edit"]["remaining"]["mean"] == pytest.approx(1, abs=0.05)
    assert ablate.curve(table, "distance") == (["1", "2"], [table[v]["distance"]["mean"] for v in ("1", "2")])
    assert ablate.report("block", table) in capsys.readouterr().out


def test_an_ablation_over_dragbench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "DragBench")
    for module in (dragbench, ablate):
        monkeypatch.setattr(module, "fidelity", Distance)
    monkeypatch.setattr(ablate, "editor", lambda *_: shift)
    plotted = []
    monkeypatch.setattr(ablate, "write_plot", lambda field, table, out: plotted.append(table))
    words = ["ablate", "--over", "block", "--values", "1", "2", "--dragbench", str(folder), *TINY]
    out = tmp_path / "out"
    assert bench.main([*words, "--out", str(out)]) == 0
    table = json.loads((out / "block.json").read_text())
    assert list(table) == ["no edit", "1", "2"] and plotted == [table]
    assert table["no edit"]["MD"]["mean"] == pytest.approx(sum(LENGTHS) / 4)
    assert table["no edit"]["IF"]["mean"] == 1 and table["1"] == table["2"] != table["no edit"]
    assert (out / "block.md").read_text() in capsys.readouterr().out
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures: list[Any] = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    ablate.plot("block", table, out / "plot.png")
    assert [axis.get_ylabel() for axis in figures[0].axes] == ["MD", "IF"]


def test_the_plot_draws_the_numbers_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    drawn: dict[str, list[float]] = {}

    def close(figure: Any) -> None:
        for axis in figure.axes:
            (line,) = axis.lines
            drawn[axis.get_ylabel()] = list(line.get_ydata())

    monkeypatch.setattr(pyplot, "close", close)
    cell = {"low": 0, "high": 9, "count": 2}
    table: ablate.Table = {
        str(i): {name: {"mean": i * 1.5, **cell} for name in tables.MEASURES} for i in range(3)
    }
    ablate.plot("block", table, tmp_path / "plot.png")
    assert drawn == {name: [0, 1.5, 3.0] for name in ("MD", "IF", "distance", "arrived")}
    drawn.clear()
    without = {value: row | {"IF": None} for value, row in table.items()}
    ablate.plot("block", without, tmp_path / "less.png")
    assert drawn == {name: [0, 1.5, 3.0] for name in ("MD", "distance", "arrived")}
