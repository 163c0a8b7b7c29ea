"""The lessons stay true: commands parse, files and functions exist, quotations are code, figures are made."""

import argparse
import importlib
import re
import shlex
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.command import ROOT

from minidrag.app.command_line import build_parser as demo_parser
from minidrag.app.options import configured, read_options
from minidrag.bench.harness import read_config, value_of
from minidrag.course import experiments
from minidrag.course.__main__ import SUBCOMMANDS, build_parser, main
from minidrag.course.experiments import EXPERIMENTS, Bench

FOLDER = ROOT / "minidrag/course/lessons"
FILES = sorted(FOLDER.glob("[1-9]*-*.md"), key=lambda file: int(file.stem.partition("-")[0]))
LESSONS = {file.stem: file.read_text(encoding="utf-8") for file in FILES}
TEXTS = LESSONS | {"README": (FOLDER / "README.md").read_text(encoding="utf-8")}
EXERCISES = ["DDIM step", "inversion order", "bilinear sampling at a border"]
EXERCISES += ["motion loss with its stop-gradient", "point tracking", "background loss", "LoRA forward"]
EXERCISES += [
    "LoRA loss",
    "key/value injection",
    "time embedding",
    "asymmetric padding",
    "one alternation step",
]
ALL = pytest.mark.parametrize("name", TEXTS)
QUICK, SLOW, LONG = ["1-noise"], ["2-inversion", "3-features", "5-supervision", "6-tracking", "7-control"], []
LONG = [name for name in EXPERIMENTS if name not in QUICK + SLOW]


def commands(text: str) -> list[list[str]]:
    """Command lines in code blocks, as words."""
    lines = re.findall(r"^    (python .+?)(?: {2,}#.*)?$", text, re.MULTILINE)
    return [shlex.split(command) for command in lines]


