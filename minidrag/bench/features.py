"""Visualize the UNet's features of two images by PCA, over timesteps and blocks.

    python -m minidrag.bench features [ONE.png OTHER.png] [--steps 10 20 35 50] [--blocks 1 2 3 4]

Shows the premise of the method: features identify content and move with it. The colors are the first three
principal components over both images, so equal colors within a pair mean equal features.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from minidrag import images
from minidrag.app import draw
from minidrag.app.draw import RED
from minidrag.app.options import check_prompt
from minidrag.bench.cases import KINDS, make_case
from minidrag.bench.harness import check_new, seed, write_new
from minidrag.config import EditConfig
from minidrag.edit import prepare
from minidrag.method.ddim import Denoiser, invert
from minidrag.method.progress import Progress
from minidrag.model import Model, encode
from minidrag.points import Pixel
from minidrag.system import pictures
from minidrag.weights.load import load_model

CONFIG = EditConfig.official()
CELL = 208  # pixels: longer side of a feature map
GAP, MARGIN = 8, 32  # pixels: between feature maps, around the page
STRIP = 44  # pixels: height of a label
INK, PALE = (40, 40, 40), (110, 110, 110)


@dataclass(frozen=True)
class Frame:
    """One of the two images."""

    label: str
    image: Image.Image
    shown: Image.Image  # with the drag drawn on it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("images", nargs="*", type=Path, metavar="IMAGE", help="two images (default: a rendered scene)")
    add("--model", default="tiny", help="as in demo.py (default: tiny)")
    add("--prompt", help='prompt of both images (default: the scene\'s caption, "" for images)')
    add("--steps", type=int, nargs="+", default=[10, 20, 35, 50], help="inversion steps, 1 to 50")
    add("--blocks", type=int, nargs="+", default=[1, 2, 3, 4], help="up blocks, 1 (coarsest) to 4")
    add("--kind", choices=KINDS, default="object", help=f"of the scene's drag: {', '.join(KINDS)}")
    add("--seed", type=seed, default=18, help="of the scene (default: %(default)s, which has a long drag)")
    add("--out", type=Path, metavar="PAGE.png", help="default: a new one in runs")


def components(frames: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """First three principal components over the positions of all frames.

    frames: each (C, h, w), float64. Returns the mean, (C,), and unit components, (3, C). SVD leaves their
    signs open: the entry with the largest magnitude is made positive.
    """
    rows = torch.cat([frame.flatten(1) for frame in frames], dim=1).T  # (C, h, w) each -> (N, C)
    mean = rows.mean(dim=0)
    axes = torch.linalg.svd(rows - mean, full_matrices=False)[2][:3]
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    return mean, axes * largest.sign()


def project(frame: Tensor, mean: Tensor, axes: Tensor) -> Tensor:
    """Project features onto the components: (C, h, w) -> (3, h, w)."""
    return torch.einsum("kc,chw->khw", axes, frame - mean[:, None, None])


def to_colors(frames: Sequence[Tensor]) -> list[Image.Image]:
    """RGB images of the principal components, one pixel per position.

    All frames have the same components and the same range, from the 1st to the 99th percentile.
    """
    mean, axes = components(frames)
    projected = [project(frame, mean, axes) for frame in frames]
    values = torch.cat([part.flatten(1) for part in projected], dim=1)  # (3, h, w) each -> (3, N)
    low, high = torch.quantile(values, torch.tensor([0.01, 0.99]).to(values), dim=1)[:, :, None, None]
    scale = 2 / (high - low).clamp(min=1e-9)  # a component can be constant
    return [images.to_image(((part - low) * scale - 1)[None]) for part in projected]


def inverted_features(
    model: Model, image: Image.Image, text: Tensor, steps: Sequence[int], progress: Progress
) -> dict[int, list[Tensor]]:
    """Features of the four up blocks after each of the inversion steps: (C, h, w), float64."""
    clean, _ = encode(model, image, CONFIG)
    config, found = replace(CONFIG, inversion_steps=max(steps)), {}
    denoiser = Denoiser(model.unet, model.schedule, text, config.steps)
    inversion = invert(denoiser, clean, config.inversion_steps)
    path = [clean, *progress("inversion", inversion, config.inversion_steps)]
    for step in steps:
        with torch.no_grad():
            _, features, _ = denoiser(path[step], step)
        found[step] = [block[0].cpu().double() for block in features]  # CPU first: MPS has no float64
    return found


def scene_frames(kind: str, seed: int) -> tuple[list[Frame], str]:
    """Render a scene before and after a drag; return both frames and the caption."""
    case = make_case(kind, 0, seed)
    handles, targets = case.handles, case.targets
    pairs = (("before", case.before), ("after", case.truth))
    frames = [Frame(label, image, draw.draw_drags(image, handles, targets)) for label, image in pairs]
    return frames, case.prompt


def read_frames(args: argparse.Namespace) -> tuple[list[Frame], str]:
    """Load or render both frames and choose the prompt. Raises ValueError for invalid arguments."""
    for name, values, limit in (("steps", args.steps, CONFIG.steps), ("blocks", args.blocks, 4)):
        for value in values:
            if not 1 <= value <= limit:
                raise ValueError(f"--{name} must be 1 to {limit}, got {value}")
    check_new(args.out)
    check_prompt(args.prompt or "")
    if args.images:
        if len(args.images) != 2:
            raise ValueError(f"expected two images or none, got {len(args.images)}")
        pairs = [
            (path.name.encode(errors="replace").decode(), pictures.load_image(path)) for path in args.images
        ]
        frames, caption = [Frame(name, image, image) for name, image in pairs], ""
    else:
        frames, caption = scene_frames(args.kind, args.seed)
    return frames, caption if args.prompt is None else args.prompt


def fit_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Largest (width, height) of this aspect ratio within a square."""
    width, height = (max(1, round(one * side / max(size))) for one in size)
    return width, height


