"""Images with vector marks on them, and charts, for an HTML page.

Points of an image are pixels (x, y); whole numbers are pixel centers, as everywhere.
"""

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image
from torch import Tensor

from minidrag.course.chart import Curve, chart
from minidrag.points import Pixel

SMALL = 160  # pixels: up to this shorter side an image is stored without loss
SHARP = 2  # image pixels per pixel of the page in a chart
# Dark to bright; read off no published color map.
HEAT = np.array(
    [(20, 18, 52), (46, 58, 130), (38, 124, 150), (72, 184, 128), (188, 220, 80), (255, 246, 168)]
)


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
    """The image itself as a link: PNG if it is small or has a palette, else JPEG."""
    kind = "PNG" if image.mode == "P" or min(image.size) <= SMALL else "JPEG"
    buffer = io.BytesIO()
    image.save(buffer, kind, optimize=True, **({"quality": 85} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def figure(
    image: Image.Image,
    label: str,
    marks: str = "",
    cells: bool = False,
    view: tuple[float, float, float, float] | None = None,
) -> str:
    """An image with marks and a label under it.

    cells: show its pixels as squares. view: left, top, width, and height of the visible part.
    """
    width, height = image.size
    box = " ".join(f"{value:g}" for value in view or (0, 0, width, height))
    style = ' style="image-rendering:pixelated"' if cells else ""
    body = f'<image href="{data_uri(image)}" width="{width}" height="{height}"{style}/>{marks}'
    return (
        f'<figure class="image"><svg viewBox="{box}" role="img" aria-label="{escape(label)}">{body}</svg>'
        f"<figcaption>{escape(label)}</figcaption></figure>"
    )


def row(*figures: str) -> str:
    return f'<div class="row">{"".join(figures)}</div>'


def plot(curves: Sequence[Curve], x_label: str, y_label: str) -> str:
    """A chart as a figure."""
    image = chart(curves, x_label, y_label, (560 * SHARP, 250 * SHARP), SHARP)
    title = escape(f"{y_label} over {x_label}: {', '.join(curve.label for curve in curves)}")
    return f'<figure class="plot"><img src="{data_uri(image.quantize(64))}" alt="{title}"></figure>'


def dot(point: Pixel, size: tuple[int, int], kind: str) -> str:
    """A disc of a class, `handle` or `target`, with a white rim."""
    radius = max(min(size) / 45, 0.4)
    return f'<circle class="{kind}" cx="{point.x + 0.5:.2f}" cy="{point.y + 0.5:.2f}" r="{radius:.2f}"/>'


def line(points: Sequence[Pixel], size: tuple[int, int], kind: str) -> str:
    """A line of a class through points, with a white rim."""
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
