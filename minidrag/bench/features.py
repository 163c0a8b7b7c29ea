"""Draws the UNet's features of two frames as colours, over time steps and blocks.

    python -m minidrag.bench features [ONE.png OTHER.png] [--steps 10 20 35 50] [--blocks 1 2 3 4]

What the method stands on: features tell which thing a place belongs to, and go along when the thing moves.
The colours are the first three principal components of both frames together, so that within a pair equal
colours mean equal features.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from minidrag import images
from minidrag.app import draw
from minidrag.app.draw import RED
from minidrag.bench.cases import KINDS, make_case
from minidrag.checks import check
from minidrag.config import EditConfig
from minidrag.edit import encode
from minidrag.method.ddim import invert
from minidrag.stages import must_be_finite
from minidrag.weights.model import Model, load_model

CONFIG = EditConfig()
CELL, GAP, MARGIN, STRIP = (
    208,
    8,
    32,
    44,
)  # pixels: a feature map's longer side, between two, outside, a label
INK, PALE = (40, 40, 40), (110, 110, 110)


@dataclass(frozen=True)
class Frame:
    """One of the two pictures. shown: the same with marks, as it is drawn."""

    label: str
    picture: Image.Image
    shown: Image.Image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("pictures", nargs="*", type=Path, metavar="PICTURE", help="two, in place of a rendered scene")
    add("--model", default="tiny", help="as for demo.py (default: tiny)")
    add("--prompt", help='what both show (default: the scene\'s caption, "" for pictures)')
    add(
        "--steps", type=int, nargs="+", default=[10, 20, 35, 50], help="of 50, counted from the clean picture"
    )
    add("--blocks", type=int, nargs="+", default=[1, 2, 3, 4], help="1 to 4, the coarsest first")
    add("--kind", choices=KINDS, default="object", help=f"of the scene's drag: {', '.join(KINDS)}")
    add("--seed", type=int, default=18, help="of the scene (default: %(default)s, which has a far drag)")
    add("--out", type=Path, default=Path("runs/features.png"), help="default: %(default)s")


def components(frames: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The first three principal components of all positions of all frames together.

    frames: each (C, h, w), float64. Returns the mean, (C,), and the components, (3, C), of length 1. Their
    sign would be chance: it is chosen so that the entry of largest size is positive.
    """
    rows = torch.cat([frame.flatten(1) for frame in frames], dim=1).T  # (C, h, w) each -> (N, C)
    mean = rows.mean(dim=0)
    axes = torch.linalg.svd(rows - mean, full_matrices=False)[2][:3]
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    return mean, axes * largest.sign()


def project(frame: Tensor, mean: Tensor, axes: Tensor) -> Tensor:
    """How much of each component is at each position: (C, h, w) -> (3, h, w)."""
    return torch.einsum("kc,chw->khw", axes, frame - mean[:, None, None])


def colours(frames: Sequence[Tensor]) -> list[Image.Image]:
    """Each frame's components as red, green and blue, a pixel per position.

    All frames share components and range, which leaves out the outer hundredth at both ends.
    """
    mean, axes = components(frames)
    projected = [project(frame, mean, axes) for frame in frames]
    values = torch.cat([part.flatten(1) for part in projected], dim=1)  # (3, h, w) each -> (3, N)
    low, high = torch.quantile(values, torch.tensor([0.01, 0.99]).to(values), dim=1)[:, :, None, None]
    scale = 2 / (high - low).clamp(min=1e-9)  # a component of no extent is no reason to divide by nothing
    return [images.to_picture(((part - low) * scale - 1)[None]) for part in projected]


def inverted_features(
    model: Model, picture: Image.Image, text: Tensor, steps: Sequence[int], bar: tqdm
) -> dict[int, list[Tensor]]:
    """The four up blocks' outputs at each of the steps, on the way of DDIM inversion: (C, h, w), float64."""

    def on_step(done: int, latent: Tensor) -> None:
        must_be_finite(latent, "inversion", f" in step {done}")
        bar.update()

    clean, _ = encode(model, picture, CONFIG)
    path = invert(model.unet, model.schedule, clean, text, CONFIG.steps, max(steps), on_step)
    times, found = model.schedule.timesteps(CONFIG.steps), {}
    for step in steps:
        with torch.no_grad():
            features = model.unet(path[step], times[-step], text).features
        found[step] = [
            block[0].cpu().double() for block in features
        ]  # to the CPU first: Apple has no float64
    return found


def scene_frames(kind: str, seed: int) -> tuple[list[Frame], str]:
    """A scene before and after one of its drags, and its caption."""
    case = make_case(kind, 0, seed)
    handles, targets = case.drag.handles, case.drag.targets
    pairs = (("before", case.before), ("after", case.truth))
    frames = [Frame(label, picture, draw.draw_drags(picture, handles, targets)) for label, picture in pairs]
    return frames, case.prompt


def read_frames(args: argparse.Namespace) -> tuple[list[Frame], str]:
    """The two frames and the prompt; ValueError for what cannot be drawn."""
    for name, values, most in (("steps", args.steps, CONFIG.steps), ("blocks", args.blocks, 4)):
        for value in values:
            if not 1 <= value <= most:
                raise ValueError(f"--{name} {value} is not possible: choose 1 to {most}")
    if args.out.suffix.lower() != ".png" or args.out.is_dir():
        raise ValueError(f"--out {args.out}: give the name of a .png file")
    if args.pictures:
        if len(args.pictures) != 2:
            raise ValueError(f"two pictures are compared, not {len(args.pictures)}: give two, or none")
        pictures = [(path.name, images.load_picture(path)) for path in args.pictures]
        frames, caption = [Frame(name, picture, picture) for name, picture in pictures], ""
    else:
        frames, caption = scene_frames(args.kind, args.seed)
    return frames, caption if args.prompt is None else args.prompt


