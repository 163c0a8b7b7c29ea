"""Visualize the UNet's features of two images by PCA, over timesteps and blocks.

    python -m minidrag.bench features [ONE.png OTHER.png] [--steps 10 20 35 50]

Shows the premise of the method: features identify content and move with it. The colors are the first three
principal components over both images: within a pair, equal colors mean equal features. Writes
runs/features-1.png, or the next free number.
"""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from minidrag import images
from minidrag.app import draw
from minidrag.app.options import check_prompt
from minidrag.bench.cases import make_case
from minidrag.config import EditConfig
from minidrag.edit import prepare
from minidrag.method.ddim import Denoiser, invert
from minidrag.method.progress import Progress
from minidrag.model import Model, encode
from minidrag.points import Pixel
from minidrag.system import pictures
from minidrag.system.files import write_whole
from minidrag.weights.load import load_model

CONFIG = EditConfig.official()
BLOCKS = (1, 2, 3, 4)  # up blocks, coarsest first
SIDE = 208  # pixels: longer side of an image on the page


@dataclass(frozen=True)
class Frame:
    """One of the two images."""

    label: str
    image: Image.Image
    drawn: Image.Image  # with the drag


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("images", nargs="*", type=Path, metavar="IMAGE", help="two images (default: a rendered scene)")
    add("--model", default="tiny", help="as in demo.py (default: tiny)")
    add("--prompt", help='prompt of both images (default: the scene\'s caption, "" for images)')
    add("--steps", type=int, nargs="+", default=[10, 20, 35, 50], help="inversion steps, 1 to 50")


def components(frames: Sequence[Tensor]) -> Tensor:
    """First three principal components of the positions of all frames: (3, N).

    frames: each (C, h, w), float64. SVD leaves the signs of the axes open: the entry with the largest
    magnitude is made positive.
    """
    rows = torch.cat([frame.flatten(1) for frame in frames], dim=1).T  # (C, h, w) each -> (N, C)
    centered = rows - rows.mean(dim=0)
    axes = torch.linalg.svd(centered, full_matrices=False)[2][:3]
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    return axes * largest.sign() @ centered.T


def to_colors(frames: Sequence[Tensor]) -> list[Image.Image]:
    """RGB images of the principal components, one pixel per position.

    All frames have the same components and the same range, from the 1st to the 99th percentile.
    """
    values = components(frames)
    low, high = torch.quantile(values, torch.tensor([0.01, 0.99]).to(values), dim=1)[:, :, None]
    scaled = 2 * (values - low) / (high - low).clamp(min=1e-9) - 1  # a component can be constant
    parts = scaled.split([frame[0].numel() for frame in frames], dim=1)
    pairs = zip(parts, frames, strict=True)
    return [images.to_image(part.unflatten(1, frame.shape[1:])[None]) for part, frame in pairs]


def inverted_features(
    model: Model, image: Image.Image, text: Tensor, steps: Sequence[int], progress: Progress
) -> dict[int, list[Tensor]]:
    """Features of the four up blocks after each of the inversion steps: (C, h, w), float64."""
    clean, _ = encode(model, image, CONFIG)
    config = replace(CONFIG, inversion_steps=max(steps))
    maps = {}
    denoiser = Denoiser(model.unet, model.schedule, text, config.steps)
    inversion = invert(denoiser, clean, config.levels)
    path = [clean, *progress("inversion", inversion, config.levels)]
    for step in steps:
        with torch.no_grad():
            _, features, _ = denoiser(path[step], step)
        maps[step] = [block[0].cpu().double() for block in features]  # CPU first: MPS has no float64
    return maps


def scene_frames(kind: str, seed: int) -> tuple[list[Frame], str]:
    """Render a scene before and after a drag; return both frames and the caption."""
    case = make_case(kind, 0, seed)
    frames = []
    for label, image in (("before", case.before), ("after", case.truth)):
        frames.append(Frame(label, image, draw.draw_drags(image, case.handles, case.targets)))
    return frames, case.prompt


def read_frames(args: argparse.Namespace) -> tuple[list[Frame], str]:
    """Load or render both frames and choose the prompt. Raises ValueError for invalid arguments."""
    for step in args.steps:
        if not 1 <= step <= CONFIG.steps:
            raise ValueError(f"--steps must be 1 to {CONFIG.steps}, got {step}")
    check_prompt(args.prompt or "")
    if args.images:
        if len(args.images) != 2:
            raise ValueError(f"expected two images or none, got {len(args.images)}")
        frames = [read_frame(path) for path in args.images]
        caption = ""
    else:
        frames, caption = scene_frames("object", 18)  # has a long drag
    return frames, caption if args.prompt is None else args.prompt


def read_frame(path: Path) -> Frame:
    image = pictures.load_image(path)
    return Frame(path.name.encode(errors="replace").decode(), image, image)


def features_page(model: Model, frames: Sequence[Frame], prompt: str, steps: Sequence[int]) -> Image.Image:
    """Draw a row per step: both images with the drag, then a pair of feature maps per up block.

    Raises ValueError for images or models that cannot be edited.
    """
    for frame in frames:  # a dummy drag checks the image and the model
        prepare(model, frame.image.size, [Pixel(0, 0)], [Pixel(0, 0)], None, CONFIG)
    text = model.encode_text(prompt)
    features = [inverted_features(model, frame.image, text, steps, Progress()) for frame in frames]
    height = round(SIDE * min(1.0, *(frame.image.height / frame.image.width for frame in frames)))
    cells = []
    labels = []
    for step in steps:
        cells += [frame.drawn for frame in frames]
        labels += [frame.label for frame in frames]
        for block in BLOCKS:
            maps = to_colors([levels[step][block - 1] for levels in features])
            cells += [enlarge_map(colors, frame, height) for colors, frame in zip(maps, frames, strict=True)]
            labels += [label_of(model, step, block)] * len(frames)
    return draw.grid(cells, len(frames) * (1 + len(BLOCKS)), labels, height)


def enlarge_map(colors: Image.Image, frame: Frame, height: int) -> Image.Image:
    """Enlarge a feature map to the aspect of its image, each position a rectangle of one color."""
    size = round(frame.image.width * height / frame.image.height), height
    return colors.resize(size, Image.Resampling.NEAREST)


def label_of(model: Model, step: int, block: int) -> str:
    time = model.schedule.timestep(step, CONFIG.steps)
    used = step == CONFIG.levels and block == CONFIG.block
    return f"block {block}, t = {time}" + ("\nused by the drag" if used else "")


def run(args: argparse.Namespace) -> int:
    frames, prompt = read_frames(args)
    page = features_page(load_model(args.model), frames, prompt, list(dict.fromkeys(args.steps)))
    files = (Path("runs") / f"features-{number}.png" for number in itertools.count(1))
    file = next(file for file in files if not file.exists())
    file.parent.mkdir(exist_ok=True)
    write_whole(file, page.save)
    print(f"wrote {file}")
    return 0
