"""Line charts as images."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from minidrag.app.draw import INK, OVERSAMPLING
from minidrag.images import WHITE
from minidrag.points import Pixel

COLORS = ((205, 55, 45), (45, 110, 220), (25, 145, 105), (190, 140, 20), (120, 80, 180))
PALE = (226, 224, 218)
GRAY = (110, 112, 118)
LETTERS = 13  # height of letters, in pixels at scale 1, as are the margins
LEFT = 58
RIGHT = 16
TOP = 30
BOTTOM = 44


class Curve(NamedTuple):
    """A line of a chart."""

    label: str
    points: Sequence[tuple[float, float]]


class Axes(NamedTuple):
    """Ranges of the data, y from zero, on a canvas of width x height pixels."""

    low: float  # least x
    high: float  # largest x
    top: float  # largest y
    width: float
    height: float
    unit: float  # pixels per pixel at scale 1

    def place(self, x: float, y: float) -> Pixel:
        """Pixel of a point of the data."""
        across = (x - self.low) / max(self.high - self.low, 1e-9)
        left = self.unit * LEFT
        right = self.width - self.unit * RIGHT
        floor = self.height - self.unit * BOTTOM
        return Pixel(left + across * (right - left), floor - y / self.top * (floor - self.unit * TOP))


def chart(
    curves: Sequence[Curve],
    x_label: str,
    y_label: str,
    size: tuple[int, int] = (430, 230),
    scale: float = 1,
    dots: bool = False,
) -> Image.Image:
    """A chart from zero up, with a legend above.

    size: width and height in pixels. scale: of letters, lines, and margins. dots: points without lines, and
    the line y = x.
    """
    points = [point for curve in curves for point in curve.points]
    low = min(x for x, _ in points)
    axes = Axes(
        low=min(low, 0.0) if dots else low,
        high=max(x for x, _ in points),
        top=1.06 * max(max(y for _, y in points), 1e-9),
        width=size[0] * OVERSAMPLING,
        height=size[1] * OVERSAMPLING,
        unit=scale * OVERSAMPLING,
    )
    canvas = Image.new("RGB", (size[0] * OVERSAMPLING, size[1] * OVERSAMPLING), WHITE)
    draw = ImageDraw.Draw(canvas)
    draw_axes(draw, axes, x_label)
    if dots:
        end = min(axes.high, axes.top)
        draw.line([axes.place(0, 0), axes.place(end, end)], GRAY, round(axes.unit))
    for curve, color in zip(curves, COLORS, strict=False):
        draw_curve(draw, axes, curve, color, dots)
    write_legend(draw, axes, y_label, [curve.label for curve in curves])
    return canvas.resize(size, Image.Resampling.BOX)


def draw_axes(draw: ImageDraw.ImageDraw, axes: Axes, x_label: str) -> None:
    """Draw the grid with its numbers and the name of the horizontal axis."""
    font = ImageFont.load_default(LETTERS * axes.unit)
    left, floor = axes.place(axes.low, 0)
    for y in ticks(0, axes.top, 4):
        start = axes.place(axes.low, y)
        draw.line([start, axes.place(axes.high, y)], PALE, round(axes.unit))
        draw.text((start.x - 6 * axes.unit, start.y), f"{y:g}", INK, font, anchor="rm")
    for x in ticks(axes.low, axes.high, 7):
        draw.text((axes.place(x, 0).x, floor + 12 * axes.unit), f"{x:g}", INK, font, anchor="mm")
    middle = (left + axes.place(axes.high, 0).x) / 2
    draw.text((middle, floor + 30 * axes.unit), x_label, INK, font, anchor="mm")


def draw_curve(
    draw: ImageDraw.ImageDraw, axes: Axes, curve: Curve, color: tuple[int, int, int], dots: bool
) -> None:
    """Draw a line, and its points if they are few or alone."""
    places = [axes.place(*point) for point in curve.points]
    radius = (4 if dots else 3) * axes.unit
    if not dots:
        draw.line(places, color, round(2 * axes.unit), joint="curve")
    for x, y in places if dots or len(places) < 40 else []:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), color)


def write_legend(draw: ImageDraw.ImageDraw, axes: Axes, y_label: str, labels: Sequence[str]) -> None:
    """Write the name of the vertical axis, then each curve's color and label."""
    font = ImageFont.load_default(LETTERS * axes.unit)
    unit = axes.unit
    draw.text((4 * unit, 11 * unit), y_label, INK, font, anchor="lm")
    left = max(LEFT * unit, 22 * unit + font.getlength(y_label))
    for label, color in zip(labels, COLORS, strict=False):
        draw.rectangle((left, 9 * unit, left + 14 * unit, 12 * unit), color)
        draw.text((left + 19 * unit, 11 * unit), label, INK, font, anchor="lm")
        left += 33 * unit + font.getlength(label)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two bounds, about `count` of them."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [step * number for number in numbers]