def slug(heading: str) -> str:
    """Anchor that a code host gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_there_are_ten_lessons_of_one_idea_each() -> None:
    assert list(LESSONS) == list(EXPERIMENTS) and len(LESSONS) == 10
    for number, (name, text) in enumerate(LESSONS.items(), 1):
        assert text.startswith(f"# {number}. ") and 60 <= len(text.splitlines()) <= 120, name
        assert text.count("![") == 1 and f"({name}.png)" in text
        assert f"    python -m minidrag.course figures {number}\n" in text
        assert re.findall(r"^## (.*)$", text, re.MULTILINE)[:3] == ["Predict", "Run", "Look"]
    assert sum(file.stat().st_size for file in FOLDER.glob("*.png")) < 1_000_000


@ALL
def test_commands_parse(name: str) -> None:
    lines = commands(TEXTS[name])
    assert lines
    for words in lines:
        if words[1] == "demo.py":
            given = vars(demo_parser().parse_args(words[2:]))
            read_options({"base": ROOT / "minidrag/course/lessons/drag.json"} | given)
        elif words[2] == "minidrag.course":
            assert words[3] in {*SUBCOMMANDS, "new", "check"}
            if words[3] in SUBCOMMANDS:
                build_parser().parse_args(words[3:])
        else:
            assert words[1:3] == ["-m", "minidrag.bench"]
            parser, module = argparse.ArgumentParser(), importlib.import_module(f"minidrag.bench.{words[3]}")
            module.add_arguments(parser)
            check_ablation(parser.parse_args(words[4:])) if words[3] == "ablate" else None


def check_ablation(args: argparse.Namespace) -> None:
    """Every value of an ablation must be a setting that exists."""
    assert args.values
    for value in args.values:
        configured(read_config(args), {args.over: value_of(value)})


@ALL
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\((?!https?:)(.+?)\)", TEXTS[name]):
        path, _, anchor = target.partition("#")
        file = (FOLDER / path).resolve()
        assert file.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), target


def test_functions_that_are_to_be_opened_exist() -> None:
    seen = 0
    for name, text in LESSONS.items():
        section = text.partition("## Open the code\n")[2].partition("\n## ")[0]
        source = ""
        for item in re.split(r"\n- ", section):
            if link := re.search(r"\]\((.+?\.py)\)", item):
                source = (FOLDER / link[1]).read_text(encoding="utf-8")
            head = re.split(r" in (?:\[|the same file)", item)[0]
            for names in re.findall(r"`([A-Za-z_][\w.]*)`", head):
                for part in names.split("."):
                    assert re.search(rf"^ *(?:def|class) {part}\b", source, re.MULTILINE), (name, names)
                seen += 1
    assert seen >= 20


def test_settings_and_names_in_the_notation_exist() -> None:
    table = TEXTS["README"].partition("## Notation")[2]
    cells = [line.split("|")[2] for line in table.splitlines() if line.startswith("|")][2:]
    source = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "minidrag").rglob("*.py"))
    for cell in cells:
        for word in re.findall(r"[A-Za-z_]{3,}", cell):
            assert re.search(rf"\b{word}\b", source), word


def test_python_in_lessons_is_quoted_from_the_code() -> None:
    sources = [file.read_text(encoding="utf-8") for file in (ROOT / "minidrag").rglob("*.py")]
    blocks = [
        block for text in TEXTS.values() for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    ]
    assert blocks
    for block in blocks:
        indented = [textwrap.indent(block, " " * depth) for depth in (0, 4, 8)]
        assert any(part in source for part in indented for source in sources), block


@ALL
def test_formulas_are_closed(name: str) -> None:
    text = TEXTS[name]
    assert text.count("```") % 2 == 0
    for block in re.findall(r"```math\n(.*?)```", text, re.DOTALL):
        assert block.count("{") == block.count("}") and block.count(r"\left") == block.count(r"\right")
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for paragraph in prose.split("\n\n"):
        assert paragraph.count("$") % 2 == 0, paragraph


def test_every_exercise_has_its_lesson() -> None:
    overview = TEXTS["README"]
    for number, title in enumerate(EXERCISES, 1):
        assert f"{number}, {title}" in overview
        lessons = [text for text in LESSONS.values() if f" {number}, {title}" in text.replace("\n", " ")]
        assert len(lessons) == 1, title
        assert re.search(rf"check my-exercises {number}\n", lessons[0])


def difference(name: str, made: Path) -> float:
    """Mean difference of a figure from the one checked in, of 255."""
    one, other = (Image.open(folder / f"{name}.png").convert("RGB") for folder in (made, FOLDER))
    assert one.size == other.size
    return float(np.abs(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).mean())


def test_the_figure_and_the_table_of_lesson_1_are_those_of_its_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["figures", "1", "--out", str(tmp_path)]) == 0
    assert difference("1-noise", tmp_path) < 4
    printed = [line.split() for line in capsys.readouterr().out.splitlines()[1:7]]
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", LESSONS["1-noise"], re.MULTILINE)
    assert len(rows) == 6
    for shown, row in zip(printed, rows, strict=True):
        assert [float(value) for value in shown] == pytest.approx([float(value) for value in row], abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_figures_are_made_by_their_commands(name: str, tmp_path: Path) -> None:
    assert main(["figures", name[0], "--out", str(tmp_path)]) == 0
    assert difference(name, tmp_path) < 6


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_long_experiments_run_with_fewer_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"steps": 10, "inversion_steps": 7, "drag_levels": 1, "drag_steps": 1}
    whole = experiments.open_case
    monkeypatch.setattr(
        experiments, "open_case", lambda model, case, config: whole(model, case, replace(config, **few))
    )
    draw = experiments.make_cases
    monkeypatch.setattr(experiments, "make_cases", lambda count, kinds, seed: draw(2, kinds, seed))
    monkeypatch.setattr(experiments, "LORA", replace(experiments.LORA, lora_steps=41, lora_batch=1))
    finding = EXPERIMENTS[name](Bench())
    assert finding.figure.size == Image.open(FOLDER / f"{name}.png").size and len(finding.lines) >= 4


def test_a_lesson_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["figures", "11"]) == 2
    assert "there is no lesson 11: they are 1 to 10" in capsys.readouterr().err
    assert build_parser().parse_args(["figures"]).lessons == [], "and none means all"


@pytest.mark.usefixtures("workdir")
def test_figures_need_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["figures", "1", "--out", "photo.png"]) == 2
    assert "photo.png" in capsys.readouterr().err
