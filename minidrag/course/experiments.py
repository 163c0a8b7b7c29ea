"""Make the figures of the lessons anew and print their numbers.

    python -m minidrag.course figures       # all of them
    python -m minidrag.course figures 3     # of lesson 3

Deterministic on one machine. A lesson takes less than two minutes on two cores.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from minidrag import tiny
from minidrag.app.draw import RED, draw_drags, grid
from minidrag.app.options import read_options
from minidrag.app.session import Session, open_session
from minidrag.bench.cases import make_case, make_cases, measure, pasted
from minidrag.bench.features import features_page, scene_frames
from minidrag.bench.harness import open_case
from minidrag.bench.large import in_sheet, textured
from minidrag.bench.metrics import distances, image_features, ssim
from minidrag.bench.placement import place
from minidrag.config import EditConfig
from minidrag.course import LESSONS
from minidrag.course.chart import Curve, chart
from minidrag.course.replay import distance_map, normal, sample, window
from minidrag.course.svg import heat
from minidrag.images import WHITE, psnr
from minidrag.method.ddim import Denoiser, denoise, guided, invert
from minidrag.method.drag import Cell, Origin, Step, View, motion_loss
from minidrag.method.dragdiffusion import dragdiffusion, observer
from minidrag.method.lora import initialize, lora_attached, noise_loss, train
from minidrag.method.progress import Progress
from minidrag.model import Model, decode, encode
from minidrag.system.files import read_json, write_whole
from minidrag.tiny.objects import Object
from minidrag.tiny.renderer import Scene, render
from minidrag.weights.load import load_model

# Four times the paper's rate and four projections, so that a minute is enough.
LORA = EditConfig(lora_steps=120, lora_lr=2e-3, lora_lr_ratio=1.0, lora_targets="qkvo")
LORA_TIMES = (121, 321, 521, 721, 921)
SHORT = 20  # steps from pure noise, or up to it
# The paper's method, and no LoRA, which the small model does not need.
ONE_LEVEL = replace(EditConfig.official(), lora_steps=0, drag_steps=40)
# The default's loop alone, without what lesson 10 puts around it.
LOOP = EditConfig(lora_steps=0, window=False, detail=False)
SIDE = 144  # pixels: height of an image in a figure


class Finding(NamedTuple):
    """Result of an experiment."""

    lines: list[str]  # to print
    figure: Image.Image


Panels = list[tuple[str, Image.Image]]  # labels and images


class Bench:
    """The small model and the image that ships, loaded once for all experiments."""

    @cached_property
    def model(self) -> Model:
        return load_model("tiny", device="cpu")

    @cached_property
    def session(self) -> Session:
        options = read_options({"base": LESSONS / "drag.json", "device": "cpu"})
        return open_session(self.model, options, Progress(show=False))

    @property
    def image(self) -> Image.Image:
        return self.session.image

    @property
    def clean(self) -> Tensor:
        """The image's latent."""
        return self.session.latent

    @cached_property
    def denoiser(self) -> Denoiser:
        """With the image's caption, in the paper's number of steps."""
        text = self.model.encode_text(self.session.options.prompt)
        return Denoiser(self.model.unet, self.model.schedule, text, ONE_LEVEL.steps)

    @cached_property
    def twin(self) -> tuple[Image.Image, Tensor]:
        """The image with a second, equal ball, and its latent."""
        scene = read_json(tiny.DEMO / "drag.json")["scene"]
        (ball,) = scene["objects"]
        pair = tuple(Object(**(ball | {"x": x})) for x in (ball["x"], 0.75))
        peaks = tuple((x, height) for x, height in scene["peaks"])
        image = render(Scene(**(scene | {"objects": pair, "peaks": peaks})))
        return image, encode(self.model, image, EditConfig())[0]

    def observe(self, latent: Tensor) -> View:
        """The view of a latent at the level of `one_level`."""
        return observer(self.denoiser, ONE_LEVEL.levels, self.session.task, ONE_LEVEL)(latent)

    @cached_property
    def path(self) -> list[Tensor]:
        """Latents of the image's inversion, the clean one first."""
        return [self.clean, *invert(self.denoiser, self.clean, ONE_LEVEL.levels)]

    @cached_property
    def one_level(self) -> list[Step]:
        """States of the drag that ships, by the paper's method without a LoRA."""
        return list(dragdiffusion(self.denoiser, self.path, self.session.task, ONE_LEVEL))


