"""`check`: verdicts, messages for code of every kind, JSON, and the edit with a student's functions."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from course.solutions import IMPORTS, SOLUTIONS
from PIL import Image

from minidrag.course import real
from minidrag.course.__main__ import main
from minidrag.course.catalog import EXERCISES, file_name

# What a student may write: exercise, text of the file, and a part of the sentence that it gets.
BAD = [
    (
        1,
        "def step(*given):\n    raise ValueError('two\\nlines')",
        "it raises: ValueError: two lines (line 2)",
    ),
    (1, "def step(*given):\n    return None", "it returns None: is the return statement missing?"),
    (
        2,
        "def invert(u, s, latent, *given):\n    while True: yield latent",
        "its latent has more than 1000 parts",
    ),
    (3, "def sample(*given): return 'features'", "its result is a str"),
    (3, "def sample(features, points): return features[:, 0]", "shape (3, 7), expected (3, 9)"),
    (4, "def motion_loss(features, *given): return features.sum()[None]", "shape (1,), expected ()"),
    (4, "def motion_loss(features, *given): return features.sum() / 0", "a number is not finite"),
    (5, "def track(features, handles, origin, radius) return 1", "does not import: SyntaxError"),
    (5, "def track(f, handles, *_): handles.pop(); return handles", "it changes its input `handles`"),
    (6, SOLUTIONS[6].replace("    return", "    print('here I am')\n    return"), "it prints 'here I am'"),
    (6, "def background_loss(p, o, mask): return (p - o).float().sum()", "float32, expected float64"),
    (7, "import no_such_module", "ModuleNotFoundError: No module named 'no_such_module' (line 1)"),
    (
        7,
        "import os, sys\nos.write(1, b'x')\nprint('y')\nsys.exit(3)",
        "does not import: SystemExit: 3 (line 4)",
    ),
    (8, SOLUTIONS[8].replace("    noisy", "    noise.mul_(2)\n    noisy"), "changes its input `noise`"),
    (8, "def noise_loss(*given): return input()", "it raises: EOFError"),
    (
        9,
        "def forward(layer, tokens, *given): return tokens",
        "expected a tuple of tokens and keys and values",
    ),
    (10, "def embed(*given): pass", "there is no function `forward`"),
    (11, "import os\ndef forward(*given): os._exit(0)", "it ends the whole Python process"),
    (12, "def gooddrag(*given): return gooddrag(*given)", "RecursionError"),
]


def write(folder: Path, texts: dict[int, str]) -> Path:
    folder.mkdir(exist_ok=True)
    for number, text in texts.items():
        (folder / file_name(number)).write_text(text)
    return folder


def checked(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, dict[str, Any]]:
    status = main(["check", "--time-limit", "120", *map(str, words), "--json"])
    output = capsys.readouterr().out
    return status, json.loads(output, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize("half", [0, 1])
def test_bad_code_gets_one_sentence(half: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = {number: (text, part) for number, text, part in (BAD if half else BAD[::-1])}
    folder = write(tmp_path, {number: text for number, (text, _) in chosen.items()})
    status, report = checked(capsys, folder)
    assert status == 1 and report["right"] == 0 and report["of"] == len(EXERCISES)
    for verdict in report["exercises"]:
        sentence = verdict["problem"] or "; ".join(map(str, verdict["outputs"].values()))
        assert chosen[verdict["number"]][1] in sentence, verdict
        assert "\n" not in sentence and "Traceback" not in sentence and len(sentence) < 300


def test_a_loop_that_never_ends_is_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, {2: "while True: pass", 6: SOLUTIONS[6]})
    status, report = checked(capsys, tmp_path, "2", "--time-limit", "0.5")
    (verdict,) = report["exercises"]
    assert status == 1 and verdict["problem"] == "it runs for more than 0.5 seconds: does a loop never end?"
    status, report = checked(capsys, tmp_path, "6")
    assert status == 0 and report["right"] == 1


ENDED = "its process was ended by SIGKILL: does it crash, or use too much memory?"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", ENDED),
        ("return bytearray(9 * 2**30)", "it raises: MemoryError (line 2)"),
        ("raise NotImplementedError('for Half')", "it raises: NotImplementedError: for Half (line 2)"),
        ("raise NotImplementedError", "not written yet"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits memory in this way")
def test_crashes_memory_and_what_torch_has_not(
    line: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, {1: f"def step(*given):\n    {line}"})
    status, report = checked(capsys, tmp_path, "1")
    assert status == 1 and report["exercises"][0]["problem"] == sentence


def test_a_warning_is_not_printing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = SOLUTIONS[6].replace("    return", "    torch.tensor(original)\n    return")
    status, _ = checked(capsys, write(tmp_path, {6: text}), "6")
    assert status == 0


def test_every_line_of_bad_code_is_used() -> None:
    for number in range(1, len(EXERCISES) + 1):
        assert 1 <= sum(entry[0] == number for entry in BAD) <= 2


def test_solutions_are_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = checked(capsys, write(tmp_path, SOLUTIONS), "--seed", "7")
    assert status == 0 and report["right"] == report["of"] == len(EXERCISES) and report["seed"] == 7
    assert all(verdict["right"] and not verdict["problem"] for verdict in report["exercises"])


def test_a_slip_is_named_with_its_hint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slip = SOLUTIONS[4].replace("features.detach()", "features")
    write(
        tmp_path,
        {4: slip, 6: SOLUTIONS[6], 10: SOLUTIONS[10].replace("angle), torch.sin", "angle), torch.tan")},
    )
    assert main(["check", str(tmp_path), "4", "6", "10"]) == 1
    output = capsys.readouterr().out
    loss, gradient, named, *rest = output.splitlines()[1:]
    assert loss.split() == ["loss:", "exact"] or "rounding" in loss
    assert "largest difference" in gradient and "no stop-gradient. Detach F_q" in named
    assert "this matches no known mistake" in output and rest[-1] == "1 of 3 right"


def test_stubs_and_missing_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "folder"
    assert main(["new", str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        file_name(n) for n in range(1, len(EXERCISES) + 1)
    ]
    (folder / file_name(3)).write_text("mine")
    (folder / file_name(5)).unlink()
    assert main(["new", str(folder)]) == 0
    assert "1 exercises laid out, 11 were there and are kept" in capsys.readouterr().out
    assert (folder / file_name(3)).read_text() == "mine"
    (folder / file_name(5)).unlink()
    status, report = checked(capsys, folder, "1", "5", "--edit")
    assert status == 1 and report["edit"] == {"problem": "no edit: none of these exercises is right yet"}
    written, missing = (verdict["problem"] for verdict in report["exercises"])
    assert written == "not written yet" and missing.startswith("there is no file 05_tracking.py")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["check", "nowhere"], "there is no folder nowhere"),
        (["check", ".", "13"], "there is no exercise 13: they are 1 to 12"),
        (["check", ".", "--seed", "-1"], "--seed must be"),
        (["new", "file/folder"], "file"),
        (["slips", "--exercises", "0"], "there is no exercise 0"),
    ],
)
def test_what_cannot_be_done(
    words: list[str], part: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workdir / "file").touch()
    assert main(words) == 2
    output = capsys.readouterr()
    assert part in output.err and output.err.startswith("minidrag: ") and output.err.count("\n") == 1
    assert not output.out


@pytest.mark.slow
def test_the_edit_with_solutions_is_the_project_s_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = checked(capsys, write(tmp_path, SOLUTIONS), "--edit")
    assert status == 0
    edit, numbers = real.demo_edit()
    assert report["edit"] == {"exercises": list(SOLUTIONS)} | numbers and numbers["arrived"]
    with Image.open(tmp_path / "edit.png") as image:
        assert image.tobytes() == edit.raw.tobytes()


@pytest.mark.slow
def test_the_edit_uses_the_student_s_functions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Right on the inputs of the check, float64, and not in the edit: it stops with a sentence."""
    guarded = IMPORTS + SOLUTIONS[6].replace(IMPORTS, "").replace(
        "    return", "    assert previous.dtype == torch.float64, 'only float64'\n    return"
    )
    status, report = checked(capsys, write(tmp_path, {6: guarded}), "6", "--edit")
    assert report["right"] == 1 and status == 1
    line = guarded[: guarded.index("    assert")].count("\n") + 1
    sentence = f"the edit stops: AssertionError: only float64 (06_background_loss.py, line {line})"
    assert report["edit"]["problem"] == sentence
    assert not (tmp_path / "edit.png").exists()
