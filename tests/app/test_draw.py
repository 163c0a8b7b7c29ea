"""Drawings of drags and masks, images side by side, and animations."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.images import color_image, max_difference

from minidrag.app.draw import draw_drags, enlarge, grid, save_gif, side_by_side
from minidrag.points import Pixel


def pixels(*points: tuple[float, float]) -> list[Pixel]:
    return [Pixel(x, y) for x, y in points]


def test_drags_and_mask_are_drawn_in_place() -> None:
    image = Image.new("RGB", (128, 96), (100, 100, 100))
    mask = torch.zeros(96, 128)
    mask[:, 64:] = 1
    drawn = draw_drags(image, pixels((80, 20), (30, 70)), pixels((110, 60), (30, 70)), mask)
    assert drawn.size == (640, 480)
    assert np.asarray(image).min() == 100  # the image itself is not changed

    def at(x: float, y: float) -> tuple[int, ...]:
        color = drawn.getpixel((round((x + 0.5) * 5 - 0.5), round((y + 0.5) * 5 - 0.5)))
        assert isinstance(color, tuple)
        return color

    handle, target, arrow, still = at(80, 20), at(110, 60), at(95, 40), at(30, 70)
    assert handle[0] > 200 > handle[1] + handle[2] and target[2] > 200 > target[0] + target[1]
    assert arrow == (255, 255, 255) and still[0] > 200 > still[1] + still[2]
    assert at(100, 80) == (100, 100, 100) and max(at(10, 10)) < 60
    edge = np.asarray(drawn)[470, :, 0]
    assert (edge[:305] < 60).all() and (edge[335:] == 100).all()
    assert edge.max() > 200 and abs(edge.argmax() - 319.5) < 2, "the mask has a bright outline"


def test_marks_have_smooth_edges() -> None:
    drawn = np.asarray(draw_drags(Image.new("RGB", (512, 512)), pixels((100, 100)), pixels((100, 100))))
    drawn = drawn.astype(int)
    assert len(np.unique(drawn[90:111, 90:111].reshape(-1, 3), axis=0)) > 10
    assert np.abs(drawn - drawn.swapaxes(0, 1)).max() < 80, "a disc looks the same transposed"


def test_a_thin_mask_is_visible() -> None:
    mask = torch.zeros(512, 512)
    mask[:, 200] = 1
    drawn = np.asarray(draw_drags(Image.new("RGB", (512, 512), (100, 100, 100)), [], [], mask))
    assert drawn[256, 200, 0] > 100 > drawn[256, 220, 0] + 40


def test_drags_at_every_border_and_size() -> None:
    for size in ((64, 64), (64, 700), (1500, 1000)):
        right, bottom = size[0] - 1, size[1] - 1
        handles = pixels((0, 0), (right, 0), (0, bottom), (right, bottom), (5, 5))
        trails = [[], pixels((1, 1)), handles]
        drawn = draw_drags(Image.new("RGB", size), handles, handles[::-1], trails=trails)
        assert drawn.size[0] % size[0] == 0 and min(drawn.size) >= 256
        assert np.asarray(drawn)[0, 0, 0] > 200
    with pytest.raises(ValueError):
        draw_drags(Image.new("RGB", (64, 64)), pixels((1, 1)), [])


def test_large_images_are_neither_enlarged_nor_changed() -> None:
    image = color_image().resize((800, 600))
    assert enlarge(image).size == (800, 600)
    before = image.copy()
    assert np.array_equal(np.asarray(draw_drags(image, [], [])), np.asarray(before))
    drawn = draw_drags(image, pixels((9, 9)), pixels((500, 300)), torch.zeros(600, 800))
    assert max_difference(drawn, before) > 100
    assert max_difference(image, before) == 0


def test_side_by_side() -> None:
    small, large = Image.new("RGB", (64, 64), (255, 0, 0)), Image.new("RGB", (800, 800), (0, 0, 255))
    row = side_by_side([small, large, small], ["original", "a label that is much too long " * 5, ""])
    levels = np.asarray(row).astype(int)
    assert row.height > 800 and row.width > 2400
    top, gap = row.height - 820, 20
    assert row.size == (3 * 800 + 4 * gap, top + 800 + gap)
    for number, color in enumerate(([255, 0, 0], [0, 0, 255], [255, 0, 0])):
        left = gap + number * (800 + gap)
        assert (levels[top : top + 800, left : left + 800] == color).all()
        assert (levels[top:, left - gap : left] == 255).all()
    dark = np.less(levels[:top].max(axis=2), 128)
    ink = np.count_nonzero(dark, axis=0)
    assert ink[gap:820].any() and ink[840:1640].any() and not ink[-800:].any()
    label_height = np.count_nonzero(np.count_nonzero(dark[:, gap:820], axis=1))
    assert label_height > 20, "a label is large enough to be read"


def test_a_grid_has_images_of_one_height_in_centered_columns() -> None:
    colors = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    square, wide, low = (
        Image.new("RGB", size, color)
        for size, color in zip(((64, 64), (96, 64), (64, 32)), colors, strict=True)
    )
    levels = np.asarray(grid([square, wide, low], 2, height=64))
    assert levels.shape == (8 + 72 * 2, 8 + 136 + 104, 3), "columns are as wide as their widest image"
    for color, (top, left), width in zip(colors, ((8, 40), (8, 144), (80, 8)), (64, 96, 128), strict=True):
        rows, columns = np.nonzero((levels == color).all(axis=-1))
        assert (rows.min(), columns.min()) == (top, left)
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (64, width)
    labeled = np.asarray(grid([square, wide, low], 2, ["one", "two\nlines", ""], 64))
    assert labeled.shape == (8 + (56 + 64) * 2, 8 + 136 + 104, 3)
    ink = np.less(labeled.max(axis=2), 128)
    assert ink[:56, :144].any() and ink[:56, 144:].sum() > ink[:56, :144].sum() and not ink[120:].any()


def test_gif(tmp_path: Path) -> None:
    frames = [draw_drags(color_image(), pixels((10 + 5 * i, 30)), pixels((90, 60))) for i in range(6)]
    save_gif(frames, tmp_path / "process.gif", seconds=0.1, hold=2)
    with Image.open(tmp_path / "process.gif") as stored:
        assert getattr(stored, "n_frames", 1) == 6 and stored.info["loop"] == 0
        durations = []
        for i, frame in enumerate(frames):
            stored.seek(i)
            durations.append(stored.info["duration"])
            decoded = np.asarray(stored.convert("RGB")).astype(int)
            assert np.abs(decoded - np.asarray(frame).astype(int)).mean() < 8
        assert durations == [2000] + [100] * 4 + [2000]
    save_gif(frames[:1], tmp_path / "one.gif")
    first = (tmp_path / "process.gif").read_bytes()
    save_gif(frames, tmp_path / "process.gif", seconds=0.1, hold=2)
    assert (tmp_path / "process.gif").read_bytes() == first


def test_smooth_areas_have_no_bands_in_a_gif(tmp_path: Path) -> None:
    """Averaged over a few pixels, as by the eye, the colors of a sky are close to the original's."""
    sky = np.linspace((90, 80, 150), (230, 140, 130), 256)[:, None].repeat(256, axis=1)
    image = Image.fromarray(sky.round().astype(np.uint8))
    save_gif([image], tmp_path / "one.gif")

    def averaged(image: Image.Image) -> np.ndarray:
        return np.asarray(image.convert("RGB").reduce(8)).astype(float)

    with Image.open(tmp_path / "one.gif") as stored:
        dithered = np.abs(averaged(stored) - averaged(image)).mean()
    undithered = np.abs(averaged(image.quantize(256, Image.Quantize.FASTOCTREE)) - averaged(image)).mean()
    assert dithered < 0.6 * undithered
