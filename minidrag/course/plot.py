"""Figures of the lessons as images: rows of pictures with labels, and line charts."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from minidrag.app.draw import INK
from minidrag.course.svg import Curve, ticks
from minidrag.images import WHITE
from minidrag.points import Pixel

GAP, LABEL, SIDE = 10, 19, 136  # pixels: between pictures, height of a label, shorter side of a picture
OVER = 3  # Pillow draws without antialiasing
COLORS = ((205, 55, 45), (45, 110, 220), (25, 145, 105), (190, 140, 20), (120, 80, 180))
PALE, SOFT = (226, 224, 218), (110, 112, 118)
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 30, 44  # margins of a chart


class Panel(NamedTuple):
    """A picture and what stands under it."""

    image: Image.Image
    label: str
    cells: bool = False  # show its pixels as squares


def panel(one: Panel, side: int) -> Image.Image:
    """One picture at a shorter side, with its label."""
    scale = side / min(one.image.size)
    size = round(one.image.width * scale), round(one.image.height * scale)
    shown = one.image.resize(size, Image.Resampling.NEAREST if one.cells else Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (size[0], size[1] + LABEL), WHITE)
    canvas.paste(shown, (0, 0))
    write(ImageDraw.Draw(canvas), one.label, (size[0] / 2, size[1] + LABEL / 2), size[0])
    return canvas


def write(
    draw: ImageDraw.ImageDraw, text: str, at: tuple[float, float], room: float, anchor: str = "mm"
) -> None:
    """Write a line, smaller if it does not fit the room."""
    size = 13.0
    while size > 7 and ImageFont.load_default(size).getlength(text) > room:
        size -= 0.5  # widths are rounded to whole pixels, so they do not shrink evenly
    draw.text(at, text, INK, ImageFont.load_default(size), anchor=anchor)


def row(panels: Sequence[Panel], side: int = SIDE) -> Image.Image:
    return beside([panel(one, side) for one in panels])


def beside(images: Sequence[Image.Image]) -> Image.Image:
    """Images in a row on white, aligned at the top."""
    width = sum(image.width for image in images) + GAP * (len(images) - 1)
    canvas = Image.new("RGB", (width, max(image.height for image in images)), WHITE)
    left = 0
    for image in images:
        canvas.paste(image, (left, 0))
        left += image.width + GAP
    return canvas


def stack(rows: Sequence[Image.Image]) -> Image.Image:
    """Rows under each other on white, with a margin."""
    width = max(image.width for image in rows) + 2 * GAP
    height = sum(image.height for image in rows) + GAP * (len(rows) + 1)
    canvas, top = Image.new("RGB", (width, height), WHITE), GAP
    for image in rows:
        canvas.paste(image, ((width - image.width) // 2, top))
        top += image.height + GAP
    return canvas


def chart(
    curves: Sequence[Curve],
    x_label: str,
    y_label: str,
    size: tuple[int, int] = (430, 230),
    dots: bool = False,
) -> Image.Image:
    """A chart from zero up, with a legend above. dots: no curves, but the line y = x."""
    points = [point for curve in curves for point in curve.points]
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    top = 1.06 * max(max(y for _, y in points), 1e-9)
    low = min(low, 0.0) if dots else low

    def place(x: float, y: float) -> Pixel:
        across, up = (x - low) / max(high - low, 1e-9), y / top
        right, floor = size[0] - RIGHT, size[1] - BOTTOM
        return Pixel(LEFT + across * (right - LEFT), floor - up * (floor - TOP))

    canvas = Image.new("RGB", (size[0] * OVER, size[1] * OVER), WHITE)
    draw = ImageDraw.Draw(canvas)
    for y in ticks(0, top, 4):
        draw.line(large([place(low, y), place(high, y)]), PALE, OVER)
    if dots:
        draw.line(large([place(0, 0), place(min(high, top), min(high, top))]), SOFT, OVER)
    for curve, color in zip(curves, COLORS, strict=False):
        places = large([place(*point) for point in curve.points])
        if not dots:
            draw.line(places, color, 2 * OVER, joint="curve")
        for x, y in places if dots or len(places) < 40 else []:
            radius = (4 if dots else 3) * OVER
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), color)
    canvas = canvas.resize(size, Image.Resampling.BOX)
    annotate(ImageDraw.Draw(canvas), place, curves, (low, high, top), (x_label, y_label))
    return canvas


def large(points: Sequence[Pixel]) -> list[tuple[float, float]]:
    return [(OVER * x, OVER * y) for x, y in points]


def annotate(
    draw: ImageDraw.ImageDraw,
    place: Callable[[float, float], Pixel],
    curves: Sequence[Curve],
    ends: tuple[float, float, float],
    names: tuple[str, str],
) -> None:
    """Numbers and names of the axes, and the legend. ends: least and largest x, largest y."""
    low, high, top = ends
    floor = place(low, 0).y
    for y in ticks(0, top, 4):
        write(draw, f"{y:g}", (LEFT - 6, place(low, y).y), LEFT, "rm")
    for x in ticks(low, high, 7):
        write(draw, f"{x:g}", (place(x, 0).x, floor + 12), 60)
    write(draw, names[0], ((LEFT + place(high, 0).x) / 2, floor + 30), 400)
    left = LEFT
    write(draw, names[1], (4, 11), 200, "lm")
    left = max(left, 4 + ImageFont.load_default(13.0).getlength(names[1]) + 18)
    for curve, color in zip(curves, COLORS, strict=False):
        draw.rectangle((left, 9, left + 14, 12), color)
        write(draw, curve.label, (left + 19, 11), 300, "lm")
        left += 19 + ImageFont.load_default(13.0).getlength(curve.label) + 14
