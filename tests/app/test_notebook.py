"""`drag_edit` in a notebook: what it takes, what it shows, what it saves."""

import inspect
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.command import demo

import minidrag
from minidrag import edit as core
from minidrag.app.notebook import ShownEdit, drag_edit
from minidrag.config import EditConfig
from minidrag.model import Model
from minidrag.system.pictures import load_mask
from minidrag.weights.load import load_model

QUICK = replace(
    EditConfig.official(), steps=4, inversion_steps=3, drag_steps=2, lora_steps=1, lora_batch=1, size=64
)
DRAG: dict[str, Any] = {"handles": [(30, 40)], "targets": [(48, 42)], "config": QUICK}


@pytest.fixture(scope="module")
def model(untrained: Path) -> Model:
    return load_model(untrained, device="cpu")


@pytest.fixture
def photo(workdir: Path) -> Image.Image:
    return Image.open("photo.png").convert("RGB")


def test_it_is_the_public_one_and_takes_what_the_core_takes() -> None:
    assert minidrag.drag_edit is drag_edit
    ours, theirs = (list(inspect.signature(one).parameters) for one in (drag_edit, core.drag_edit))
    theirs.remove("window")  # which the session chooses
    assert ours == theirs


def test_the_edit_is_that_of_the_core(model: Model, photo: Image.Image) -> None:
    mask = load_mask(Path("mask.png"), photo.size)
    shown = drag_edit(model, photo, **DRAG, mask=mask, seed=3)
    plain = core.drag_edit(model, photo, **DRAG, mask=mask, seed=3)
    assert shown.image.tobytes() == plain.image.tobytes() and shown.losses == plain.losses


def test_every_kind_of_mask_is_the_same_mask(model: Model, photo: Image.Image) -> None:
    image = Image.open("mask.png")
    levels = np.array(image.convert("L"))
    kinds = ["mask.png", Path("mask.png"), image, image.convert("RGB"), levels, levels > 127, levels / 255]
    kinds += [torch.tensor(levels), torch.tensor(levels > 127)]
    wanted = load_mask(Path("mask.png"), photo.size)
    for mask in kinds:
        session = drag_edit(model, photo, **DRAG, mask=mask).session
        assert session.mask is not None and wanted is not None and torch.equal(session.mask, wanted)
    assert drag_edit(model, photo, **DRAG).session.mask is None


def test_it_shows_its_comparison_and_one_line(model: Model, photo: Image.Image) -> None:
    shown = drag_edit(model, photo, **DRAG)
    with Image.open(io.BytesIO(shown._repr_png_())) as comparison:
        assert comparison.format == "PNG" and comparison.width > 2 * comparison.height
    assert repr(shown) == "<Edit of 96x80 pixels: 2 updates, not arrived>"


def test_it_saves_what_the_command_writes_and_the_command_repeats_it(
    model: Model, photo: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = drag_edit(model, photo, **DRAG, mask="mask.png", seed=3)
    shown.save("out")
    files = {path.name for path in Path("out").iterdir()}
    written = ["comparison.png", "edited.png", "lora.safetensors", "process.gif", "run.json"]
    assert files == {*written, "original.png", "mask.png"}
    values = json.loads(Path("out/run.json").read_text())
    assert values["seed"] == 3 and values["image"] == "original.png"
    Path("out").rename("moved")
    assert demo.main(["--from", "moved/run.json", "--device", "cpu", "--out", "again"]) == 0
    assert Path("again/edited.png").read_bytes() == Path("moved/edited.png").read_bytes()
    with pytest.raises(ValueError, match="moved has .* already"):
        shown.save("moved")
    assert {path.name for path in Path("moved").iterdir()} == files


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a point": ({"handles": (43, 90)}, r"^handles must be a list of points \(x, y\), got \(43, 90\)"),
    "a word": ({"targets": "43,90"}, "^targets must be a list of points"),
    "a path": ({"image": "photo.png"}, "^image must be a PIL image, got 'photo.png': open"),
    "uneven": ({"targets": [(1, 1), (2, 2)]}, "^got 1 handles and 2 targets: give one or more pairs$"),
    "a small mask": ({"mask": np.ones((4, 4))}, "^the mask is 4x4 pixels, the image 96x80$"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_slip_is_one_sentence(model: Model, photo: Image.Image, case: str) -> None:
    slip, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence):
        arguments: dict[str, Any] = {"image": photo} | DRAG | slip
        drag_edit(model, **arguments)


def test_a_float_mask_is_refused_by_the_core(model: Model, photo: Image.Image) -> None:
    with pytest.raises(ValueError, match="^the mask has dtype torch.float32: give bool"):
        core.drag_edit(model, photo, **DRAG, mask=torch.ones(80, 96))


def test_a_bar_is_shown_by_default_in_a_terminal_only(
    model: Model, photo: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = drag_edit(model, photo, **DRAG)
    assert capsys.readouterr().err == "", "this is no terminal"
    assert isinstance(shown, ShownEdit) and "drag" in shown.session.progress.seconds
