"""Advice before and after an edit."""

import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from support.command import PHOTO
from torch import Tensor

from minidrag import tiny
from minidrag.app import advice
from minidrag.app.options import Options
from minidrag.app.session import Session
from minidrag.bench.styles import styled
from minidrag.config import EditConfig
from minidrag.edit import Edit
from minidrag.method.drag import Cell
from minidrag.model import Model
from minidrag.points import Pixel
from minidrag.system import pictures
from minidrag.tiny.scenes import random_scene
from minidrag.weights.load import load_model
from minidrag.window import Window

pytestmark = pytest.mark.usefixtures("workdir")


def drag(x: float, y: float, to_x: float, to_y: float) -> list[tuple[Pixel, Pixel]]:
    return [(Pixel(x, y), Pixel(to_x, to_y))]


def cautions(model: Model, image: Image.Image, mask: Tensor | None, options: Options) -> list[str]:
    return advice.before(Session(model, options, image, mask))


def test_notes_before_a_run(untrained: Path) -> None:
    model = load_model(untrained, device="cpu")
    image = pictures.load_image(Path("photo.png"))
    options = Options(Path("photo.png"), drag(30, 40, 48, 42), prompt="a ball")
    mask = pictures.load_mask(Path("mask.png"), image.size)
    assert cautions(model, image, mask, options) == []

    def only(options: Options, mask: Tensor | None = mask) -> str:
        (note,) = cautions(model, image, mask, options)
        return note

    everything = "so everything may change: paint what may change white in --mask"
    assert only(options, None) == f"there is no mask, {everything}"
    assert only(replace(options, mask=Path("mask.png")), None) == f"the mask is empty, {everything}"
    no_prompt = "there is no prompt: describing the image usually helps (--prompt)"
    assert only(replace(options, prompt=" ")) == no_prompt
    long = only(replace(options, prompt="ball " * 80))
    assert re.fullmatch(r"the prompt has \d+ tokens: the model reads only the first 77", long)
    outside = "the target of drag 1 is outside the mask, where nothing can appear"
    assert only(replace(options, drags=drag(15, 40, 5, 40))) == outside
    near = "the mask ends at the target of drag 1 and may cut what lands there"
    assert only(replace(options, drags=drag(30, 40, 79, 40))) == near
    both = drag(30, 40, 48, 42) + drag(15, 40, 5, 40)
    assert only(replace(options, drags=both)) == outside.replace("1", "2")


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a (dog:1.3) on a lawn", "(dog:1.3)"),
        ("a ((red ball)) on snow", "((red ball))"),
        ("a [red] ball", "[red]"),
        ("a ball <lora:snow:0.8>", "<lora:snow:0.8>"),
        ("a ball (red, with a stripe) at 10:30, size 1:2", None),
    ],
)
def test_weights_in_a_prompt_are_named(untrained: Path, prompt: str, named: str | None) -> None:
    model = load_model(untrained, device="cpu")
    image = pictures.load_image(Path("photo.png"))
    mask = pictures.load_mask(Path("mask.png"), image.size)
    notes = cautions(model, image, mask, Options(Path("photo.png"), drag(30, 40, 48, 42), prompt=prompt))
    wanted = f"{named} in the prompt is read as plain words: weights have no effect here"
    assert notes == ([wanted] if named else [])


def test_transparency_is_said(untrained: Path) -> None:
    model = load_model(untrained, device="cpu")
    image = pictures.load_image(Path("photo.png")).convert("RGBA")
    mask = pictures.load_mask(Path("mask.png"), image.size)
    options = Options(Path("a.png"), drag(30, 40, 48, 42))
    for alpha, said in ((255, False), (254, True), (0, True)):
        image.putpixel((0, 0), (9, 9, 9, alpha))
        image.save("a.png")
        (note, *more) = cautions(model, pictures.load_image(Path("a.png")), mask, options)
        assert said == note.startswith("transparent parts of the image count as white, and ")
        assert len(more) == said  # that there is no prompt


