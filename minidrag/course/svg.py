"""Images with vector marks on them, and charts, for an HTML page.

Marks are in cells of a grid that covers the image; whole numbers are centers. Their style is in report.css.
"""

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image
from torch import Tensor

from minidrag.course.chart import Curve, chart
from minidrag.points import Cell

SMALL = 160  # pixels: up to this shorter side an image is stored without loss
SHARP = 2  # image pixels per pixel of the page in a chart
# Dark to bright; read off no published color map.
HEAT = np.array(
    [(20, 18, 52), (46, 58, 130), (38, 124, 150), (72, 184, 128), (188, 220, 80), (255, 246, 168)]
)


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
    grid: Sequence[int] | None = None,
    cells: bool = False,
    view: tuple[float, float, float, float] | None = None,
) -> str:
    """An image with marks and a label under it.

    grid: rows and columns in which marks and view are; None: pixels. view: left, top, width, and height of
    the visible part. cells: show the pixels as squares.
    """
    rows, columns = grid or (image.height, image.width)
    box = " ".join(f"{value:g}" for value in view or (0, 0, columns, rows))
    style = ' style="image-rendering:pixelated"' if cells else ""
    place = f'width="{columns}" height="{rows}" preserveAspectRatio="none"'
    body = f'<image href="{data_uri(image)}" {place}{style}/>{marks}'
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


def line(cells: Sequence[Cell], kind: str) -> str:
    """A line of a class through cells, with a white rim."""
    path = " ".join(f"{column + 0.5:.2f},{row + 0.5:.2f}" for row, column in cells)
    return f'<path class="rim {kind}" d="M{path}"/><path class="{kind}" d="M{path}"/>'


def dot(cell: Cell, kind: str) -> str:
    """A disc of a class, `handle` or `target`: a line without a length, whose ends are round."""
    return line([cell, cell], kind)


def box(corner: Cell, other: Cell, kind: str) -> str:
    """A frame of a class around the cells from a corner to the opposite one."""
    return (
        f'<rect class="{kind}" x="{corner.column:.2f}" y="{corner.row:.2f}" '
        f'width="{other.column - corner.column + 1:.2f}" height="{other.row - corner.row + 1:.2f}"/>'
    )


def drags(handles: Sequence[Cell], targets: Sequence[Cell]) -> str:
    """Handles, targets, and lines between them."""
    parts = [line(pair, "pull") for pair in zip(handles, targets, strict=True)]
    parts += [dot(target, "target") for target in targets]
    return "".join(parts + [dot(handle, "handle") for handle in handles])
