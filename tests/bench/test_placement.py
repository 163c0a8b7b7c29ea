"""Placement of the dragged part in images: accuracy and false detections."""

import math
from functools import cache

import numpy as np
import pytest
from PIL import Image, ImageFilter

from minidrag.bench.cases import SceneCase, make_case
from minidrag.bench.placement import Motion, compared_region, descend, fit, place
from minidrag.tiny.scenes import SIDE, Scene, render

RIGID = ("object", "carry", "light", "peak", "keep")
SHAPES = ("stretch", "gaze", "smile")


@cache
def case_of(kind: str) -> SceneCase:
    """A case whose part moves rigidly or, for the kinds of SHAPES, changes its shape."""
    number = 0
    while Motion.of((case := make_case(kind, number, 5)).drag, case.scene).shape and kind in RIGID:
        number += 1
    return case


def off_target(case: SceneCase, shift: float, angle: float = 0.6) -> tuple[Motion, tuple[float, ...]]:
    """Parameters of a result that misses the target by `shift` pixels."""
    motion = Motion.of(case.drag, case.scene)
    (handle, target), *_ = motion.pairs
    if motion.shape:
        return motion, (math.dist(handle, target) - shift, 0.0, 0.0)
    right, down = shift * math.cos(angle), shift * math.sin(angle)
    return motion, (target[0] - handle[0] + right, target[1] - handle[1] + down)


def scene_off_target(case: SceneCase, shift: float) -> Scene:
    motion, params = off_target(case, shift)
    return motion.apply(params)


def noise(grain: float = 0.0, seed: int = 0) -> Image.Image:
    """Color noise with a grain size in pixels."""
    values = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    blurred = np.asarray(Image.fromarray(values).filter(ImageFilter.GaussianBlur(grain)), dtype=float)
    scaled = (blurred - blurred.mean()) / blurred.std() * 60 + 128
    return Image.fromarray(scaled.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("kind", RIGID)
@pytest.mark.parametrize("shift", [0.5, 3, 20])
def test_rigid_motion_is_measured(kind: str, shift: float) -> None:
    case = case_of(kind)
    motion, params = off_target(case, shift)
    found = place(render(motion.apply(params)), case.scene, case.drag)
    assert not found.lost
    assert found.distance == pytest.approx(shift, abs=0.2)
    assert found.remaining == pytest.approx(found.distance / math.dist(*motion.pairs[0]))


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("shift", [0, 0.5, 3])
def test_shape_changes_are_measured(kind: str, shift: float) -> None:
    case = case_of(kind)
    found = place(render(scene_off_target(case, shift)), case.scene, case.drag)
    assert not found.lost
    assert found.distance == pytest.approx(shift, abs=0.15)


@pytest.mark.parametrize("kind", ["object", "gaze", "light"])
def test_remaining_is_one_without_an_edit_and_zero_in_the_true_result(kind: str) -> None:
    case = case_of(kind)
    assert place(case.before, case.scene, case.drag).remaining == pytest.approx(1, abs=0.03)
    assert place(case.truth, case.scene, case.drag).remaining == pytest.approx(0, abs=0.03)


def test_stretched_and_moved_object() -> None:
    case = case_of("stretch")
    motion, (along, _, _) = off_target(case, 2)
    params = (along, 3.0, -2.0)
    fitted = fit(render(motion.apply(params)), motion, compared_region(case.drag))
    assert math.dist(motion.points(fitted)[0], motion.points(params)[0]) < 0.3


def test_blurred_edit() -> None:
    case = case_of("object")
    image = render(scene_off_target(case, 3)).filter(ImageFilter.GaussianBlur(2))
    found = place(image, case.scene, case.drag)
    assert not found.lost and found.distance == pytest.approx(3, abs=0.5)


@pytest.mark.parametrize("kind", ["object", "peak", "smile"])
@pytest.mark.parametrize("grain", [0, 5])
def test_noise_is_lost(kind: str, grain: float) -> None:
    case = case_of(kind)
    image = Image.composite(noise(grain), case.before, case.drag.mask)
    assert place(image, case.scene, case.drag).lost


@pytest.mark.parametrize("kind", ["object", "light", "gaze"])
def test_removed_part_is_lost(kind: str) -> None:
    case = case_of(kind)
    removed = render(Motion.of(case.drag, case.scene).removed())
    assert place(removed, case.scene, case.drag).lost


def test_descend_follows_a_diagonal_valley_along_coupled_axes() -> None:
    def cost(at: tuple[float, ...]) -> float:
        return abs(at[0] - at[1]) + 0.1 * abs(at[0] - 3)

    assert descend(cost, (0.0, 0.0), 1.0, 0.5, [(0, 1)]) == ((3.0, 3.0), 0.0)
    assert descend(cost, (0.0, 0.0), 1.0, 0.5)[0] == (0.0, 0.0)
