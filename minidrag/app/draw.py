"""Drawings of drags and masks, grids of images, and animations.

Sizes are (width, height), points pixels.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from minidrag.images import BLACK, WHITE, resize
from minidrag.method.drag import rescale
from minidrag.system.files import write_whole

RED, BLUE, INK = (226, 32, 44), (36, 92, 240), (40, 40, 40)
Point = tuple[float, float]
OVERSAMPLING = 3  # Pillow draws without antialiasing
# Ordered dithering (Bayer 1973), in levels of 255.
PATTERN = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]) - 7.5


def enlarge(image: Image.Image, side: int = 512) -> Image.Image:
    """Enlarge a small image by a whole factor, to a shorter side of about `side`."""
    factor = max(1, round(side / min(image.size)))
    return resize(image, (image.width * factor, image.height * factor))


def draw_drags(
    image: Image.Image,
    handles: Sequence[Point],
    targets: Sequence[Point],
    mask: Tensor | None = None,
    trails: Sequence[Sequence[Point]] = (),
) -> Image.Image:
    """Draw red handles, blue targets, and white arrows on a copy, enlarged if small; dim the unmasked region.

    mask: (H, W), 1 in the editable region. trails: paths of the handles.
    """
    canvas = enlarge(image)
    if mask is not None:
        canvas = dim(canvas, mask)
    layer = Image.new("RGBA", (OVERSAMPLING * canvas.width, OVERSAMPLING * canvas.height))
    draw = ImageDraw.Draw(layer)
    radius = OVERSAMPLING * max(6, min(canvas.size) // 64)

    def place(points: Sequence[Point]) -> list[Point]:
        return rescale(points, image.size, layer.size)

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


def dim(image: Image.Image, mask: Tensor) -> Image.Image:
    """Darken a copy outside the mask, (H, W), and outline the mask with a soft white line."""
    free = Image.fromarray(((mask >= 0.5).cpu().numpy() * 255).astype(np.uint8))
    soft = max(1.0, image.width / free.width / 2)
    free = free.resize(image.size, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(soft))
    dark = Image.blend(image, Image.new("RGB", image.size, BLACK), 0.55)
    dimmed = Image.composite(image, dark, free)
    dimmed.paste(WHITE, mask=free.point([255 - abs(2 * level - 255) for level in range(256)]))
    return dimmed


def draw_arrow(draw: ImageDraw.ImageDraw, start: Point, end: Point, radius: int) -> None:
    """Draw a white arrow with a dark edge up to the rim of the target's disc; none if the discs touch."""
    length = math.dist(start, end)
    if length <= 2 * radius:
        return
    x, y = start
    across = (end[0] - x) / length
    down = (end[1] - y) / length

    def at(ahead: float, aside: float) -> Point:
        return x + ahead * across - aside * down, y + ahead * down + aside * across

    tip = length - radius
    neck = max(tip - 2 * radius, 0)
    edge = radius // 6
    head = [at(tip, 0), at(neck, radius), at(neck, -radius)]
    draw.line([start, at(neck, 0)], BLACK, radius // 2 + 2 * edge)
    draw.line([*head, *head[:2]], BLACK, 2 * edge, joint="curve")
    draw.polygon(head, WHITE)
    draw.line([start, at(neck + 1, 0)], WHITE, radius // 2)


def side_by_side(images: Sequence[Image.Image], labels: Sequence[str]) -> Image.Image:
    """Put images in one row, as `grid` does."""
    return grid(images, len(images), labels)


def grid(
    images: Sequence[Image.Image], columns: int, labels: Sequence[str] = (), height: int | None = None
) -> Image.Image:
    """Put images in rows of `columns` on white, all of one height, each centered under its label.

    labels: one per image, of one line or more; without them, only gaps separate the images.
    height: pixels; None: that of the highest, after small ones are enlarged.
    """
    columns = min(columns, len(images))
    height = height or max(enlarge(image).height for image in images)
    scaled = [resize(image, (round(image.width * height / image.height), height)) for image in images]
    widths = [max(image.width for image in scaled[column::columns]) for column in range(columns)]
    gap = max(8, height // 40)
    lines = max((label.count("\n") + 1 for label in labels), default=0)
    strip = gap * (1 + 3 * lines)  # above each image, for its label
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (sum(widths) + gap * (columns + 1), rows * (strip + height) + gap), WHITE)
    for i, image in enumerate(scaled):
        row, column = divmod(i, columns)
        width = widths[column]
        left = gap * (column + 1) + sum(widths[:column])
        top = row * (strip + height)
        page.paste(image, (left + (width - image.width) // 2, top + strip))
        if labels:
            write_label(page, labels[i], (left + width / 2, top + strip / 2), width, 2 * gap)
    return page


def write_label(
    image: Image.Image, text: str, center: tuple[float, float], width: float, size: float
) -> None:
    """Write lines of text around a center, in a smaller font if they are wider than `width`."""
    draw = ImageDraw.Draw(image)
    left, _, right, _ = draw.textbbox((0, 0), text, ImageFont.load_default(size))
    font = ImageFont.load_default(int(size * min(1.0, width / max(1.0, right - left))))
    draw.text(center, text, INK, font, anchor="mm", align="center")


def save_gif(frames: Sequence[Image.Image], path: Path, seconds: float = 0.12, hold: float = 1.5) -> None:
    """Write an endless animation with `seconds` per frame, `hold` for the first and the last."""
    first, *rest = [with_palette(frame) for frame in frames]
    durations = [round(1000 * hold), *[round(1000 * seconds)] * len(rest)]
    durations[-1] = durations[0]

    def write(temporary: Path) -> None:
        first.save(temporary, "GIF", save_all=True, append_images=rest, duration=durations, loop=0)

    write_whole(path, write)


def with_palette(frame: Image.Image) -> Image.Image:
    """Reduce an image to 256 colors after ordered dithering, so that smooth areas have no bands.

    Pillow's error diffusion takes a hundred times longer, and flickers from frame to frame.
    """
    tiles = -(-frame.height // 4), -(-frame.width // 4), 1
    pattern = np.tile(PATTERN[..., None], tiles)[: frame.height, : frame.width]
    pixels = (np.asarray(frame) + pattern).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels).quantize(256, Image.Quantize.FASTOCTREE)
