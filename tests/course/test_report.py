"""The report: complete, valid, self-contained, true to run.json and to the source, and never in the way."""

import json
import re
import shutil
import subprocess
import textwrap
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from support.command import PHOTO, ROOT, WRITTEN, complaint, demo, raising

from minidrag.config import EditConfig
from minidrag.course import report
from minidrag.course.__main__ import main
from minidrag.course.excerpt import excerpt
from minidrag.course.mathml import mathml
from minidrag.course.replay import Moment, replay, spread
from minidrag.course.sections import Subject, patches
from minidrag.course.svg import figure, heat
from minidrag.edit import drag_edit
from minidrag.method.drag import Cell, Step, track
from minidrag.method.dragdiffusion import Task
from minidrag.weights.load import load_model

SECTIONS = ["task", "lora", "inversion", "features", "start", "supervision", "tracking", "update", "steps"]
SECTIONS += ["control", "detail", "result"]
ALONE = [name for name in SECTIONS if name != "start"]
VOID = {"meta", "input", "br", "link", "img"}  # elements without an end tag
TWO = ["--drag", "60,60:50,60"]
MASK = ["--mask", "mask.png"]
RUNS = {  # options, sections
    "one level": ([*MASK], ALONE),
    "in turn and warped": ([*MASK, "--warp-start", "--drag-levels", "2", "--prompt", "a <b>"], SECTIONS),
    "two handles, no mask": ([*TWO, "--motion-reference", "start", "--control-blocks", "0"], ALONE),
    "no detail": ([*MASK, "--no-detail"], [name for name in ALONE if name != "detail"]),
    "nothing to do": (["--drag-steps", "0", "--lora-steps", "0", "--inversion-steps", "1"], ALONE),
}