def write_label(
    draw: ImageDraw.ImageDraw,
    text: str,
    box: tuple[float, float, float],
    size: float,
    color: pictures.Color = INK,
) -> None:
    """Write centered text into box = (left, right, middle), with a smaller font if it does not fit."""
    left, right, middle = box
    fit = min(1.0, (right - left) / max(1.0, ImageFont.load_default(size).getlength(text)))
    font = ImageFont.load_default(size * fit)
    draw.text(((left + right) / 2, middle), text, color, font, anchor="mm")


def draw_table(
    frames: Sequence[Frame], maps: dict[int, dict[int, list[Image.Image]]], times: Sequence[int]
) -> Image.Image:
    """Draw the feature maps of both frames in pairs: one row per block, one column per timestep.

    maps: step -> block -> map of each frame. times: timestep of each step. The drag's features get a red box.
    """
    blocks = next(iter(maps.values()))
    sizes = [fit_size(frame.image.size, CELL) for frame in frames]
    cell_height, left = max(height for _, height in sizes), 3 * STRIP
    row_height, pair_width = cell_height + GAP, sum(width for width, _ in sizes) + GAP
    shape = left + (pair_width + 3 * GAP) * len(maps), 2 * STRIP + row_height * len(blocks)
    table = Image.new("RGB", shape, images.WHITE)
    draw = ImageDraw.Draw(table)
    rows = {block: 2 * STRIP + row_height * i for i, block in enumerate(blocks)}
    for block, y in rows.items():
        write_label(draw, f"block {block}", (0, left - 2 * GAP, y + cell_height / 2), 28)
    for j, (step, time) in enumerate(zip(maps, times, strict=True)):
        x = left + (pair_width + 3 * GAP) * j
        write_label(draw, f"step {step}, t = {time}", (x, x + pair_width, STRIP / 2), 28)
        for k, (frame, (width, height)) in enumerate(zip(frames, sizes, strict=True)):
            start = x + k * (pair_width - width)
            write_label(draw, frame.label, (start, start + width, 1.5 * STRIP), 24, PALE)
            for block, y in rows.items():
                resized = maps[step][block][k].resize((width, height), Image.Resampling.NEAREST)
                table.paste(resized, (start, y + (cell_height - height) // 2))
        if step == CONFIG.inversion_steps and CONFIG.block in blocks:
            y, edge = rows[CONFIG.block], GAP // 2
            corners = x - edge, y - edge, x + pair_width + edge - 1, y + cell_height + edge - 1
            draw.rectangle(corners, outline=RED, width=edge)
    return table


def draw_page(frames: Sequence[Frame], table: Image.Image, notes: Sequence[str]) -> Image.Image:
    """Draw both frames in a column, the feature table beside them and the notes below."""
    side = max(CELL, (table.height - 2 * STRIP - GAP) // 2)
    shown = [images.resize(frame.shown, fit_size(frame.shown.size, side)) for frame in frames]
    width = max(image.width for image in shown)
    height = max(table.height, sum(image.height + STRIP for image in shown) + GAP)
    size = width + table.width + 3 * MARGIN, height + STRIP * len(notes) + 2 * MARGIN
    page, y = Image.new("RGB", size, images.WHITE), MARGIN
    draw = ImageDraw.Draw(page)
    for frame, image in zip(frames, shown, strict=True):
        write_label(draw, frame.label, (MARGIN, MARGIN + width, y + STRIP / 2), 28)
        page.paste(image, (MARGIN + (width - image.width) // 2, y + STRIP))
        y += STRIP + image.height + GAP
    page.paste(table, (width + 2 * MARGIN, MARGIN))
    for i, note in enumerate(notes):
        line = height + MARGIN + STRIP * (i + 0.75)
        write_label(draw, note, (MARGIN, size[0] - MARGIN, line), 24, PALE)
    return page


def features_page(
    model: Model, frames: Sequence[Frame], prompt: str, steps: Sequence[int], blocks: Sequence[int]
) -> Image.Image:
    """Draw the whole page. Raises ValueError for images or models that cannot be edited."""
    for frame in frames:  # a dummy drag checks the image and the model
        prepare(model, frame.image.size, [Pixel(0, 0)], [Pixel(0, 0)], None, CONFIG)
    text = model.encode_text(prompt)
    found = [inverted_features(model, frame.image, text, steps, Progress()) for frame in frames]
    maps = {
        step: {block: to_colors([features[step][block - 1] for features in found]) for block in blocks}
        for step in steps
    }
    table = draw_table(frames, maps, [model.schedule.timestep(step, CONFIG.steps) for step in steps])
    notes = ["Colors: first three principal components over both images."]
    notes.append("Within a pair, equal colors mean equal features.")
    if CONFIG.inversion_steps in steps and CONFIG.block in blocks:
        notes.append("Red box: the features used by the drag.")
    return draw_page(frames, table, notes)


def run(args: argparse.Namespace) -> int:
    frames, prompt = read_frames(args)
    steps, blocks = (list(dict.fromkeys(values)) for values in (args.steps, args.blocks))
    page = features_page(load_model(args.model), frames, prompt, steps, blocks)
    print(f"wrote {write_new(args.out, 'features.png', page.save)}")
    return 0