def tabulate(panels: Panels, columns: int, height: int = SIDE) -> Image.Image:
    """Images in rows, each under its label."""
    return grid([image for _, image in panels], columns, [label for label, _ in panels], height)


def stack(rows: Sequence[Image.Image]) -> Image.Image:
    """Images under each other on white."""
    page = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), WHITE)
    top = 0
    for row in rows:
        page.paste(row, ((page.width - row.width) // 2, top))
        top += row.height
    return page


def squares(values: Image.Image, side: int = SIDE) -> Image.Image:
    """A map whose cells show as squares."""
    return values.resize((round(values.width * side / values.height), side), Image.Resampling.NEAREST)


@torch.no_grad()
def noise(bench: Bench) -> Finding:
    """1: the same noise at six levels, and the image that the prediction implies."""
    model = bench.model
    eps = normal(bench.clean, 0)
    lines = ["   t  signal  noise  mean squared error"]
    noisy: Panels = []
    implied: Panels = []
    for timestep in (1, 201, 401, 601, 801, 981):
        latent = model.schedule.add_noise(bench.clean, eps, torch.tensor([timestep]))
        predicted = model.unet(latent, timestep, bench.denoiser.text).noise
        error = (predicted - eps).square().mean().item()
        alpha = model.schedule.alpha(timestep)
        lines.append(f"{timestep:4}  {alpha.sqrt():6.3f}  {(1 - alpha).sqrt():5.3f}  {error:.4f}")
        noisy.append((f"t = {timestep}", decode(model, latent)))
        clean = model.schedule.step(latent, predicted, timestep, -1)
        implied.append((f"error {error:.3f}", decode(model, clean)))
    return Finding(lines, tabulate(noisy + implied, 6))


@torch.no_grad()
def inversion(bench: Bench) -> Finding:
    """2: up to the noise and down again, with guidance on the way down alone, and on both ways."""
    plain = bench.denoiser
    negative = bench.model.encode_text("")
    top = ONE_LEVEL.levels

    def guide(scale: float) -> Denoiser:
        return plain if scale == 1 else replace(plain, unet=guided(plain.unet, negative, scale))

    lines = ["up   down  PSNR"]
    panels: Panels = [("the image", bench.image)]
    curves = []
    for up, downs in ((1.0, (1.0, 2.0, 4.0, 7.5)), (7.5, (7.5,))):
        path = [bench.clean, *invert(guide(up), bench.clean, top)]
        for down in downs:
            back = [latent for (latent,) in denoise(guide(down), path[-1:], top, ONE_LEVEL)][::-1]
            gaps = [(one - other).abs().mean().item() for one, other in zip(path[:-1], back, strict=True)]
            curves.append(Curve(f"up {up:g}, down {down:g}", list(enumerate(gaps))))
            image = decode(bench.model, back[0])
            quality = f"{psnr(image, bench.image):.1f} dB"
            lines.append(f"{up:3g}  {down:4g}  {quality}")
            panels.append((f"up {up:g}, down {down:g}\n{quality}", image))
    plot = chart(curves, "level", "apart", (880, 230))
    return Finding(lines, stack([tabulate(panels, 6), plot]))


@torch.no_grad()
def features(bench: Bench) -> Finding:
    """3: principal components of the features of a scene before and after its object moved."""
    frames, prompt = scene_frames("object", 18)
    page = features_page(bench.model, frames, prompt, (10, 20, 35, 50))
    width = 1200
    figure = page.resize((width, round(page.height * width / page.width)), Image.Resampling.LANCZOS)
    return Finding(["Within a pair, equal colors mean equal features."], figure)


def lora(bench: Bench) -> Finding:
    """4: samples from fresh noise, and the loss, while a LoRA learns an image of a look never seen."""
    case = make_case("object", 0, 18, "hatched")
    model = bench.model
    moments = encode(model, case.before, LORA)
    text = model.encode_text(case.prompt)
    networks = model.unet, model.schedule
    eps = normal(moments[0], 9)
    rng = torch.Generator().manual_seed(0)
    untrained = initialize(model.unet, LORA.lora_rank, LORA.lora_targets, rng)
    lines = ["steps  loss at t = " + ", ".join(map(str, LORA_TIMES))]
    samples: Panels = []
    curves = []
    done = 0
    with lora_attached(model.unet, model.text_encoder, untrained):
        training = train(*networks, moments, text, LORA, rng)
        for steps in (0, 40, LORA.lora_steps):
            done += sum(1 for _ in islice(training, steps - done))
            with torch.no_grad():
                parts = (noise_loss(*networks, moments[0], torch.tensor([t]), eps, text) for t in LORA_TIMES)
                losses = [loss.item() for loss in parts]
            lines.append(f"{steps:5}  " + ", ".join(f"{loss:.3f}" for loss in losses))
            curves.append(Curve(f"{steps} steps", list(zip(LORA_TIMES, losses, strict=True))))
            for seed in range(3):
                image = sample(model, normal(moments[0], seed), text, SHORT)
                samples.append((f"sample {seed + 1}, {steps} steps", image))
    plot = chart(curves, "timestep t", "loss", (332, 230))
    top = tabulate([("the one image", case.before), ("", plot)], 2, plot.height)
    return Finding(lines, stack([top, tabulate(samples, 3)]))


def supervision(bench: Bench) -> Finding:
    """5: where the gradient of the motion loss lies, and what the updates change."""
    options = bench.session.options
    task = bench.session.task
    steps = bench.one_level
    assert task.mask is not None
    leaf = steps[0].latent.clone().requires_grad_()
    view = bench.observe(leaf)
    reference = Origin(task.handles, view)
    loss = motion_loss(view.features, task.handles, task.targets, reference, ONE_LEVEL)
    size = torch.autograd.grad(loss, leaf)[0].abs().mean(1)[0]
    drawing = draw_drags(bench.image, options.handles, options.targets, bench.session.mask)
    panels: Panels = [("the drag", drawing), ("size of the gradient", squares(heat(size, 0)))]
    lines = ["update  change of the latent in the mask  outside"]
    for number in (1, 10, 40):
        change = (steps[number].latent - steps[0].latent).abs().mean(1)[0]
        inside, outside = (float((change * part).sum() / part.sum()) for part in (task.mask, 1 - task.mask))
        lines.append(f"{number:6}  {inside:31.3f}  {outside:7.3f}")
        panels.append((f"update {number}\n{inside:.3f}, {outside:.3f}", squares(heat(change, 0))))
    share = float((size * task.mask).sum() / size.sum())
    area = float(task.mask.mean())
    lines.append(
        f"{100 * share:.0f} % of the first gradient lies in the mask, {100 * area:.0f} % of the cells"
    )
    for number in (0, 10, 20, 30, 40):
        panels.append((f"foreseen, {number}", decode(bench.model, steps[number].predicted)))
    curve = Curve("motion loss plus mask term", [(i, step.loss) for i, step in enumerate(steps) if step.loss])
    plot = chart([curve], "update", "loss", (720, 200))
    return Finding(lines, stack([tabulate(panels, 5), plot]))


@torch.no_grad()
def tracking(bench: Bench) -> Finding:
    """6: maps of the distance to the handle's feature during a drag, and in an image with a twin."""
    handles = bench.session.task.handles
    handle = handles[0]
    steps = bench.one_level
    origin = Origin(handles, bench.observe(steps[0].latent))
    lines = ["update  handle (row, column)  its distance"]
    maps: Panels = []
    path = []
    for number, step in enumerate(steps):
        values = distance_map(bench.observe(step.latent).features, origin, handle)
        at = step.handles[0]
        path.append((number, float(values[int(at.row), int(at.column)])))
        if number in (0, 10, 20, 40):
            before = steps[max(number - 1, 0)].handles[0]
            maps.append((f"update {number}: {path[-1][1]:.0f}", marked(values, before, at)))
            lines.append(f"{number:6}  {at.row:12g}, {at.column:2g}        {path[-1][1]:12.0f}")
    image, clean = bench.twin
    *_, top = invert(bench.denoiser, clean, ONE_LEVEL.levels)
    view = bench.observe(top)
    values = distance_map(view.features, Origin([handle], view), handle)
    half = values.shape[1] // 2 + 4  # columns right of the first ball
    other = float(values[:, half:].min())
    lines.append(f"in the image with a twin the other ball's nearest cell is {other:.0f} away")
    curves = [Curve("at the handle", path), Curve("at the twin, before any drag", [(0, other), (40, other)])]
    twins: Panels = [("a twin", image)]
    twins.append((f"its map: {other:.0f} at the other", marked(values, handle, handle)))
    twins.append(("", chart(curves, "update", "distance", (430, 175))))
    return Finding(lines, stack([tabulate(maps, 4), tabulate(twins, 3, 175)]))


def marked(values: Tensor, before: Cell, at: Cell, scale: int = 4) -> Image.Image:
    """A distance map, near bright, with the window of the search and its arg-min."""
    image = heat(-values, -float(values.median()), 0)
    image = squares(image, image.height * scale)
    low, high = window(before, ONE_LEVEL.track_radius, values.shape)
    canvas = ImageDraw.Draw(image)
    corners = [scale * low.column, scale * low.row, scale * (high.column + 1), scale * (high.row + 1)]
    canvas.rectangle(corners, outline=WHITE, width=2)
    x = scale * (at.column + 0.5)
    y = scale * (at.row + 0.5)
    canvas.ellipse((x - 3, y - 3, x + 3, y + 3), RED)
    return image


@torch.no_grad()
def control(bench: Bench) -> Finding:
    """7: samples that read the keys and values of an image with another look than their prompt asks for."""
    denoiser = replace(bench.denoiser, steps=SHORT)
    *_, top = invert(denoiser, bench.clean, SHORT)
    lines = ["prompt; mean color of the sample's lower half with 0, 1, 2, 3 blocks"]
    panels: Panels = []
    for prompt in (
        "a red ball in the middle, on snow, at dusk",
        "a blue ball in the middle, on sand, by day",
    ):
        other = replace(denoiser, text=bench.model.encode_text(prompt))
        panels.append(("keys and values of this", bench.image))
        colors = []
        for blocks in range(4):
            image = decode(bench.model, borrowed(denoiser, top, other, normal(bench.clean, 2), blocks))
            lower = np.asarray(image)[image.height // 2 :].reshape(-1, 3).mean(axis=0)
            colors.append(" ".join(f"{value:.0f}" for value in lower))
            panels.append((f"{blocks} blocks", image))
        lines.append(f"{prompt}; {', '.join(colors)}")
    return Finding(lines, tabulate(panels, 5))


def borrowed(denoiser: Denoiser, original: Tensor, other: Denoiser, latent: Tensor, blocks: int) -> Tensor:
    """Denoise a latent for another prompt with the original's keys and values in the last blocks."""
    for level in range(denoiser.steps, 0, -1):
        noise, _, pairs = denoiser(original, level)
        original = denoiser.step(original, noise, level, level - 1)
        noise, _, _ = other(latent, level, pairs[4 - blocks :])
        latent = other.step(latent, noise, level, level - 1)
    return latent


def measuring(bench: Bench) -> Finding:
    """8: the true distance beside what the paper's MD sees, for edits and baselines."""
    names = ("no edit", "cut and paste", "edit", "truth")
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    lines = ["case        image          true distance    MD  SSIM to the original"]
    panels: Panels = []
    for case in make_cases(6, ["object", "light"], 7):
        edited = open_case(bench.model, case, LOOP).edit().image
        before = image_features(bench.model, case.before, case.prompt)
        for name, image in zip(names, (case.before, pasted(case), edited, case.truth), strict=True):
            after = image_features(bench.model, image, case.prompt)
            parts = before, after, case.handles, case.targets, image.size
            mean = sum(distances(*parts)) / len(case.handles)
            likeness = ssim(image, case.before)
            placed = place(image, case.scene, case.drag)
            if not placed.lost:
                points[name].append((placed.distance, mean))
            true = "lost" if placed.lost else f"{placed.distance:.1f}"
            lines.append(f"{case.name:10}  {name:13}  {true:>13}  {mean:4.1f}  {likeness:.2f}")
            panels.append((f"{name}: {true}\nMD {mean:.1f}, SSIM {likeness:.2f}", image))
    curves = [Curve(name, points[name]) for name in names]
    plot = chart(curves, "true distance to the target in pixels", "MD", (640, 260), dots=True)
    return Finding(lines, stack([tabulate(panels[:8], 4), plot]))


def alternation(bench: Bench) -> Finding:
    """9: the same two drags at one noise level, alternating with denoising, and with a warped start."""
    methods = {
        "one level": replace(EditConfig.official(), lora_steps=0, keep_background=True),
        "alternating": replace(LOOP, warp_start=False),
        "and warped": LOOP,
    }
    lines = ["case        method       updates  handle's distance  true distance"]
    panels: Panels = []
    for kind, number in (("object", 2), ("light", 0)):
        case = make_case(kind, number, 2611)
        drawing = draw_drags(case.before, case.handles, case.targets, torch.from_numpy(case.mask))
        panels.append((case.drag.name, drawing))
        for name, config in methods.items():
            edit = open_case(bench.model, case, config).edit()
            placed = place(edit.image, case.scene, case.drag)
            true = "lost" if placed.lost else f"{placed.distance:.1f}"
            remaining = edit.remaining[0]
            lines.append(f"{case.name:10}  {name:11}  {len(edit.losses):7}  {remaining:17.1f}  {true:>13}")
            panels.append((f"{name}: {true}", edit.image))
        panels.append(("the true result", case.truth))
    return Finding(lines, tabulate(panels, 5))


def large(bench: Bench) -> Finding:
    """10: drags in larger images: of the whole image, in a window, and with the original's detail."""
    methods = {
        "whole image": LOOP,
        "window": replace(LOOP, window=True),
        "and detail": replace(LOOP, window=True, detail=True),
    }
    cases = {
        "sheet": in_sheet(make_case("object", 2, 2611)),
        "texture": textured(make_case("object", 1, 2611)),
    }
    lines = ["image    method       image pixels per pixel  true distance  PSNR  sharpness"]
    panels: Panels = []
    for name, case in cases.items():
        for method, config in methods.items():
            edit = open_case(bench.model, case, config).edit()
            found = measure(case, edit.image, edit.raw, lambda *_: {})
            true = "lost" if found["lost"] else f"{found['distance']:.1f}"
            scale = min(edit.window.size) / min(bench.session.size)
            lines.append(
                f"{name:7}  {method:11}  {scale:22.1f}  {true:>13}  {found['PSNR inside']:4.1f}  "
                f"{found['sharpness']:9.2f}"
            )
            panels.append((f"{method}: {true}", case.tile.crop(edit.image)))
        panels.append(("the true result", case.tile.crop(case.truth)))
    return Finding(lines, tabulate(panels, 4, 2 * SIDE))


EXPERIMENTS: dict[str, Callable[[Bench], Finding]] = {
    "1-noise": noise,
    "2-inversion": inversion,
    "3-features": features,
    "4-lora": lora,
    "5-supervision": supervision,
    "6-tracking": tracking,
    "7-control": control,
    "8-measuring": measuring,
    "9-alternation": alternation,
    "10-large": large,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("lessons", nargs="*", type=int, metavar="N", help="lessons (default: all)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/lessons"), metavar="DIR", help="default: %(default)s"
    )


def run(args: argparse.Namespace) -> int:
    numbers = args.lessons or range(1, len(EXPERIMENTS) + 1)
    for number in numbers:
        if not 1 <= number <= len(EXPERIMENTS):
            raise ValueError(f"there is no lesson {number}: they are 1 to {len(EXPERIMENTS)}")
    bench = Bench()
    args.out.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        began = time.perf_counter()
        name = list(EXPERIMENTS)[number - 1]
        finding = EXPERIMENTS[name](bench)
        figure = finding.figure.quantize(256)
        file = args.out / f"{name}.png"
        write_whole(file, lambda path, figure=figure: figure.save(path, optimize=True))
        print(*finding.lines, sep="\n")
        print(f"wrote {file} in {time.perf_counter() - began:.0f} s\n", flush=True)
    return 0
