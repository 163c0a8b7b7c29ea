"""Drawings of drags and masks, pictures side by side, and animations.

Sizes are (width, height) and points (x, y) in pixels.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from minidrag.images import BLACK, WHITE, Point, resize, write_whole

RED, BLUE = (226, 32, 44), (36, 92, 240)
SMOOTH = 3  # times larger marks are drawn than they are shown
PATTERN = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]) - 7.5  # Bayer's, in levels


def enlarge(picture: Image.Image, least: int = 512) -> tuple[Image.Image, int]:
    """Makes a small picture a whole number of times larger, so that marks fit; returns that number too."""
    factor = max(1, round(least / min(picture.size)))
    return resize(picture, (picture.width * factor, picture.height * factor)), factor


def draw_drags(
    picture: Image.Image,
    handles: Sequence[Point],
    targets: Sequence[Point],
    mask: Tensor | None = None,
    trails: Sequence[Sequence[Point]] = (),
) -> Image.Image:
    """Draws red handles, blue targets, white arrows on a copy, enlarged if small; dims what may not change.

    All points are (x, y) in the picture. mask: (H, W), 1 where it may change. trails: ways of the handles.
    """
    canvas, factor = enlarge(picture)
    if mask is not None:
        canvas = dim(canvas, mask)
    # Pillow's marks have rough edges: they are drawn larger, on a layer of their own, and made smaller.
    layer = Image.new("RGBA", (SMOOTH * canvas.width, SMOOTH * canvas.height))
    draw, radius = ImageDraw.Draw(layer), SMOOTH * max(6, min(canvas.size) // 64)

    def place(points: Sequence[Point]) -> list[Point]:
        scale = factor * SMOOTH
        return [((x + 0.5) * scale - 0.5, (y + 0.5) * scale - 0.5) for x, y in points]

    for handle, target in zip(place(handles), place(targets), strict=True):
        draw_arrow(draw, handle, target, radius)
    for color, width in ((WHITE, radius), (RED, radius // 2)):
        for trail in (place(trail) for trail in trails if trail):
            draw.line(trail, color, width, joint="curve")
    for points, color in ((targets, BLUE), (handles, RED)):
        for x, y in place(points):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), color, WHITE, radius // 4)
    marks = layer.resize(canvas.size, Image.Resampling.BOX)
    canvas = canvas.copy()
    canvas.paste(marks, mask=marks)
    return canvas


def dim(picture: Image.Image, mask: Tensor) -> Image.Image:
    """A copy that is dark outside the mask, (H, W), whose edge is a soft white line."""
    free = Image.fromarray(((mask >= 0.5).cpu().numpy() * 255).astype(np.uint8))
    soft = max(1.0, picture.width / free.width / 2)
    free = free.resize(picture.size, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(soft))
    dark = Image.blend(picture, Image.new("RGB", picture.size, BLACK), 0.55)
    shown = Image.composite(picture, dark, free)
    shown.paste(WHITE, mask=free.point([255 - abs(2 * level - 255) for level in range(256)]))
    return shown


def draw_arrow(draw: ImageDraw.ImageDraw, start: Point, end: Point, radius: int) -> None:
    """Draws a white arrow with a dark edge up to the rim of the target's disc; none if the discs touch."""
    length = math.dist(start, end)
    if length <= 2 * radius:
        return
    across, down = (end[0] - start[0]) / length, (end[1] - start[1]) / length

    def at(ahead: float, aside: float) -> Point:
        return start[0] + ahead * across - aside * down, start[1] + ahead * down + aside * across

    tip, edge = length - radius, radius // 6
    neck = max(tip - 2 * radius, 0)
    head = [at(tip, 0), at(neck, radius), at(neck, -radius)]
    draw.line([start, at(neck, 0)], BLACK, radius // 2 + 2 * edge)
    draw.line([*head, *head[:2]], BLACK, 2 * edge, joint="curve")
    draw.polygon(head, WHITE)
    draw.line([start, at(neck + 1, 0)], WHITE, radius // 2)


def side_by_side(pictures: Sequence[Image.Image], labels: Sequence[str]) -> Image.Image:
    """Puts pictures of one shape in a row on white, all as high as the highest, each below its label."""
    height = max(enlarge(picture)[0].height for picture in pictures)
    widths = [round(picture.width * height / picture.height) for picture in pictures]
    gap = max(8, height // 40)
    top = 4 * gap
    row = Image.new("RGB", (sum(widths) + gap * (len(widths) + 1), top + height + gap), WHITE)
    draw, left = ImageDraw.Draw(row), gap
    for picture, width, label in zip(pictures, widths, labels, strict=True):
        font = ImageFont.load_default(2 * gap)
        fit = min(1.0, width / max(1.0, font.getlength(label)))
        font = ImageFont.load_default(2 * gap * fit)
        draw.text((left + width / 2, top / 2), label, (40, 40, 40), font, anchor="mm")
        row.paste(resize(picture, (width, height)), (left, top))
        left += width + gap
    return row


def save_gif(frames: Sequence[Image.Image], path: Path, seconds: float = 0.12, hold: float = 1.5) -> None:
    """Writes an endless animation, every frame shown for `seconds`, the first and the last for `hold`."""
    first, *rest = [with_palette(frame) for frame in frames]
    durations = [round(1000 * hold), *[round(1000 * seconds)] * len(rest)]
    durations[-1] = durations[0]

    def write(temporary: Path) -> None:
        first.save(temporary, "GIF", save_all=True, append_images=rest, duration=durations, loop=0)

    write_whole(path, write)


def with_palette(frame: Image.Image) -> Image.Image:
    """A picture in 256 colours, with a fine pattern laid over it first, so that smooth areas get no steps.

    Pillow's own ways to choose colours or to hide the steps take a hundred times longer; the pattern also
    stays where it is from frame to frame.
    """
    tiles = -(-frame.height // 4), -(-frame.width // 4), 1
    pattern = np.tile(PATTERN[..., None], tiles)[: frame.height, : frame.width]
    pixels = (np.asarray(frame) + pattern).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels).quantize(256, Image.Quantize.FASTOCTREE)