class Page(HTMLParser):
    """Parts of a report; AssertionError for a tag that does not match."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.sections: list[str] = []
        self.details = 0
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.sections.append(values["id"] or "")
        self.details += tag == "details"
        self.links += [values[name] or "" for name in ("href", "src", "xlink:href") if name in values]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture
def made(start: Callable[..., int]) -> Callable[..., str]:
    """made(option, ...): the report of a run into the folder out."""

    def made(*options: str) -> str:
        assert start(*PHOTO, *options, "--report", "--out", "out") == 0
        return Path("out/report.html").read_text(encoding="utf-8")

    return made


@pytest.mark.parametrize("name", RUNS)
def test_a_report_is_complete_valid_and_agrees_with_run_json(made: Callable[..., str], name: str) -> None:
    options, expected = RUNS[name]
    text = made(*options)
    page = Page(text)
    assert page.sections == expected and page.details == len(expected)
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[\w+/=]+", "", text))
    result = json.loads(Path("out/run.json").read_text())["result"]
    shown = " ".join(page.texts)
    for number, (left, distance) in enumerate(zip(result["remaining"], result["distances"], strict=True), 1):
        assert f"handle {number} has {left:.1f} of {distance:.1f} pixels left" in shown
    assert f"{len(result['losses'])} update" in shown
    assert "a <b>" in shown or "--prompt" not in options
    assert ("comes from" in shown, "nan" in shown) == (False, False)


def test_quoted_lines_are_those_of_the_source(made: Callable[..., str]) -> None:
    text = made(*MASK, "--warp-start")
    quotations = re.findall(
        r"<figcaption>(minidrag/[\w/]+\.py):(\d+)</figcaption><pre>(.*?)</pre>", text, re.DOTALL
    )
    assert len(quotations) >= len(SECTIONS)
    for file, number, code in quotations:
        quoted = Page(f"<pre>{code}</pre>")
        lines = "".join(quoted.texts).splitlines()
        first = int(number) - 1
        source = (ROOT / file).read_text(encoding="utf-8").splitlines()[first : first + len(lines)]
        assert lines == textwrap.dedent("\n".join(source)).splitlines(), file


def test_a_handle_is_nearest_to_itself_before_the_drag(untrained: Path, workdir: Path) -> None:
    image = Image.open("photo.png").convert("RGB")
    mask = torch.zeros(80, 96, dtype=torch.bool)
    mask[20:66, 10:80] = True
    config = EditConfig(steps=6, inversion_steps=4, lora_steps=1, drag_levels=2, drag_steps=3, size=64)
    model = load_model(untrained, device="cpu")
    points = [(30, 40), (60, 50)], [(48, 42), (50, 50)]
    edit = drag_edit(model, image, *points, mask=mask, config=config)
    values = replay(model, edit, "")
    for moment in values.moments:
        at, start = moment.step.handles[0], edit.task.handles[0]
        least = moment.distances[int(at.row), int(at.column)]
        assert moment.index or (at == start and least == 0)


@pytest.mark.parametrize(("hold", "drawn"), [(0, []), (1, [(0.4, 0.3)])])
def test_a_handle_that_has_arrived_is_drawn_as_the_loss_pulls_it(
    hold: int, drawn: list[tuple[float, float]]
) -> None:
    """Held at its target, which is nearer than a cell, or left alone."""
    config = EditConfig(motion_step=6.0, tolerance=3.0, hold_steps=hold, scale_radii=False)
    task = Task([Cell(20, 20)], [Cell(20.3, 20.4)], None, (64, 64))
    image = Image.new("RGB", (128, 128))
    edit: Any = SimpleNamespace(task=task, config=config)
    samples: Any = SimpleNamespace(samples=[image])
    step = Step(torch.zeros(1), task.handles, torch.zeros(1), torch.zeros(1), 7, None)
    text = patches(Subject(image, None, "", "", edit, samples), Moment(3, step, image, torch.zeros(64, 64)))
    corners: dict[str, list[tuple[float, float]]] = {"patch": [], "ahead": []}
    for kind, x, y in re.findall(r'<rect class="(\w+)" x="([\d.]+)" y="([\d.]+)"', text):
        corners[kind].append((float(x), float(y)))
    ((left, top),) = corners["patch"]
    moves = [(round(x - left, 2), round(y - top, 2)) for x, y in corners["ahead"]]
    assert moves == drawn


def test_a_report_of_a_finished_run(
    start: Callable[..., int], made: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = made(*MASK)
    capsys.readouterr()
    assert main(["report", "out"]) == 0
    assert capsys.readouterr().out == "wrote out/report.html\n"
    again = Page(Path("out/report.html").read_text(encoding="utf-8"))
    assert again.texts == Page(text).texts
    assert sorted(path.name for path in Path("out").iterdir()) == sorted([*WRITTEN, "report.html"])


@pytest.mark.parametrize("made", [PHOTO, ["--generate", "--prompt", "a ball", "--drag", "20,30:40,30"]])
def test_a_report_of_a_run_without_a_lora(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str], made: list[str]
) -> None:
    assert start(*made, "--lora-steps", "0", "--out", "out") == 0
    capsys.readouterr()
    assert main(["report", "out"]) == 0
    assert capsys.readouterr().out == "wrote out/report.html\n", "and the paths are those of the run"


def test_a_file_of_the_same_name_is_kept(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out").mkdir()
    Path("out/report.html").write_text("my own")
    assert start(*PHOTO, "--report", "--out", "out") == 0
    assert "note: there is no report: out/report.html is not a report" in capsys.readouterr().out
    assert main(["report", "out"]) == 2
    assert "is not a report: move it away" in complaint(capsys)
    assert Path("out/report.html").read_text() == "my own"


@pytest.mark.usefixtures("workdir")
def test_a_folder_without_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "nowhere"]) == 2
    assert "there is no file nowhere/run.json" in complaint(capsys)


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (RuntimeError("out of\nmemory"), "note: there is no report: out of memory"),
        (AssertionError(), "note: there is no report: AssertionError"),
        (KeyboardInterrupt(), "note: the report was stopped; the results are complete"),
    ],
)
def test_a_report_that_fails_is_a_note(
    start: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    note: str,
) -> None:
    monkeypatch.setattr(report, "replay", raising(error))
    assert start(*PHOTO, "--report", "--out", "out") == 0
    assert note in capsys.readouterr().out
    assert sorted(path.name for path in Path("out").iterdir()) == WRITTEN


def test_no_report_is_written_unasked(start: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "replay", raising(AssertionError("asked")))
    assert start(*PHOTO, "--out", "out") == 0
    assert demo.main(["--from", "out/run.json", "--out", "again"]) == 0


def test_a_browser_runs_it_without_an_error(made: Callable[..., str], tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium")
    watching = "<script>onerror = (message) => { document.title = 'ERROR ' + message; };</script>"
    file = tmp_path / "watched.html"
    file.write_text(made(*MASK, "--warp-start").replace("<body>", f"<body>{watching}"), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
    flags += " --disable-background-networking --disable-component-update --disable-sync"
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [browser, *flags.split(), profile, "--dump-dom", f"{file.as_uri()}#all"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip(f"chromium does not start here: {done.stderr[-200:]}")
    assert "<title>How this image was dragged" in done.stdout
    assert done.stdout.count('<details open="">') == len(SECTIONS)
    assert done.stdout.count('class="frame now"') == 1 and 'class="slider live"' in done.stdout


# Its parts


def test_a_formula_in_mathml() -> None:
    root = "<mrow><msqrt><mrow><mn>2</mn></mrow></msqrt></mrow>"
    wanted = (
        '<math display="block"><mrow><msubsup><mrow><mover accent="true"><mi>z</mi><mo>ˆ</mo></mover></mrow>'
        "<mi>t</mi><mrow><mi>k</mi><mo>+</mo><mn>1</mn></mrow></msubsup><mo>=</mo>"
        f"<mfrac><mrow><mi>α</mi></mrow>{root}</mfrac></mrow></math>"
    )
    assert mathml(r"{\hat z}_t^{k+1} = \frac{\alpha}{\sqrt{2}}") == wanted
    assert "<munder><mo>∑</mo><mi>i</mi></munder>" in mathml(r"\sum_i a")
    assert "<mtext>a\u00a0&lt;\u00a0b\u00a0</mtext>" in mathml(r"\text{a < b }")
    with pytest.raises(ValueError, match="unknown command .nonsense in a formula"):
        mathml(r"\nonsense")


def test_an_excerpt_fails_where_the_code_has_changed() -> None:
    part = excerpt(track, "for handle", "append(")
    assert part.file == "minidrag/method/drag.py" and part.lines[0].startswith("    for handle")
    with pytest.raises(ValueError, match="has no lines from 'no such line'"):
        excerpt(track, "no such line", "return")


def test_a_map_is_dark_where_it_is_small() -> None:
    image = heat(torch.tensor([[0.0, 0.5, 1.0]]))
    levels = [sum(image.getpixel((column, 0))) for column in range(3)]  # type: ignore[arg-type]
    assert image.size == (3, 1) and levels == sorted(levels) and levels[0] < 120 < 600 < levels[2]


def test_an_image_is_inside_the_file() -> None:
    text = figure(Image.new("RGB", (20, 10)), "a & b", view=(5, 0, 10, 10))
    assert 'viewBox="5 0 10 10"' in text and "data:image/png;base64," in text and "a &amp; b</fig" in text
    assert "data:image/jpeg" in figure(Image.new("RGB", (300, 300)), "")


def test_spread_has_both_ends() -> None:
    assert spread(20, 5) == [0, 5, 10, 14, 19] and spread(3, 12) == [0, 1, 2] and spread(1, 5) == [0]
