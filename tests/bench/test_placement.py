"""Finding things in pictures: how exactly, and what is not found."""

import math
import random
from functools import cache

import numpy as np
import pytest
from PIL import Image, ImageFilter

from minidrag.bench.cases import Case, make_case
from minidrag.bench.identify import identify
from minidrag.bench.placement import Moving, descend, place
from minidrag.tiny.scenes import SIDE, Scene, random_scene, render

WHOLE = ("object", "carry", "light", "peak", "keep")
SHAPES = ("stretch", "gaze", "smile")


@cache
def case_of(kind: str) -> Case:
    """A case whose thing moves as a whole or, for the kinds of SHAPES, changes its shape."""
    number = 0
    while Moving.by((case := make_case(kind, number, 5)).drag, case.scene).shape and kind in WHOLE:
        number += 1
    return case


def off_target(case: Case, shift: float, angle: float = 0.6) -> tuple[Moving, tuple[float, ...]]:
    """The numbers of a result that misses its target by so many pixels."""
    moving = Moving.by(case.drag, case.scene)
    (handle, target), *_ = moving.pairs
    if moving.shape:
        return moving, (math.dist(handle, target) - shift, 0.0, 0.0)
    right, down = shift * math.cos(angle), shift * math.sin(angle)
    return moving, (target[0] - handle[0] + right, target[1] - handle[1] + down)


def scene_off_target(case: Case, shift: float) -> Scene:
    moving, numbers = off_target(case, shift)
    return moving.at(numbers)


def noise(grain: float = 0.0, seed: int = 0) -> Image.Image:
    """Noise of every colour, its grains about so many pixels large."""
    values = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    soft = np.asarray(Image.fromarray(values).filter(ImageFilter.GaussianBlur(grain)), dtype=float)
    strong = (soft - soft.mean()) / soft.std() * 60 + 128
    return Image.fromarray(strong.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("shift", [0.5, 3, 20])
def test_misses_of_things_that_move_as_a_whole(kind: str, shift: float) -> None:
    case = case_of(kind)
    moving, numbers = off_target(case, shift)
    found = place(render(moving.at(numbers)), case.scene, case.drag)
    assert not found.lost
    assert found.distance == pytest.approx(shift, abs=0.2)
    assert found.share == pytest.approx(found.distance / math.dist(*moving.pairs[0]))
    assert math.dist(found.points[0], moving.points(numbers)[0]) < 0.25


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("shift", [0, 0.5, 3])
def test_misses_of_shapes(kind: str, shift: float) -> None:
    case = case_of(kind)
    found = place(render(scene_off_target(case, shift)), case.scene, case.drag)
    assert not found.lost and len(found.points) == len(Moving.by(case.drag, case.scene).pairs)
    assert found.distance == pytest.approx(shift, abs=0.15)


@pytest.mark.parametrize("kind", ["object", "gaze", "light"])
def test_no_edit_leaves_the_whole_way_and_the_truth_none(kind: str) -> None:
    case = case_of(kind)
    assert place(case.before, case.scene, case.drag).share == pytest.approx(1, abs=0.03)
    assert place(case.truth, case.scene, case.drag).share == pytest.approx(0, abs=0.03)


def test_a_stretched_thing_that_also_moved() -> None:
    case = case_of("stretch")
    moving, (along, _, _) = off_target(case, 2)
    numbers = (along, 3.0, -2.0)
    found = place(render(moving.at(numbers)), case.scene, case.drag)
    assert math.dist(found.points[0], moving.points(numbers)[0]) < 0.3


def test_a_blurred_edit_is_found() -> None:
    case = case_of("object")
    picture = render(scene_off_target(case, 3)).filter(ImageFilter.GaussianBlur(2))
    found = place(picture, case.scene, case.drag)
    assert not found.lost and found.distance == pytest.approx(3, abs=0.5)


@pytest.mark.parametrize("kind", ["object", "peak", "smile"])
@pytest.mark.parametrize("grain", [0, 5])
def test_nothing_is_found_in_noise(kind: str, grain: float) -> None:
    case = case_of(kind)
    picture = Image.composite(noise(grain), case.before, case.drag.mask)
    assert place(picture, case.scene, case.drag).lost


@pytest.mark.parametrize("kind", ["object", "light", "gaze"])
def test_a_thing_that_is_gone_is_lost(kind: str) -> None:
    case = case_of(kind)
    gone = render(Moving.by(case.drag, case.scene).absent())
    assert place(gone, case.scene, case.drag).lost


def test_descend_goes_along_a_diagonal_valley_where_it_is_told_to() -> None:
    def cost(at: tuple[float, ...]) -> float:
        return abs(at[0] - at[1]) + 0.1 * abs(at[0] - 3)

    assert descend(cost, (0.0, 0.0), 1.0, 0.5, [(0, 1)]) == ((3.0, 3.0), 0.0)
    assert descend(cost, (0.0, 0.0), 1.0, 0.5)[0] == (0.0, 0.0)


@pytest.mark.parametrize("number", range(6))
def test_things_are_named(number: int) -> None:
    scene = random_scene(random.Random(f"names {number}"))
    picture = render(scene)
    if number % 2:
        picture = picture.filter(ImageFilter.GaussianBlur(1.5))
    found = identify(picture)
    assert (found.time, found.ground) == (scene.time, scene.ground)
    wanted = sorted((thing.x, thing.kind, thing.color) for thing in scene.objects)
    assert [(thing.kind, thing.color) for thing in found.objects] == [name[1:] for name in wanted]


def test_nothing_is_named_where_nothing_stands() -> None:
    scene = random_scene(random.Random("names"))
    empty = Scene(scene.time, 0.5, 0.2, scene.peaks, scene.horizon, scene.ground, ())
    assert identify(render(empty)).objects == ()
