"""`slips`: one edit per slip, on a sheet with numbers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image, ImageDraw

from minidrag.course import real
from minidrag.course.__main__ import main
from minidrag.course.catalog import EXERCISES
from minidrag.method import dragdiffusion

NUMBERS = {
    "arrived": True,
    "remaining": 1.5,
    "ball": None,
    "background": 2.0,
    "reconstruction": 3.0,
    "loss": 4.0,
}


def test_there_is_an_edit_for_each_slip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each with its function in place; one that fails is shown as such."""
    used = []

    def edit(lora: Any = None) -> tuple[Any, real.Numbers]:
        used.append((dragdiffusion.background_loss, lora))
        if len(used) == 3:
            raise RuntimeError("shapes do not fit")
        shade = 1 if len(used) == 6 else len(used)
        return SimpleNamespace(raw=Image.new("RGB", (128, 128), (shade, 9, 9)), lora="trained"), NUMBERS

    monkeypatch.setattr(real, "demo_edit", edit)
    assert main(["slips", "--out", str(tmp_path / "a" / "b"), "--exercises", "6", "8"]) == 0
    background, loss = EXERCISES[5], EXERCISES[7]
    functions = [background.reference, *map(background.with_slip, background.slips)]
    expected = [function.__code__ for function in functions + [background.reference] * len(loss.slips)]
    assert [function.__code__ for function, _ in used] == expected
    assert [lora for _, lora in used] == [None] + ["trained"] * len(background.slips) + [None] * len(
        loss.slips
    )
    with Image.open(tmp_path / "a" / "b" / "slips.png") as sheet:
        colors = {color for _, color in sheet.getcolors(1 << 24) or []}
    assert {(count, 9, 9) for count in range(1, len(used) + 1) if count not in (3, 6)} <= colors
    lines = capsys.readouterr().out.splitlines()[: len(used)]
    assert lines[0].startswith("no slip ") and "1.5 px left; no ball, loss 4.0" in lines[0]
    assert lines[2].startswith("background_loss: mean for sum ") and lines[2].endswith("shapes do not fit")
    same = [line for line in lines[1:] if "not a pixel differs" in line]
    assert [line.partition("   ")[0] for line in same] == [f"background_loss: {background.slips[-1].name}"]


def test_the_ball_is_located_by_its_color() -> None:
    image = Image.new("RGB", (128, 128), (90, 160, 70))
    assert real.center(image) is None
    ImageDraw.Draw(image).ellipse((30, 40, 50, 60), (220, 30, 40))
    assert real.center(image) == pytest.approx((40, 50), abs=0.1)


@pytest.mark.slow
def test_slips_show_in_the_edit(tmp_path: Path) -> None:
    """The ball arrives; pulled the other way, it does not."""
    motion = EXERCISES[3]
    assert motion.name == "motion_loss"
    _, right = real.demo_edit()
    (away,) = [slip for slip in motion.slips if slip.name == "handle and target swapped"]
    with real.in_place(motion, motion.with_slip(away)):
        _, wrong = real.demo_edit()
    assert right["arrived"] and right["ball"] < 6 and not wrong["arrived"] and wrong["ball"] > 12
