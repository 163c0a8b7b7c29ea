"""The command `minidrag` and its subcommands."""

import subprocess
import sys

import pytest
from support.command import ROOT

from minidrag.__main__ import COMMANDS, main


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS), ["--page"]])
def test_every_command_has_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^0$"):
        main([*words, "--help"])
    assert capsys.readouterr().out.startswith("usage: ")


@pytest.mark.parametrize(
    ("program", "words", "usage"),
    [
        ("/bin/minidrag", ["bench", "speed"], "minidrag bench speed"),
        ("/bin/minidrag", ["course", "check"], "minidrag course check"),
        ("/bin/minidrag", ["check"], "minidrag check"),
        ("minidrag/__main__.py", ["bench", "speed"], "python -m minidrag.bench speed"),
        ("minidrag/__main__.py", ["check"], "python -m weights_convert check"),
    ],
)
def test_the_usage_is_what_started_the_command(
    program: str,
    words: list[str],
    usage: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [program, *words])
    with pytest.raises(SystemExit, match="^0$"):
        main([*words, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: {usage} [-h]")


def test_the_small_model_is_checked_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "tiny"]) == 0
    assert capsys.readouterr().out.endswith("minidrag can load it\n")


@pytest.mark.parametrize("words", [["--unknown"], *([name, "--unknown"] for name in COMMANDS)])
def test_a_mistake_is_one_sentence(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("minidrag: ") and error.count("\n") == 1


def test_the_page_opens_before_pytorch_is_imported() -> None:
    script = "import sys\nfrom minidrag.__main__ import main\ntry:\n    main(['page', '--help'])\n"
    script += "except SystemExit:\n    sys.exit('torch' in sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, timeout=100)
    assert done.returncode == 0
