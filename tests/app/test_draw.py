"""Drawings of drags, pictures side by side, animations."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minidrag.app.draw import draw_drags, enlarge, save_gif, side_by_side

WIDTH, HEIGHT = 100, 72


def colors() -> Image.Image:
    """A smooth picture without any symmetry."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    pixels = np.stack([2 * x + 20, 3 * y + 10, 200 - x - y // 2], axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def grey() -> Image.Image:
    return colors().convert("L")


def far(picture: Image.Image, other: Image.Image) -> int:
    """The largest difference of two RGB pictures of one size."""
    assert picture.mode == other.mode == "RGB" and picture.size == other.size
    return int(np.abs(np.asarray(picture).astype(int) - np.asarray(other).astype(int)).max())


def test_drags_are_drawn_where_they_are() -> None:
    picture = Image.new("RGB", (128, 96), (100, 100, 100))
    mask = torch.zeros(96, 128)
    mask[:, 64:] = 1
    drawn = draw_drags(picture, [(80, 20), (30, 70)], [(110, 60), (30, 70)], mask)
    assert drawn.size == (640, 480)
    assert np.asarray(picture).min() == 100  # the picture itself is left alone

    def at(x: float, y: float) -> tuple[int, int, int]:
        return drawn.getpixel((round((x + 0.5) * 5 - 0.5), round((y + 0.5) * 5 - 0.5)))  # type: ignore[return-value]

    red, blue, way, still = at(80, 20), at(110, 60), at(95, 40), at(30, 70)
    assert red[0] > 200 > red[1] + red[2] and blue[2] > 200 > blue[0] + blue[1]
    assert way == (255, 255, 255) and still[0] > 200 > still[1] + still[2]
    assert at(100, 80) == (100, 100, 100) and max(at(10, 10)) < 60
    edge = np.asarray(drawn)[470, :, 0]
    assert (edge[:305] < 60).all() and (edge[335:] == 100).all()
    assert edge.max() > 200 and abs(edge.argmax() - 319.5) < 2, "the mask's edge is a bright line"


def test_marks_have_smooth_edges() -> None:
    drawn = np.asarray(draw_drags(Image.new("RGB", (512, 512)), [(100, 100)], [(100, 100)])).astype(int)
    assert len(np.unique(drawn[90:111, 90:111].reshape(-1, 3), axis=0)) > 10
    assert np.abs(drawn - drawn.swapaxes(0, 1)).max() < 80, "a disc lies the same way in both directions"


def test_a_thin_mask_is_still_seen() -> None:
    mask = torch.zeros(512, 512)
    mask[:, 200] = 1
    drawn = np.asarray(draw_drags(Image.new("RGB", (512, 512), (100, 100, 100)), [], [], mask))
    assert drawn[256, 200, 0] > 100 > drawn[256, 220, 0] + 40


def test_drags_on_every_border_and_at_any_size() -> None:
    for size in ((64, 64), (64, 700), (1500, 1000)):
        right, bottom = size[0] - 1, size[1] - 1
        handles = [(0, 0), (right, 0), (0, bottom), (right, bottom), (5, 5)]
        drawn = draw_drags(Image.new("RGB", size), handles, handles[::-1], trails=[[], [(1, 1)], handles])
        assert drawn.size[0] % size[0] == 0 and min(drawn.size) >= 256
        assert np.asarray(drawn)[0, 0, 0] > 200
    with pytest.raises(ValueError):
        draw_drags(Image.new("RGB", (64, 64)), [(1, 1)], [])


def test_large_pictures_are_not_enlarged() -> None:
    picture = colors().resize((800, 600))
    same, factor = enlarge(picture)
    assert factor == 1 and same.size == (800, 600)
    before = picture.copy()
    assert np.array_equal(np.asarray(draw_drags(picture, [], [])), np.asarray(before))
    assert far(draw_drags(picture, [(9, 9)], [(500, 300)], torch.zeros(600, 800)), before) > 100
    assert far(picture, before) == 0


def test_side_by_side() -> None:
    small, large = Image.new("RGB", (64, 64), (255, 0, 0)), Image.new("RGB", (800, 800), (0, 0, 255))
    row = side_by_side([small, large, small], ["original", "a label that is much too long " * 5, ""])
    pixels = np.asarray(row).astype(int)
    assert row.height > 800 and row.width > 2400
    top, gap = row.height - 820, 20
    assert row.size == (3 * 800 + 4 * gap, top + 800 + gap)
    for number, color in enumerate(([255, 0, 0], [0, 0, 255], [255, 0, 0])):
        left = gap + number * (800 + gap)
        assert (pixels[top : top + 800, left : left + 800] == color).all()
        assert (pixels[top:, left - gap : left] == 255).all()
    words = (pixels[:top] < 128).all(axis=2).any(axis=0)
    assert words[gap:820].any() and words[840:1640].any() and not words[-800:].any()
    tall = (pixels[:top, gap:820] < 128).all(axis=2).any(axis=1).sum()
    assert tall > 20, "a label is large enough to be read"


def test_gif(tmp_path: Path) -> None:
    frames = [draw_drags(colors(), [(10 + 5 * i, 30)], [(90, 60)]) for i in range(6)]
    save_gif(frames, tmp_path / "process.gif", seconds=0.1, hold=2)
    with Image.open(tmp_path / "process.gif") as stored:
        assert stored.n_frames == 6 and stored.info["loop"] == 0  # type: ignore[attr-defined]
        durations = []
        for i, frame in enumerate(frames):
            stored.seek(i)
            durations.append(stored.info["duration"])
            apart = np.abs(np.asarray(stored.convert("RGB")).astype(int) - np.asarray(frame).astype(int))
            assert apart.mean() < 8
        assert durations == [2000] + [100] * 4 + [2000]
    save_gif(frames[:1], tmp_path / "one.gif")
    first = (tmp_path / "process.gif").read_bytes()
    save_gif(frames, tmp_path / "process.gif", seconds=0.1, hold=2)
    assert (tmp_path / "process.gif").read_bytes() == first


def test_smooth_areas_get_no_steps_in_a_gif(tmp_path: Path) -> None:
    """Averaged over a few pixels, as an eye does, the colours of a sky are nearly what they were."""
    sky = np.linspace((90, 80, 150), (230, 140, 130), 256)[:, None].repeat(256, axis=1)
    picture = Image.fromarray(sky.round().astype(np.uint8))
    save_gif([picture], tmp_path / "one.gif")

    def averaged(picture: Image.Image) -> np.ndarray:
        return np.asarray(picture.convert("RGB").reduce(8)).astype(float)

    with Image.open(tmp_path / "one.gif") as stored:
        apart = np.abs(averaged(stored) - averaged(picture)).mean()
    plain = np.abs(averaged(picture.quantize(256, Image.Quantize.FASTOCTREE)) - averaged(picture)).mean()
    assert apart < 0.6 * plain