@pytest.mark.parametrize("style", ["plain", "grain"])
def test_the_small_model_knows_its_scenes(style: str) -> None:
    model = load_model("tiny", device="cpu")
    options = Options(Path("photo.png"), drag(30, 40, 48, 42), prompt="a", model="tiny")
    for number in range(8):
        image = styled(style, random_scene(random.Random(f"known {number}")))
        assert cautions(model, image, torch.ones(128, 128, dtype=torch.bool), options) == []
    shipped = pictures.load_image(tiny.DEMO / "ball.png")
    assert cautions(model, shipped, torch.ones(128, 128, dtype=torch.bool), options) == []


def test_the_small_model_does_not_know_photos() -> None:
    model = load_model("tiny", device="cpu")
    options = Options(Path("photo.png"), drag(30, 40, 48, 42), prompt="a", model="tiny")
    texture = Image.effect_noise((160, 128), 120).convert("RGB")  # as much detail as in grass or hair
    wanted = "the tiny model knows only its rendered scenes: use --model sd15 for photos"
    everything = torch.ones(128, 160, dtype=torch.bool)
    assert cautions(model, texture, everything, options) == [wanted]
    assert cautions(model, texture, everything, replace(options, model="sd15")) == []


@pytest.mark.parametrize("level", [0, 10, 20, 60])
def test_a_reconstruction_far_from_the_original_is_said_with_its_psnr(level: int) -> None:
    image = pictures.load_image(Path("photo.png"))
    off = Image.fromarray((np.asarray(image).astype(int) + level).clip(0, 255).astype(np.uint8))
    edit = edit_with(reconstruction=off, task=SimpleNamespace(grid=(40, 48)))
    error = np.square(np.asarray(image, float) - np.asarray(off, float)).mean()
    psnr = 10 * np.log10(255**2 / error) if level else 100
    assert advice.fidelity(edit, image) == pytest.approx(psnr)
    session = SimpleNamespace(image=image, options=replace(OPTIONS, lora=Path("a.safetensors")))
    said = advice.about_fidelity(cast(Session, session), edit)
    if level < 21 and psnr >= advice.MIN_RECONSTRUCTED:
        assert said == []
    else:
        (sentence,) = said
        assert f"the reconstruction is poor ({psnr:.1f} dB PSNR; " in sentence
        for reason in ("does not know such images", "--vae", "prediction type", "--lora"):
            assert reason in sentence
    assert (level == 60) == bool(said)


def edit_with(**values: Any) -> Edit:
    """An edit of which only its result is known."""
    return cast(Edit, SimpleNamespace(**{"config": ONE_UPDATE, "window": WINDOW} | values))


def lines_after(edit: Edit) -> list[str]:
    return [*advice.moves(edit), *advice.about_drag(edit)]


OPTIONS = Options(Path("photo.png"), [])
WINDOW = Window(0, 0, 96, 80)
ONE_UPDATE = EditConfig(drag_levels=1, drag_steps=1)
LAST = SimpleNamespace(level=14, handles=[Cell(0, 0)])  # one level of 14 steps is all there is
FAR = SimpleNamespace(targets=[Cell(0, 9)])
MORE = "advice: more --drag-levels or --drag-steps may bring it further"


def test_a_handle_that_moved_away_is_said() -> None:
    paths = [[Pixel(0, 0), Pixel(3, 3)]] * 2
    values: dict[str, Any] = {"distances": [1.5, 9.0], "remaining": [5.0, 2.0], "paths": paths}
    edit = edit_with(**values, losses=[1.0], steps=[LAST], task=FAR, arrived=False)
    assert lines_after(edit) == [
        "handle 1 moved away from its target: 5.0 pixels remain of 1.5",
        "handle 2 moved 7.0 of 9.0 pixels, 2.0 remain",
        "not every handle arrived, with 1 updates (--drag-levels, --drag-steps)",
        MORE,
    ]


