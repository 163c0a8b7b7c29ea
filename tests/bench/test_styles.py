"""Styles: the truth stays known in each, and the autoencoder of the small model returns them."""

from functools import cache, partial

import numpy as np
import pytest
from PIL import Image

from minidrag.bench.cases import make_case, measure
from minidrag.bench.placement import place
from minidrag.bench.styles import STYLES, styled
from minidrag.config import EditConfig
from minidrag.images import psnr
from minidrag.model import Model, decode, encode
from minidrag.tiny.renderer import render
from minidrag.weights.load import load_model


@cache
def model() -> Model:
    return load_model("tiny", device="cpu")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", ["light", "stretch"])
def test_a_rendered_truth_is_found_at_its_target(style: str, kind: str) -> None:
    case = make_case(kind, 0, 3, style)
    draw = partial(styled, style)
    found = place(case.truth, case.scene, case.drag, draw)
    assert not found.lost and found.distance < 0.2
    assert place(case.before, case.scene, case.drag, draw).remaining == pytest.approx(1, abs=0.05)
    row = measure(case, case.truth, case.truth, lambda *_: {})
    assert row["arrived"] is True and row["PSNR inside"] == row["PSNR outside"] == 100


@pytest.mark.parametrize("style", STYLES)
def test_a_style_changes_the_picture_alone(style: str) -> None:
    plain, case = make_case("object", 1, 3), make_case("object", 1, 3, style)
    assert (case.scene, case.drag.name, case.handles) == (plain.scene, plain.drag.name, plain.handles)
    assert (case.mask == plain.mask).all() and case.prompt == plain.prompt
    assert (case.before.tobytes() == plain.before.tobytes()) == (style == "plain")
    small = np.asarray(styled(style, case.scene, 32), float)
    box = case.before.resize((32, 32), Image.Resampling.BOX)
    assert np.abs(small - np.asarray(box, float)).mean() < 2  # measured 0.9: the renderer's own small images


@pytest.mark.parametrize("style", STYLES)
def test_the_autoencoder_returns_a_style_at_26_dB(style: str) -> None:
    found = []
    for number in range(4):
        image = make_case("light", number, 77, style).before
        again = decode(model(), encode(model(), image, EditConfig())[0])
        found.append(psnr(again, image, np.ones((128, 128), bool)))
    assert np.mean(found) >= 26


def test_the_hue_is_rotated_around_gray() -> None:
    scene = make_case("object", 0, 3).scene
    before, after = (np.asarray(image, float) for image in (render(scene), styled("hue", scene)))
    inner = ((after > 1) & (after < 254)).all(-1)
    assert np.abs(before.mean(-1) - after.mean(-1))[inner].max() < 1
    spread = [
        np.linalg.norm(image - image.mean(-1, keepdims=True), axis=-1)[inner] for image in (before, after)
    ]
    assert np.abs(spread[0] - spread[1]).max() < 2