def fitted(size: tuple[int, int], side: int) -> tuple[int, int]:
    """The largest (width, height) of this shape in a square."""
    width, height = (max(1, round(one * side / max(size))) for one in size)
    return width, height


def write_label(
    draw: ImageDraw.ImageDraw,
    text: str,
    box: tuple[float, float, float],
    size: float,
    color: images.Color = INK,
) -> None:
    """Writes centred into a strip from box[0] to box[1], at height box[2], smaller where it would not fit."""
    left, right, middle = box
    fit = min(1.0, (right - left) / max(1.0, ImageFont.load_default(size).getlength(text)))
    font = ImageFont.load_default(size * fit)
    draw.text(((left + right) / 2, middle), text, color, font, anchor="mm")


def draw_table(
    frames: Sequence[Frame], maps: dict[int, dict[int, list[Image.Image]]], times: Sequence[int]
) -> Image.Image:
    """The maps of both frames as pairs: a row for each block, a column for each time step.

    maps: step -> block -> the two. times: the index of each step. What the method itself reads is framed.
    """
    blocks = next(iter(maps.values()))
    sizes = [fitted(frame.picture.size, CELL) for frame in frames]
    tall, left = max(height for _, height in sizes), 3 * STRIP
    row, across = tall + GAP, sum(width for width, _ in sizes) + GAP
    shape = left + (across + 3 * GAP) * len(maps), 2 * STRIP + row * len(blocks)
    table = Image.new("RGB", shape, images.WHITE)
    draw = ImageDraw.Draw(table)
    for i, block in enumerate(blocks):
        write_label(draw, f"block {block}", (0, left - 2 * GAP, 2 * STRIP + row * i + tall / 2), 28)
    for j, (step, time) in enumerate(zip(maps, times, strict=True)):
        x = left + (across + 3 * GAP) * j
        write_label(draw, f"step {step}, t = {time}", (x, x + across, STRIP / 2), 28)
        for k, (frame, (width, height)) in enumerate(zip(frames, sizes, strict=True)):
            start = x + k * (across - width)
            write_label(draw, frame.label, (start, start + width, 1.5 * STRIP), 24, PALE)
            for i, block in enumerate(blocks):
                one = maps[step][block][k].resize((width, height), Image.Resampling.NEAREST)
                table.paste(one, (start, 2 * STRIP + row * i + (tall - height) // 2))
        if step == CONFIG.inversion_steps and CONFIG.block in blocks:
            y, edge = 2 * STRIP + row * list(blocks).index(CONFIG.block), GAP // 2
            corners = x - edge, y - edge, x + across + edge - 1, y + tall + edge - 1
            draw.rectangle(corners, outline=RED, width=edge)
    return table


def draw_page(frames: Sequence[Frame], table: Image.Image, notes: Sequence[str]) -> Image.Image:
    """The two frames, one above the other, beside the table of their features, and notes below."""
    side = max(CELL, (table.height - 2 * STRIP - GAP) // 2)
    pictures = [images.resize(frame.shown, fitted(frame.shown.size, side)) for frame in frames]
    width = max(picture.width for picture in pictures)
    height = max(table.height, sum(picture.height + STRIP for picture in pictures) + GAP)
    size = width + table.width + 3 * MARGIN, height + STRIP * len(notes) + 2 * MARGIN
    page, y = Image.new("RGB", size, images.WHITE), MARGIN
    draw = ImageDraw.Draw(page)
    for frame, picture in zip(frames, pictures, strict=True):
        write_label(draw, frame.label, (MARGIN, MARGIN + width, y + STRIP / 2), 28)
        page.paste(picture, (MARGIN + (width - picture.width) // 2, y + STRIP))
        y += STRIP + picture.height + GAP
    page.paste(table, (width + 2 * MARGIN, MARGIN))
    for i, note in enumerate(notes):
        line = height + MARGIN + STRIP * (i + 0.75)
        write_label(draw, note, (MARGIN, size[0] - MARGIN, line), 24, PALE)
    return page


def features_page(
    model: Model, frames: Sequence[Frame], prompt: str, steps: Sequence[int], blocks: Sequence[int]
) -> Image.Image:
    """The whole picture; ValueError for pictures and models that cannot be edited either."""
    for frame in frames:  # a drag that goes nowhere: it is the picture and the model that are asked about
        check(model, frame.picture.size, [(0, 0)], [(0, 0)], None, CONFIG)
    text = model.encode_text(prompt)
    with tqdm(desc="inversion", total=len(frames) * max(steps)) as bar:
        found = [inverted_features(model, frame.picture, text, steps, bar) for frame in frames]
    maps = {
        step: {block: colours([features[step][block - 1] for features in found]) for block in blocks}
        for step in steps
    }
    times = model.schedule.timesteps(CONFIG.steps)
    table = draw_table(frames, maps, [times[-step] for step in steps])
    notes = ["Colours: the first three principal components of both frames together."]
    notes.append("Within a pair equal colours mean equal features.")
    if CONFIG.inversion_steps in steps and CONFIG.block in blocks:
        notes.append("Framed: the features that the method drags.")
    return draw_page(frames, table, notes)


def run(args: argparse.Namespace) -> int:
    try:
        frames, prompt = read_frames(args)
        steps, blocks = (list(dict.fromkeys(values)) for values in (args.steps, args.blocks))
        model = load_model(args.model)
        page = features_page(model, frames, prompt, steps, blocks)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        images.write_whole(args.out, page.save)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"minidrag: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("minidrag: stopped, nothing was written", file=sys.stderr)
        return 130
    print(f"Written to {args.out}")
    return 0
