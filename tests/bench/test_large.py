"""Scenes in a sheet and with texture: what moves in them, and what does not."""

import numpy as np
import pytest

from minidrag.bench.cases import SceneCase, make_case
from minidrag.bench.large import TEXTURED, in_sheet, textured
from minidrag.images import psnr, resize
from minidrag.tiny.renderer import SIDE


@pytest.fixture(scope="module")
def case() -> SceneCase:
    return make_case("object", 2, 2611)


def test_a_sheet_has_the_scene_in_its_middle_and_its_truth_there(case: SceneCase) -> None:
    sheet = in_sheet(case)
    before, truth = (np.asarray(image) for image in (sheet.before, sheet.truth))
    middle = slice(SIDE, 2 * SIDE)
    assert before.shape == (3 * SIDE, 3 * SIDE, 3)
    assert (before[middle, middle] == np.asarray(case.before)).all()
    assert (truth[middle, middle] == np.asarray(case.truth)).all()
    changed = (before != truth).any(axis=-1)
    assert changed.any() and not changed[~sheet.mask].any()
    assert sheet.mask.sum() == case.mask.sum() and (sheet.mask[middle, middle] == case.mask).all()
    for points, moved in ((case.handles, sheet.handles), (case.targets, sheet.targets)):
        assert [(x + SIDE, y + SIDE) for x, y in points] == moved
    tiles = [before[row : row + SIDE, :SIDE].tobytes() for row in range(0, 3 * SIDE, SIDE)]
    assert len(set(tiles)) == 3
    assert in_sheet(case).before.tobytes() == sheet.before.tobytes()


def test_texture_moves_with_its_part_and_stays_on_the_ground(case: SceneCase) -> None:
    large = textured(case)
    scale = TEXTURED / SIDE
    assert large.before.size == large.truth.size == (TEXTURED, TEXTURED)
    for fine, plain in ((large.before, case.before), (large.truth, case.truth)):
        assert psnr(resize(fine, (SIDE, SIDE)), plain) > 27  # the coarsest grain is a pixel of these
    before, truth = (np.asarray(image).astype(int) for image in (large.before, large.truth))
    changed = np.abs(before - truth).max(axis=-1) > 0
    assert not changed[:, 900:].any()
    (x, y), (to_x, to_y) = large.handles[0], large.targets[0]
    assert (x + 0.5) / scale == pytest.approx(case.handles[0].x + 0.5)
    right, down = round(to_x - x), round(to_y - y)
    row, column = round(y), round(x)
    patch = before[row - 20 : row + 20, column - 20 : column + 20]
    differences = []
    for up, left in np.ndindex(3, 3):  # parts move by fractions of a pixel, their texture by whole ones
        top, start = row + down + up - 21, column + right + left - 21
        differences.append(np.median(np.abs(truth[top : top + 40, start : start + 40] - patch)))
    assert patch.std() > 5 and min(differences) <= 1 and max(differences) > 5
    assert large.mask.mean() == pytest.approx(case.mask.mean(), abs=0.01)
