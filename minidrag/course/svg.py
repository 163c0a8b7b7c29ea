"""Inline SVG: images with marks on them, and line charts, in the colors of the page.

Points of an image are pixels (x, y); whole numbers are pixel centers, as everywhere.
"""

import base64
import io
import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from minidrag.points import Pixel

SMALL = 160  # pixels: up to this shorter side an image is stored without loss
# Dark to bright; read off no published color map.
HEAT = np.array(
    [(20, 18, 52), (46, 58, 130), (38, 124, 150), (72, 184, 128), (188, 220, 80), (255, 246, 168)]
)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 250, 52, 14, 14, 40  # of a chart


class Curve(NamedTuple):
    """A line of a chart."""

    label: str
    points: Sequence[tuple[float, float]]


def size_of(values: Tensor) -> tuple[int, int]:
    """Width and height of a map (rows, columns)."""
    rows, columns = values.shape
    return columns, rows


def heat(values: Tensor, low: float | None = None, high: float | None = None) -> Image.Image:
    """Image of a map (rows, columns): dark is `low`, bright is `high`; None: the least and the largest."""
    array = values.detach().cpu().double().numpy()
    least = float(array.min() if low is None else low)
    most = float(array.max() if high is None else high)
    places = ((array - least) / max(most - least, 1e-12)).clip(0, 1) * (len(HEAT) - 1)
    channels = [np.interp(places, range(len(HEAT)), HEAT[:, channel]) for channel in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def data_uri(image: Image.Image) -> str:
    """The image itself as a link: PNG if small, else JPEG."""
    kind = "PNG" if min(image.size) <= SMALL else "JPEG"
    buffer = io.BytesIO()
    image.save(buffer, kind, optimize=True, **({"quality": 85} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture(
    image: Image.Image,
    label: str,
    marks: str = "",
    cells: bool = False,
    view: tuple[float, float, float, float] | None = None,
) -> str:
    """An image with marks and a label under it.

    cells: show its pixels as squares. view: left, top, width, and height of the part to show.
    """
    width, height = image.size
    left, top, *size = view or (0, 0, width, height)
    style = ' style="image-rendering:pixelated"' if cells else ""
    shown = f'<image href="{data_uri(image)}" width="{width}" height="{height}"{style}/>{marks}'
    return (
        f'<figure class="picture"><svg viewBox="{left:g} {top:g} {size[0]:g} {size[1]:g}" role="img" '
        f'aria-label="{escape(label)}">{shown}</svg><figcaption>{escape(label)}</figcaption></figure>'
    )


def row(*pictures: str) -> str:
    return f'<div class="row">{"".join(pictures)}</div>'


def dot(point: Pixel, size: tuple[int, int], kind: str) -> str:
    """A disc of a class, `handle` or `target`, with a white rim."""
    radius = max(min(size) / 45, 0.4)
    return f'<circle class="{kind}" cx="{point.x + 0.5:.2f}" cy="{point.y + 0.5:.2f}" r="{radius:.2f}"/>'


def line(points: Sequence[Pixel], size: tuple[int, int], kind: str) -> str:
    """A line of a class through points, with a rim of white."""
    path = " ".join(f"{x + 0.5:.2f},{y + 0.5:.2f}" for x, y in points)
    width = max(min(size) / 110, 0.2)
    rim = f'<polyline class="rim" points="{path}" stroke-width="{2 * width:.2f}"/>'
    return f'{rim}<polyline class="{kind}" points="{path}" stroke-width="{width:.2f}"/>'


def box(corner: Pixel, other: Pixel, size: tuple[int, int], kind: str) -> str:
    """A frame of a class around the pixels from a corner to the opposite one."""
    width = max(min(size) / 130, 0.2)
    return (
        f'<rect class="{kind}" x="{corner.x:.2f}" y="{corner.y:.2f}" width="{other.x - corner.x + 1:.2f}" '
        f'height="{other.y - corner.y + 1:.2f}" stroke-width="{width:.2f}"/>'
    )


def drags(handles: Sequence[Pixel], targets: Sequence[Pixel], size: tuple[int, int]) -> str:
    """Handles, targets, and lines between them."""
    parts = [line(pair, size, "pull") for pair in zip(handles, targets, strict=True)]
    parts += [dot(target, size, "target") for target in targets]
    return "".join(parts + [dot(handle, size, "handle") for handle in handles])


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two bounds, about `count` of them."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [step * number for number in range(first, last + 1)]


def chart(curves: Sequence[Curve], x_label: str, y_label: str, shaded: Sequence[float] = ()) -> str:
    """A line chart from zero up, with a legend. shaded: x at which a thin vertical line stands."""
    points = [point for curve in curves for point in curve.points if math.isfinite(point[1])]
    if not points:
        return '<p class="note">nothing to plot</p>'
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_high = max(max(y for _, y in points), 1e-9) * 1.06

    def place(x: float, y: float) -> Pixel:
        across, up = (x - x_low) / max(x_high - x_low, 1e-9), y / y_high
        return Pixel(LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM))

    parts = axes(place, (x_low, x_high), y_high, x_label, y_label)
    for x in shaded:
        left, _ = place(x, 0)
        parts.append(
            f'<line class="grid" x1="{left:.1f}" x2="{left:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        )
    for number, curve in enumerate(curves):
        places = [place(*point) for point in curve.points if math.isfinite(point[1])]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="curve c{number}" points="{path}"/>')
        parts += [f'<circle class="c{number}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in places]
    legend = " ".join(
        f'<span class="key c{i}">{escape(curve.label)}</span>' for i, curve in enumerate(curves)
    )
    body = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'
    return f'<figure class="plot">{body}<figcaption>{legend}</figcaption></figure>'


def axes(
    place: Callable[[float, float], Pixel], xs: tuple[float, float], y_high: float, x_label: str, y_label: str
) -> list[str]:
    """Grid lines, numbers, and names of the axes."""
    parts, right, floor = [], WIDTH - RIGHT, HEIGHT - BOTTOM
    for y in ticks(0, y_high, 4):
        _, top = place(xs[0], y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{top:.1f}" y2="{top:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{top + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in ticks(*xs, 8):
        left, _ = place(x, 0)
        parts.append(f'<text x="{left:.1f}" y="{floor + 16}" text-anchor="middle">{x:g}</text>')
    middle = (TOP + floor) / 2
    parts.append(
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>'
    )
    parts.append(
        f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">'
        f"{escape(y_label)}</text>"
    )
    return parts
