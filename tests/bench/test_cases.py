"""Benchmark cases: how they are drawn, their baselines, and the measures of a result."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.dragbench import learned
from torch import Tensor

from minidrag.bench import cases
from minidrag.bench.cases import KINDS, Case, SceneCase, make_case, make_cases, measure, pasted
from minidrag.bench.placement import place
from minidrag.images import MAX_PSNR, psnr
from minidrag.points import Pixel
from minidrag.tiny.scenes import SIDE, render


@pytest.mark.parametrize("kind", KINDS)
def test_a_case_does_not_depend_on_other_cases(kind: str) -> None:
    case = make_case(kind, 1, 3)
    assert case.kind == cases.kind_of(case.drag) == kind
    (other,) = [case for case in make_cases(4, [kind, "light"], 3) if case.name == f"{kind}-001"][:1]
    assert (other.scene, other.drag.name, other.drag.targets) == (
        case.scene,
        case.drag.name,
        case.drag.targets,
    )
    assert make_case(kind, 1, 4).scene != case.scene
    assert all(type(point) is Pixel for point in (*case.handles, *case.targets))


def test_cases_cycle_through_the_kinds() -> None:
    names = [case.name for case in make_cases(5, ["light", "peak"], 0)]
    assert names == ["light-000", "peak-000", "light-001", "peak-001", "light-002"]


def test_cut_and_paste_puts_the_object_at_its_target_and_changes_nothing_else() -> None:
    case = make_case("object", 0, 0)
    result = pasted(case)
    found = place(result, case.scene, case.drag)
    assert not found.lost and found.distance < 1
    assert (np.asarray(result) == np.asarray(case.before))[~case.mask].all()


def test_a_hole_is_filled_from_its_border() -> None:
    ramp = np.repeat(np.arange(0, 200, 10, dtype=np.uint8)[None, :, None], 12, axis=0).repeat(3, axis=2)
    hole = np.zeros((12, 20), bool)
    hole[4:8, 6:13] = True
    damaged = np.where(hole[..., None], 255, ramp).astype(np.uint8)
    assert np.abs(cases.fill(damaged, hole).astype(int) - ramp).max() <= 1


def test_baselines() -> None:
    case = make_case("light", 0, 0)
    found = cases.baselines(case)
    assert set(found) == {"no edit", "cut and paste"}
    assert found["no edit"].tobytes() == render(case.scene).tobytes()


def test_measures_of_no_edit_by_hand() -> None:
    case = make_case("object", 1, 0)
    row = measure(case, case.before, case.before, learned)
    lengths = [math.dist(*pair) for pair in zip(case.drag.handles, case.drag.targets, strict=True)]
    before, truth = (np.asarray(image, float)[case.mask] for image in (case.before, case.truth))
    assert row["distance"] == pytest.approx(lengths[0], abs=0.2)
    assert row["remaining"] == pytest.approx(1, abs=0.02) and row["lost"] is False and row["arrived"] is False
    assert row["PSNR inside"] == pytest.approx(10 * math.log10(255**2 / ((before - truth) ** 2).mean()))
    assert row["PSNR outside"] == MAX_PSNR


def test_the_raw_image_is_measured_outside_the_mask() -> None:
    case = make_case("light", 1, 0)
    gray = Image.new("RGB", (SIDE, SIDE), (128, 128, 128))
    row = measure(case, case.truth, gray, learned)
    assert row["PSNR inside"] == MAX_PSNR
    assert row["PSNR outside"] == pytest.approx(psnr(gray, case.truth, ~case.mask))
    lost = measure(case, gray, gray, learned)
    assert lost["lost"] is True and lost["distance"] is None and lost["remaining"] is None
    assert lost["arrived"] is False and measure(case, case.truth, gray, learned)["arrived"] is True


def plain_case(size: tuple[int, int] = (80, 70)) -> Case:
    """A case without a true result."""
    mask = np.ones(size[::-1], bool)
    return Case("a/b", "a", Image.new("RGB", size), mask, "a cow", [Pixel(1, 1)], [Pixel(4, 5)])


def test_the_raw_image_is_measured_without_a_true_result() -> None:
    case, white = plain_case(), Image.new("RGB", (80, 70), (255, 255, 255))
    assert not isinstance(case, SceneCase)
    assert measure(case, case.before, white, learned) == {"MD": 255, "IF": 1}


def test_descriptions_and_lengths_of_drags() -> None:
    case = plain_case()
    assert case.drags == "1,1:4,5" and case.lengths == [5]
    assert make_case("object", 0, 0).drags == make_case("object", 0, 0).drag.name


def test_images_are_given_to_the_metric_at_their_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def image_features(model: object, image: Image.Image, prompt: str, size: int | None) -> Tensor:
        calls.append((image.size, prompt, size))
        return torch.ones(2, 3, 4)

    monkeypatch.setattr(cases, "image_features", image_features)
    no_model: Any = None
    case = plain_case()
    for own_size in (True, False):
        cases.learned_measures(no_model, None, own_size)(case, case.before.copy())
    assert calls == [((80, 70), "a cow", 70)] * 2 + [((80, 70), "a cow", None)] * 2