def test_handles_that_did_not_move_are_named() -> None:
    still, moved = [Pixel(0, 0), Pixel(0.7, 0)], [Pixel(0, 0), Pixel(1.1, 0)]
    edit = edit_with(
        distances=[10.0, 10.0, 10.0, 0.0],
        remaining=[9.3, 8.9, 9.3, 0.0],
        paths=[still, moved, still, [Pixel(5, 5)] * 2],
        losses=[1.0, 1.0],
        steps=[LAST],
        task=FAR,
        arrived=False,
        config=EditConfig(drag_levels=1, drag_steps=2),
    )
    assert lines_after(edit)[4:] == [
        "not every handle arrived, with 2 updates (--drag-levels, --drag-steps)",
        "advice: handle 1, 3 did not move: put it on a corner or pattern of the object, name the object in "
        "--prompt, mark more in --mask, or try a larger --drag-lr",
        MORE,
    ]


def test_arrival_is_said() -> None:
    values: dict[str, Any] = {"distances": [9.0], "remaining": [1.0], "paths": [[Pixel(0, 0), Pixel(8, 0)]]}
    values |= {"steps": [LAST], "task": FAR, "arrived": True}
    moved = "handle 1 moved 8.0 of 9.0 pixels, 1.0 remain"
    for updates in (0, 3):
        edit = edit_with(**values, losses=[1.0] * updates)
        assert lines_after(edit) == [moved, f"every handle arrived, with {updates} updates"]
    nothing = "advice: there was nothing to drag, as every target is within --tolerance of its handle"
    near = edit_with(**values, losses=[1.0], config=replace(ONE_UPDATE, tolerance=10.0))
    assert lines_after(near) == [moved, nothing]


def test_a_drag_that_stood_still_is_said() -> None:
    path = [Pixel(0, 0), Pixel(5, 0)]
    values: dict[str, Any] = {"distances": [9.0], "remaining": [4.0], "paths": [path], "losses": [1.0]}
    values["config"] = EditConfig()
    edit = edit_with(**values, steps=[LAST, SimpleNamespace(level=9)], task=FAR, arrived=False)  # not 8
    assert lines_after(edit) == [
        "handle 1 moved 5.0 of 9.0 pixels, 4.0 remain",
        "stopped: no handle moved any more, after 1 updates",
        MORE,
    ]


def test_advice_after_a_run(start: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert start(*PHOTO, "--drag-lr", "0", "--track-radius", "0", "--out", "stuck") == 0
    said = capsys.readouterr().out
    assert re.search(r"^handle 1 moved -?[01]\.\d of 18\.1 pixels, \d+\.\d remain$", said, re.MULTILINE), said
    assert "advice: handle 1 did not move: put it on a corner or pattern of the object" in said
    assert "not every handle arrived, with 2 updates (--drag-levels, --drag-steps)" in said
    assert start("photo.png", "--drag", "30,40:30,40", "--out", "there") == 0
    said = capsys.readouterr().out
    assert "advice: there was nothing to drag, as every target is within --tolerance of its handle" in said
    assert "stopped" not in said


def test_a_long_prompt_is_truncated_and_said(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    long, longer = "ball " * 80, "ball " * 80 + "snow"
    assert start(*PHOTO, "--prompt", long, "--out", "long") == 0
    assert "tokens: the model reads only the first 77" in capsys.readouterr().out
    assert start(*PHOTO, "--prompt", longer, "--out", "longer") == 0
    assert "LoRA: reused from " in capsys.readouterr().out
    edits = [Path(name, "edited.png").read_bytes() for name in ("long", "longer")]
    assert edits[0] == edits[1], "the words beyond the limit have no effect"


def test_an_empty_mask_is_said(start: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (96, 80)).save("black.png")
    assert start(*PHOTO, "--mask", "black.png", "--out", "out") == 0
    assert "note: the mask is empty, so everything may change" in capsys.readouterr().out
