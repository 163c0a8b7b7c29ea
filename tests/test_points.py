"""Pixels to the feature grid and back, checks of drag instructions, and masks on the latent."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from minidrag.config import EditConfig
from minidrag.edit import prepare
from minidrag.images import resize, to_tensor
from minidrag.method.drag import Cell
from minidrag.model import Model, working_size
from minidrag.networks.unet import UNet
from minidrag.points import Pixel, check_instruction, mask_to_latent, snap, to_cells, to_pixels
from minidrag.weights.load import load_model

SIZE = (100, 72)  # (width, height)
HANDLES, TARGETS = [Pixel(10, 20)], [Pixel(50, 60)]


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("tiny", device="cpu")


# Points


@pytest.mark.parametrize(
    ("size", "grid"),
    [((512, 512), (256, 256)), ((500, 375), (252, 340)), ((64, 80), (300, 200)), ((4000, 3000), (256, 340))],
)
def test_points_go_to_the_grid_and_back(size: tuple[int, int], grid: tuple[int, int]) -> None:
    width, height = size
    pixels = [Pixel(0, 0), Pixel(width - 1, height - 1), Pixel(0, height - 1), Pixel(17, 33)]
    pixels.append(Pixel(12.25, 60.5))
    cells = to_cells(pixels, size, grid)
    for back, pixel in zip(to_pixels(cells, size, grid), pixels, strict=True):
        assert back == pytest.approx(pixel, rel=0, abs=1e-9)
    for row, column in cells[:4]:
        assert 0 <= round(row) < grid[0] and 0 <= round(column) < grid[1]


def test_worked_points() -> None:
    assert to_cells([Pixel(120, 200)], (512, 512), (256, 256)) == [Cell(row=99.75, column=59.75)]
    corners = [Pixel(0, 0), Pixel(511, 511)]
    assert to_cells(corners, (512, 512), (256, 256)) == [(-0.25, -0.25), (255.25, 255.25)]
    assert to_cells([Pixel(x=10, y=20)], (100, 50), (50, 100)) == [Cell(row=20, column=10)]
    assert to_pixels([Cell(row=0, column=1)], (512, 512), (256, 256)) == [Pixel(x=2.5, y=0.5)]
    assert to_cells([], (512, 512), (256, 256)) == to_pixels([], (512, 512), (256, 256)) == []


def test_each_kind_of_point_has_its_own_type() -> None:
    (cell,) = to_cells([Pixel(3, 4)], SIZE, (36, 50))
    (pixel,) = to_pixels([cell], SIZE, (36, 50))
    assert type(cell) is Cell and type(pixel) is Pixel and pixel == pytest.approx((3, 4))


def test_a_spot_stays_under_its_point_when_resized() -> None:
    """torch and Pillow resize a bright spot to the place that `to_cells` gives."""
    y, x = np.mgrid[:150, :200]
    spot = Pixel(131.0, 44.0)
    light = 255 * np.exp(-((x - spot.x) ** 2 + (y - spot.y) ** 2) / 50)
    image = Image.fromarray(light.astype(np.uint8)).convert("RGB")
    for grid in ((75, 100), (210, 320), (60, 50)):
        by_pillow = to_tensor(resize(image, (grid[1], grid[0])))[0, 0] + 1
        by_torch = interpolate(to_tensor(image) + 1, size=grid, mode="bilinear", antialias=True)[0, 0]
        [expected] = to_cells([spot], image.size, grid)
        for level in (by_pillow, by_torch):
            weight = level / level.sum()
            row = (weight.sum(1) * torch.arange(grid[0])).sum().item()
            column = (weight.sum(0) * torch.arange(grid[1])).sum().item()
            assert abs(row - expected.row) < 0.05 and abs(column - expected.column) < 0.05


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ((3.4, 7.6), (3, 8)),
        ((-0.5, -0.25), (0, 0)),
        ((9.5, 19.25), (9, 19)),
        ((30, -7), (9, 0)),
    ],
)
def test_snap(cell: tuple[float, float], expected: tuple[int, int]) -> None:
    snapped = snap(Cell(*cell), (10, 20))
    assert snapped == expected and type(snapped) is Cell and type(snapped.row) is float


# Masks


def test_half_covered_cells_are_in_the_mask() -> None:
    mask = torch.zeros(32, 48)
    mask[:, 20:] = 1  # the cell of columns 16 to 23 is half covered
    mask[0:8, 12:] = 1  # and so is that of columns 8 to 15 in the first row
    mask[8:16, 13:] = 1  # but not quite in the second
    expected = torch.tensor([[0, 1, 1, 1, 1, 1], *[[0, 0, 1, 1, 1, 1]] * 3]).float()
    found = mask_to_latent(mask, (4, 6))
    assert torch.equal(found, expected) and found.dtype == mask.dtype


@pytest.mark.parametrize("row", range(8))
def test_a_thin_line_stays_in_the_mask_at_every_offset(row: int) -> None:
    mask = torch.zeros(64, 64)
    mask[16 + row, 10:50] = 1
    found = mask_to_latent(mask, (8, 8))
    assert found[2, 2:6].eq(1).all() and found.sum() <= 6 and found[[0, 1, 3, 4, 5, 6, 7]].eq(0).all()


@pytest.mark.parametrize("shape", [(47, 62), (64, 85), (200, 300), (1, 1)])
def test_full_and_empty_masks_at_any_shape(shape: tuple[int, int]) -> None:
    full, empty = (mask_to_latent(make(375, 500), shape) for make in (torch.ones, torch.zeros))
    assert full.shape == empty.shape == shape
    assert full.eq(1).all() and empty.eq(0).all()


# Checks


def test_points_up_to_the_border_are_accepted() -> None:
    width, height = SIZE
    corners = [Pixel(x, y) for x in (-0.5, 0, width - 0.5) for y in (-0.5, 0, height - 0.5)]
    check_instruction(SIZE, corners, corners[::-1], torch.ones(height, width, dtype=torch.bool))
    check_instruction(SIZE, corners, corners[::-1], None)
    check_instruction((800, 100), HANDLES, TARGETS, None)


def hole() -> Tensor:
    """A mask without the pixel of the handle."""
    mask = torch.ones(72, 100, dtype=torch.bool)
    mask[20, 10] = False
    return mask


REFUSED: dict[str, tuple[Callable[[], None], str]] = {
    "wide strip": (
        lambda: check_instruction((801, 100), HANDLES, TARGETS, None),
        "the image is 801x100 pixels, longer than 8 to 1: crop it",
    ),
    "tall strip": (
        lambda: check_instruction((100, 801), HANDLES, TARGETS, None),
        "the image is 100x801 pixels, longer than 8 to 1: crop it",
    ),
    "no points": (
        lambda: check_instruction(SIZE, [], [], None),
        "got 0 handles and 0 targets: give one or more pairs",
    ),
    "half a pair": (
        lambda: check_instruction(SIZE, HANDLES, [*TARGETS, *TARGETS], None),
        "got 1 handles and 2 targets: give one or more pairs",
    ),
    "handle left": (
        lambda: check_instruction(SIZE, [Pixel(-0.51, 3)], TARGETS, None),
        "handle -0.51,3 is outside the image of 100x72 pixels",
    ),
    "handle below": (
        lambda: check_instruction(SIZE, [Pixel(3, 71.51)], TARGETS, None),
        "handle 3,71.51 is outside the image of 100x72 pixels",
    ),
    "second target right": (
        lambda: check_instruction(SIZE, HANDLES * 2, [*TARGETS, Pixel(99.6, 3)], None),
        "target 99.6,3 is outside the image of 100x72 pixels",
    ),
    "target not a number": (
        lambda: check_instruction(SIZE, HANDLES, [Pixel(float("nan"), 3)], None),
        "target nan,3 is outside the image of 100x72 pixels",
    ),
    "mask of another size": (
        lambda: check_instruction(SIZE, HANDLES, TARGETS, torch.ones(100, 72, dtype=torch.bool)),
        "the mask is 72x100 pixels, the image 100x72",
    ),
    "handle outside the mask": (
        lambda: check_instruction(SIZE, HANDLES, TARGETS, hole()),
        "handle 10,20 is outside the mask: mark what it drags as editable too",
    ),
}

INVERTED = "the mask seems to be inverted, as no handle is in its white part, which is most of it: "
INVERTED += "paint white what may change, not what stays"


def test_an_inverted_mask_is_named() -> None:
    mask = torch.ones(72, 100, dtype=torch.bool)
    mask[10:30, 5:30] = False
    with pytest.raises(ValueError, match=f"^{INVERTED}$"):
        check_instruction(SIZE, [Pixel(10, 20), Pixel(20, 20)], [Pixel(12, 20), Pixel(60, 20)], mask)
    check_instruction(SIZE, [Pixel(60, 60)], [Pixel(50, 60)], mask)
    with pytest.raises(ValueError, match="^handle 20,20 is outside the mask"):  # another is inside
        check_instruction(SIZE, [Pixel(60, 60), Pixel(20, 20)], [Pixel(50, 60), Pixel(20, 20)], mask)
    with pytest.raises(ValueError, match="^handle 60,60 is outside the mask"):
        check_instruction(SIZE, [Pixel(60, 60)], [Pixel(50, 60)], ~mask)


@pytest.mark.parametrize("case", REFUSED)
def test_bad_instructions_are_refused(case: str) -> None:
    check, message = REFUSED[case]
    with pytest.raises(ValueError) as error:
        check()
    assert str(error.value) == message


def test_a_target_outside_the_mask_is_accepted() -> None:
    check_instruction(SIZE, TARGETS, HANDLES, hole())


# Tasks


def test_preparing_a_drag(model: Model) -> None:
    """An image of 96x80 is worked on at 76x64: a latent of 16x19, a grid of 32x38."""
    mask = torch.zeros(80, 96, dtype=torch.bool)
    mask[:40, :48] = True
    config = EditConfig(size=64)
    assert working_size(model, (96, 80), config) == (76, 64)
    window, task = prepare(model, (96, 80), [Pixel(3.1, 9.2)], [Pixel(50, 60)], mask, config)
    assert window == (0, 0, 96, 80) and task.grid == (32, 38)
    assert task.handles == [Cell(3, 1)]  # of (3.38, 0.925)
    assert len(task.targets) == 1
    assert task.targets[0] == pytest.approx((60.5 * 0.4 - 0.5, 50.5 * 38 / 96 - 0.5))
    assert task.mask is not None and task.mask.shape == (16, 19) and task.mask.dtype == torch.float32
    assert task.mask[:8, :9].eq(1).all() and task.mask[8:].eq(0).all() and task.mask[:, 10:].eq(0).all()
    assert prepare(model, (96, 80), [Pixel(3, 9)], [Pixel(50, 60)], None, config)[1].mask is None


def test_preparing_a_drag_in_a_window(model: Model) -> None:
    """A mask of 32x32 in an image of 400x300 is edited in 83x83: the grid has 32 cells for them."""
    mask = torch.zeros(300, 400, dtype=torch.bool)
    mask[100:132, 200:232] = True
    config = EditConfig(size=64, window=True)
    window, task = prepare(model, (400, 300), [Pixel(216, 116)], [Pixel(220, 116)], mask, config)
    assert window == (176, 73, 83, 83) and task.grid == (32, 32)
    assert task.handles == [Cell(16, 15)]  # of (43.5 * 32 / 83 - 0.5, 40.5 * 32 / 83 - 0.5)
    assert task.targets[0] == pytest.approx((43.5 * 32 / 83 - 0.5, 44.5 * 32 / 83 - 0.5))
    assert task.mask is not None and task.mask.sum() == 36 and task.mask[5:11, 5:11].eq(1).all()


def test_working_size_is_the_models_own_by_default(model: Model) -> None:
    assert working_size(model, (500, 500), EditConfig()) == (128, 128)
    assert working_size(model, (500, 250), EditConfig(size=30)) == (60, 32)  # multiples of 4


def other_unet(model: Model, **values: Any) -> Model:
    """The model as if its UNet had another config."""

    class Other:
        config = replace(model.unet.config, **values)

    return replace(model, unet=cast(UNet, Other()), source="some/model")


def test_models_of_other_kinds_are_refused(model: Model) -> None:
    message = "some/model is not a Stable Diffusion 1.x model: use one or a fine-tune"
    others = [other_unet(model, in_channels=9), other_unet(model, use_linear_projection=True)]
    others.append(replace(model, prediction="v_prediction", source="some/model"))
    for other, reason in zip(others, ("", "", " that predicts the noise, not v_prediction"), strict=True):
        with pytest.raises(ValueError) as error:
            prepare(other, SIZE, HANDLES, TARGETS, None, EditConfig())
        assert str(error.value) == message + reason


def test_more_steps_than_the_schedule_has_are_refused(model: Model) -> None:
    prepare(model, SIZE, HANDLES, TARGETS, None, EditConfig(steps=999))
    for steps in (1000, 999_999):
        with pytest.raises(ValueError, match=f"^steps must be 1 to 999, got {steps}$"):
            prepare(model, SIZE, HANDLES, TARGETS, None, EditConfig(steps=steps))


def test_the_instruction_is_checked_before_the_model(model: Model) -> None:
    with pytest.raises(ValueError, match="got 0 handles and 0 targets"):
        prepare(other_unet(model, in_channels=9), SIZE, [], [], None, EditConfig())
