"""Printing never fails a run, and errors are one sentence."""

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from safetensors import SafetensorError
from support.command import ROOT

from minidrag.system import console

PRINTING = """
import sys, warnings, logging
from minidrag.system import console

def job():
    for _ in range(3000):
        print("wrote 照片.png")
        print("wrote 照片.png", file=sys.stderr, flush=True)

sys.exit(console.command(job))
"""


@pytest.mark.parametrize(
    ("redirection", "said"),
    [
        ("> out 2> err", True),
        ("> /dev/full 2> /dev/full", False),
        ("2>&1 | true", False),
    ],
)
def test_nothing_that_is_printed_fails_a_run(tmp_path: Path, redirection: str, said: bool) -> None:
    (tmp_path / "job.py").write_text(PRINTING, encoding="utf-8")
    command = f"set -o pipefail; {sys.executable} {tmp_path}/job.py {redirection}"
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, timeout=100
    )
    assert done.returncode == 0 and done.stderr == b""
    if said:
        for name in ("out", "err"):
            assert (tmp_path / name).read_text() == 3000 * "wrote \\u7167\\u7247.png\n"


def test_the_page_on_a_full_disk_ends_with_its_own_sentence() -> None:
    command = f"{sys.executable} demo.py --page --no-browser --port 0 --device foo > /dev/full"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "minidrag: unknown device 'foo': use cpu, cuda, or mps"
    assert "Traceback" not in done.stderr


def test_streams_are_as_before_afterwards() -> None:
    before, disabled = (sys.stdout, sys.stderr), logging.root.manager.disable
    assert console.command(lambda: print("x")) == 0
    assert (sys.stdout, sys.stderr) == before and logging.root.manager.disable == disabled


def test_warnings_of_other_libraries_are_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    def job() -> None:
        warnings.warn("deprecated", stacklevel=1)
        logging.getLogger("huggingface_hub").warning("retrying")
        raise ValueError("the one\nsentence")

    assert console.command(job) == 2
    assert capfd.readouterr().err == "minidrag: the one sentence\n"


OUT = "out of memory: close other programs, or use a computer with more"


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (ValueError("bad"), 2, "bad"),
        (OSError(28, "No space left on device", "a.png"), 2, "a.png: No space left on device"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (FileNotFoundError("nothing there"), 2, "nothing there"),
        (SafetensorError("I/O error"), 2, "I/O error"),
        (FloatingPointError("drag: a number is not finite"), 2, "drag: a number is not finite"),
        (MemoryError(), 2, OUT),
        (RuntimeError("CUDA error: out of memory"), 2, OUT),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"), 2, OUT),
        (KeyboardInterrupt(), 130, "stopped: nothing was finished"),
        (KeyboardInterrupt("the LoRA is kept"), 130, "stopped: the LoRA is kept"),
        (ValueError("x" * 10**6), 2, "x" * 500 + " ... " + "x" * 500),
    ],
)
def test_errors_are_one_sentence(
    error: BaseException, status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def job() -> None:
        raise error

    assert console.command(job) == status
    assert capsys.readouterr().err == f"minidrag: {words}\n"


def test_a_mistake_in_the_program_is_not_hidden() -> None:
    def job() -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        console.command(job)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--more", "unrecognized arguments: --more (--help lists all options)"),
        ("--number=3", "unrecognized arguments: --number=3 (--help lists all options)"),
        ("-x", "unrecognized arguments: -x: write ./-x for a file (--help lists all options)"),
    ],
)
def test_arguments_are_refused_in_one_sentence(argument: str, message: str) -> None:
    parser = console.Parser(prog="it")
    parser.add_argument("--numbers")
    with pytest.raises(ValueError) as error:
        parser.parse_args([argument])
    assert str(error.value) == message
