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
    """Ranges of the data, y from zero, and the size of the chart in pixels."""

    low: float  # least x
    high: float  # largest x
    top: float  # largest y
    width: float
    height: float
    scale: float

    def place(self, x: float, y: float) -> Pixel:
        """Pixel of a point of the data."""
        across = (x - self.low) / max(self.high - self.low, 1e-9)
        left = self.scale * LEFT
        floor = self.height - self.scale * BOTTOM
        right = self.width - self.scale * RIGHT
        return Pixel(left + across * (right - left), floor - y / self.top * (floor - self.scale * TOP))

    def enlarge(self, factor: int) -> "Axes":
        return self._replace(
            width=factor * self.width, height=factor * self.height, scale=factor * self.scale
        )


def chart(
    curves: Sequence[Curve],
    x_label: str,
    y_label: str,
    size: tuple[int, int] = (430, 230),
    scale: float = 1,
    dots: bool = False,
    rules: Sequence[float] = (),
) -> Image.Image:
    """A chart from zero up, with a legend above.

    size: width and height in pixels. scale: of letters, lines, and margins. dots: points without lines, and
    the line y = x. rules: x at which a thin vertical line stands.
    """
    points = [point for curve in curves for point in curve.points]
    low = min(x for x, _ in points)
    axes = Axes(
        low=min(low, 0.0) if dots else low,
        high=max(x for x, _ in points),
        top=1.06 * max(max(y for _, y in points), 1e-9),
        width=size[0],
        height=size[1],
        scale=scale,
    )
    large = axes.enlarge(OVERSAMPLING)
    canvas = Image.new("RGB", (size[0] * OVERSAMPLING, size[1] * OVERSAMPLING), WHITE)
    draw = ImageDraw.Draw(canvas)
    draw_grid(draw, large, rules)
    if dots:
        end = min(axes.high, axes.top)
        draw.line([large.place(0, 0), large.place(end, end)], GRAY, round(large.scale))
    for curve, color in zip(curves, COLORS, strict=False):
        draw_curve(draw, large, curve, color, dots)
    canvas = canvas.resize(size, Image.Resampling.BOX)
    annotate(ImageDraw.Draw(canvas), axes, x_label)
    write_legend(ImageDraw.Draw(canvas), axes, y_label, [curve.label for curve in curves])
    return canvas


def draw_grid(draw: ImageDraw.ImageDraw, axes: Axes, rules: Sequence[float]) -> None:
    for y in ticks(0, axes.top, 4):
        draw.line([axes.place(axes.low, y), axes.place(axes.high, y)], PALE, round(axes.scale))
    for x in rules:
        draw.line([axes.place(x, 0), axes.place(x, axes.top)], PALE, round(axes.scale))


def draw_curve(
    draw: ImageDraw.ImageDraw, axes: Axes, curve: Curve, color: tuple[int, int, int], dots: bool
) -> None:
    """Draw a line, and its points if they are few or alone."""
    places = [axes.place(*point) for point in curve.points]
    if not dots:
        draw.line(places, color, round(2 * axes.scale), joint="curve")
    for x, y in places if dots or len(places) < 40 else []:
        radius = (4 if dots else 3) * axes.scale
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), color)


def annotate(draw: ImageDraw.ImageDraw, axes: Axes, x_label: str) -> None:
    """Write the numbers of both axes and the name of the horizontal one."""
    font = ImageFont.load_default(LETTERS * axes.scale)
    left, floor = axes.place(axes.low, 0)
    for y in ticks(0, axes.top, 4):
        at = left - 6 * axes.scale, axes.place(axes.low, y).y
        draw.text(at, f"{y:g}", INK, font, anchor="rm")
    for x in ticks(axes.low, axes.high, 7):
        draw.text((axes.place(x, 0).x, floor + 12 * axes.scale), f"{x:g}", INK, font, anchor="mm")
    middle = (left + axes.place(axes.high, 0).x) / 2
    draw.text((middle, floor + 30 * axes.scale), x_label, INK, font, anchor="mm")


def write_legend(draw: ImageDraw.ImageDraw, axes: Axes, y_label: str, labels: Sequence[str]) -> None:
    """Write the name of the vertical axis, then each curve's color and label."""
    font = ImageFont.load_default(LETTERS * axes.scale)
    unit = axes.scale
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
