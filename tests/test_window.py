"""The part of an image that is edited: its choice, and its way back."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from minidrag.config import EditConfig
from minidrag.images import working_size
from minidrag.points import Pixel
from minidrag.window import LARGEST, Window, choose_window

CONFIG = EditConfig(window=True)
Instruction = tuple[tuple[int, int], list[Pixel], list[Pixel], Tensor | None]


def box(size: tuple[int, int], left: int, top: int, right: int, bottom: int) -> Tensor:
    mask = torch.zeros(size[1], size[0], dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def random_instruction(seed: int) -> Instruction:
    """An image up to 8:1, one to three drags, and a rectangle of mask around each handle, or none."""
    rng = random.Random(seed)
    shorter = rng.randint(20, 1500)
    size = shorter, round(shorter * rng.choice([1, 1, 1.33, 1.5, 2, 8]))
    width, height = size if rng.random() < 0.5 else size[::-1]

    def point() -> Pixel:
        return Pixel(rng.uniform(-0.5, width - 0.5), rng.uniform(-0.5, height - 0.5))

    handles = [point() for _ in range(rng.randint(1, 3))]
    reach = rng.choice([0.02, 0.1, 1.0])
    targets = [
        Pixel(min(max(x + rng.uniform(-reach, reach) * width, -0.5), width - 0.5), point().y)
        for x, _ in handles
    ]
    if rng.random() < 0.25:
        return (width, height), handles, targets, None
    mask = torch.zeros(height, width, dtype=torch.bool)
    for x, y in handles:
        extent = rng.choice([2, 0.05 * width, 0.3 * width])
        left, top = max(0, round(x - extent)), max(0, round(y - extent))
        mask[top : round(y + extent) + 1, left : round(x + extent) + 1] = True
    return (width, height), handles, targets, mask


@pytest.mark.parametrize("seed", range(200))
def test_a_window_holds_mask_and_points_at_one_scale(seed: int) -> None:
    size, handles, targets, mask = random_instruction(seed)
    working = (128, 512)[seed % 2]
    window = choose_window(size, handles, targets, mask, working, CONFIG)
    left, top, width, height = window
    assert 0 <= left <= size[0] - width and 0 <= top <= size[1] - height
    for x, y in window.enter([*handles, *targets]):
        assert -0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5
    if mask is not None:
        assert window.crop_mask(mask).sum() == mask.sum() and window.crop_mask(mask).shape == (height, width)
    if window.size == size:
        return
    assert width * height <= LARGEST * math.prod(size)
    assert min(width, height) >= min(working / 2 if mask is not None else working, *size)
    scales = [
        new / old for new, old in zip(working_size(width, height, working, 8), (width, height), strict=True)
    ]
    # A side of the window that is no eighth of the other is half a pixel off, at most.
    assert math.isclose(*scales, rel_tol=0.5 / max(width, height) + 1e-9)
    assert max(scales) <= 2 or min(width, height) == min(size)


@pytest.mark.parametrize(
    ("instruction", "window"),
    [
        # 200 + 0.75 of 200, brought to 128 times 2 to the 12/8; its corner is at 10 and 7 sixteenths of it
        (((1000, 800), (300, 300, 500, 380), (310, 310), (390, 370)), (227, 159, 363, 363)),
        # least surroundings, an eighth of 1000, brought to 128 times 2 to the 1/8; in a corner
        (((1000, 800), (990, 0, 1000, 10), (995, 5), (998, 3)), (860, 0, 140, 140)),
        # enlarged twice
        (((300, 300), (0, 290, 10, 300), (5, 295), (7, 297)), (0, 236, 64, 64)),
        # the target far away
        (((2000, 2000), (100, 100, 200, 200), (150, 150), (149.5, 899.5)), (0, 0, 1449, 1449)),
        # most of the image
        (((1000, 800), (100, 100, 600, 600), (150, 150), (550, 150)), (0, 0, 1000, 800)),
        # a panorama of 8:1, of which the window is as high, and longer by eighths of it
        (((4000, 500), (1000, 200, 1301, 300), (1100, 250), (1200, 250)), (711, 0, 875, 500)),
        # smaller than the working size
        (((60, 50), (20, 20, 30, 30), (25, 25), (27, 27)), (0, 0, 60, 50)),
    ],
)
def test_worked_windows(
    instruction: tuple[tuple[int, int], tuple[int, int, int, int], tuple[float, float], tuple[float, float]],
    window: tuple[int, int, int, int],
) -> None:
    size, edges, handle, target = instruction
    points = [Pixel(*handle)], [Pixel(*target)]
    assert choose_window(size, *points, box(size, *edges), 128, CONFIG) == window


def test_several_distant_objects_share_a_window() -> None:
    mask = box((3000, 2000), 200, 300, 260, 360) | box((3000, 2000), 700, 600, 800, 700)
    handles, targets = [Pixel(230, 330), Pixel(750, 650)], [Pixel(240, 330), Pixel(780, 650)]
    assert choose_window((3000, 2000), handles, targets, mask, 512, CONFIG) == (0, 0, 1117, 1117)


def test_a_small_change_of_the_points_keeps_the_window() -> None:
    unchanged = []
    for seed in range(400):
        size, handles, targets, mask = random_instruction(seed)
        window = choose_window(size, handles, targets, mask, 512, CONFIG)
        if window.size != size:
            nearer = [
                Pixel(to.x + (x - to.x) / 50, to.y) for (x, _), to in zip(handles, targets, strict=True)
            ]
            unchanged.append(choose_window(size, handles, nearer, mask, 512, CONFIG) == window)
    assert len(unchanged) > 30 and sum(unchanged) > 0.9 * len(unchanged)


def test_without_a_mask_the_window_is_not_enlarged() -> None:
    handles, targets = [Pixel(1000, 1000)], [Pixel(1010, 1000)]
    window = choose_window((2400, 2000), handles, targets, None, 512, CONFIG)
    assert window == (736, 736, 512, 512)
    assert choose_window((512, 512), [Pixel(9, 9)], [Pixel(20, 9)], None, 512, CONFIG) == (0, 0, 512, 512)


def test_the_paper_edits_the_whole_image() -> None:
    for config in (EditConfig.paper(), EditConfig.official()):
        mask = box((3000, 2000), 200, 300, 260, 360)
        assert choose_window((3000, 2000), [Pixel(230, 330)], [Pixel(240, 330)], mask, 512, config) == (
            0,
            0,
            3000,
            2000,
        )


def test_points_enter_a_window_and_leave_it() -> None:
    window, points = Window(7, 11, 40, 30), [Pixel(7.25, 40.5), Pixel(46.5, 11)]
    assert window.enter(points) == [Pixel(0.25, 29.5), Pixel(39.5, 0)]
    assert window.leave(window.enter(points)) == points


def checkerboard(size: tuple[int, int]) -> Image.Image:
    row, column = np.indices(size[::-1])
    board = np.stack([255 * ((row + column) % 2), row % 256, column % 256], axis=-1)
    return Image.fromarray(board.astype(np.uint8))


@pytest.mark.parametrize("corner", [(0, 0), (1, 0), (7, 13), (60, 47)])
@pytest.mark.parametrize("masked", [True, False])
def test_a_paste_lands_on_the_very_pixel(corner: tuple[int, int], masked: bool) -> None:
    board = checkerboard((101, 81))
    window = Window(*corner, 41, 34)
    part = window.crop(board)
    assert part.size == (41, 34) and part.getpixel((3, 5)) == board.getpixel((corner[0] + 3, corner[1] + 5))
    assert window.insert(part, board).tobytes() == board.tobytes()
    mask = box(board.size, corner[0] + 5, corner[1] + 5, corner[0] + 30, corner[1] + 25) if masked else None
    assert window.paste(part, board, mask).tobytes() == board.tobytes()


def test_nothing_outside_mask_and_window_changes() -> None:
    board = checkerboard((101, 81))
    black = Image.new("RGB", (20, 20))
    window = Window(30, 20, 40, 40)
    mask = box(board.size, 35, 25, 60, 50)
    for region, pasted in (
        (mask, window.paste(black, board, mask)),
        (box(board.size, 30, 20, 70, 60), window.paste(black, board, None)),
    ):
        inside = region.numpy()
        assert (np.asarray(pasted)[~inside] == np.asarray(board)[~inside]).all()
        assert not np.asarray(pasted)[40, 45].any() and np.asarray(pasted)[inside].any()
    assert (
        np.asarray(board)[30:50, 30:70].sum()
        > np.asarray(window.paste(black, board, None))[30:50, 30:70].sum()
    )


def test_a_window_on_the_border_has_no_seam_there() -> None:
    white = Image.new("RGB", (100, 80), (255, 255, 255))
    pasted = np.asarray(Window(0, 0, 40, 80).paste(Image.new("RGB", (40, 80)), white, None))
    assert not pasted[:, :34].any() and (pasted[:, 40:] == 255).all() and pasted[40, 39].all()
