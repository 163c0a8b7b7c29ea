"""Fixtures of several test files, and a table of every parity test's maximum at the end of the report."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from support.command import FAST, demo, raising, write_untrained
from support.references import difference
from torch import Tensor

MAXIMA: dict[str, tuple[float, float]] = {}  # name -> (largest difference, largest value) of the run
SLIPS: dict[str, float] = {}  # a slip made on purpose -> the difference that it made

if "PYTEST_XDIST_WORKER" in os.environ:  # with -n, processes share the cores and not threads
    os.environ["OMP_NUM_THREADS"] = "1"  # of what the tests start
    torch.set_num_threads(1)


@pytest.fixture
def compare() -> Callable[..., None]:
    """compare(name, ours, reference, atol=1e-9) fails above `atol` and enters the difference in the table."""

    def compare(name: str, ours: Tensor, reference: Tensor, atol: float = 1e-9) -> None:
        found, largest = difference(ours, reference), reference.detach().abs().max().item()
        before = MAXIMA.get(name, (0.0, 0.0))
        MAXIMA[name] = (max(before[0], found), max(before[1], largest))
        assert largest > 1e-3, f"{name}: the reference is all but zero and proves nothing"
        assert found <= atol, f"{name}: {found:.3e} apart, more than {atol:.0e}"

    return compare


@pytest.fixture
def record_slip() -> Callable[[str, float], None]:
    """record_slip(name, found) enters in a second table what a slip made on purpose did to the outputs."""
    return SLIPS.__setitem__


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small untrained model."""
    return write_untrained(tmp_path_factory.mktemp("untrained"))


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with an image and a mask; no network; the LoRA cache lies beside it."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("MINIDRAG_CACHE", str(tmp_path / "cache"))
    refuse = raising(AssertionError("asked the hub"))
    monkeypatch.setattr("minidrag.weights.hub.snapshot_download", refuse)
    image, mask = Image.new("RGB", (96, 80), (40, 120, 200)), Image.new("L", (96, 80))
    ImageDraw.Draw(image).ellipse((20, 30, 44, 54), (220, 60, 40))
    ImageDraw.Draw(mask).rectangle((10, 20, 80, 66), 255)
    image.save("photo.png")
    mask.save("mask.png")
    return work


@pytest.fixture
def start(untrained: Path, workdir: Path) -> Callable[..., int]:
    """start(option, ...) runs demo.py in `workdir` with the untrained model and few steps."""

    def start(*options: str | Path) -> int:
        return demo.main([*FAST, "--model", str(untrained), *map(str, options)])

    return start


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:  # a process that -n started
        output["tables"] = MAXIMA, SLIPS


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    maxima, slips = getattr(node, "workeroutput", {}).get("tables", ({}, {}))
    SLIPS.update(slips)
    for name, (found, largest) in maxima.items():
        before = MAXIMA.get(name, (0.0, 0.0))
        MAXIMA[name] = max(before[0], found), max(before[1], largest)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    width = max(map(len, (*MAXIMA, *SLIPS)), default=0)
    if MAXIMA:
        terminalreporter.section("parity with the reference libraries")
        terminalreporter.write_line(f"{'parity: name':{width + 8}}  max abs diff  of values up to")
        for name, (found, largest) in sorted(MAXIMA.items()):
            terminalreporter.write_line(f"parity: {name:{width}}  {found:12.1e}  {largest:15.3g}")
    if SLIPS:
        terminalreporter.section("slips made on purpose, the smallest first")
        for name, found in sorted(SLIPS.items(), key=lambda item: item[1]):
            terminalreporter.write_line(f"slip:   {name:{width}}  {found:12.1e}")
