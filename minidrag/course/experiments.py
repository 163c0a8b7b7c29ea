"""One experiment for each lesson, on the small model: numbers to print and a figure."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from minidrag import tiny
from minidrag.app.draw import draw_drags
from minidrag.app.options import Options, open_input, read_options
from minidrag.bench.cases import SceneCase, make_case, make_cases, pasted
from minidrag.bench.features import features_page, scene_frames
from minidrag.bench.metrics import distances, image_features, ssim
from minidrag.bench.placement import place
from minidrag.config import EditConfig
from minidrag.course import LESSONS
from minidrag.course.plot import SIDE, Panel, beside, chart, row, stack
from minidrag.course.replay import distance_map, noise_losses, normal, sample, window
from minidrag.course.svg import Curve, heat
from minidrag.edit import Edit, drag_edit
from minidrag.images import psnr
from minidrag.method.ddim import NoisePredictor, denoise, invert
from minidrag.method.drag import Cell, Origin, Step, View, motion_loss
from minidrag.method.dragdiffusion import Task, dragdiffusion, observe
from minidrag.method.lora import initialize, lora_attached, train
from minidrag.method.sampling import guided
from minidrag.model import Model, decode, encode
from minidrag.points import to_task
from minidrag.tiny.objects import Object
from minidrag.tiny.renderer import Scene, render
from minidrag.weights.load import load_model

# Four times the paper's rate and four projections, so that a minute is enough.
LORA = EditConfig(lora_steps=120, lora_lr=2e-3, lora_lr_ratio=1.0, lora_targets="qkvo")
LORA_TIMES = (121, 321, 521, 721, 921)
SHORT = EditConfig(steps=20, inversion_steps=20)  # from pure noise, or up to it, in few steps
# The paper's method, and no LoRA, which the small model does not need.
ONE_LEVEL = replace(EditConfig.official(), lora_steps=0, drag_steps=40)


class Finding(NamedTuple):
    """Result of an experiment."""

    lines: list[str]  # to print
    figure: Image.Image


class Bench:
    """The small model and the image that ships, loaded once for all experiments."""

    @cached_property
    def model(self) -> Model:
        return load_model("tiny", device="cpu")

    @cached_property
    def options(self) -> Options:
        return read_options({"base": LESSONS / "drag.json", "device": "cpu"})

    @cached_property
    def image(self) -> Image.Image:
        return open_input(self.options)[0]

    @cached_property
    def mask(self) -> Tensor:
        mask = open_input(self.options)[1]
        assert mask is not None
        return mask

    @cached_property
    def text(self) -> Tensor:
        return self.model.encode_text(self.options.prompt)

    @cached_property
    def clean(self) -> Tensor:
        """The image's latent."""
        return encode(self.model, self.image, EditConfig())[0]

    @cached_property
    def task(self) -> Task:
        """The drag that ships, on the feature grid."""
        points = self.options.handles, self.options.targets
        return to_task(self.model, self.image.size, *points, self.mask, EditConfig())

    @cached_property
    def latent_mask(self) -> Tensor:
        assert self.task.mask is not None
        return self.task.mask

    @cached_property
    def drawing(self) -> Image.Image:
        return draw_drags(self.image, self.options.handles, self.options.targets, self.mask)

    @cached_property
    def twin(self) -> tuple[Image.Image, Tensor]:
        """The image with a second, equal ball, and its latent."""
        scene = json.loads((tiny.DEMO / "drag.json").read_text(encoding="utf-8"))["scene"]
        (ball,) = scene["objects"]
        pair = tuple(Object(**(ball | {"x": x})) for x in (ball["x"], 0.75))
        peaks = tuple((x, height) for x, height in scene["peaks"])
        image = render(Scene(**(scene | {"objects": pair, "peaks": peaks})))
        return image, encode(self.model, image, EditConfig())[0]

    def look(self, latent: Tensor) -> View:
        """The features of a latent at the level of `one_level`."""
        level = ONE_LEVEL.inversion_steps
        parts = self.model.unet, self.model.schedule, self.text, self.task.grid, ONE_LEVEL, level
        return observe(*parts, latent)

    @cached_property
    def path(self) -> list[Tensor]:
        """Latents of the image's inversion, the clean one first."""
        inversion = invert(self.model.unet, self.model.schedule, self.clean, self.text, ONE_LEVEL)
        return [self.clean, *inversion]

    @cached_property
    def one_level(self) -> list[Step]:
        """States of the drag that ships, by the paper's method without a LoRA."""
        parts = self.model.unet, self.model.schedule, self.path, self.text, self.task, ONE_LEVEL
        return list(dragdiffusion(*parts))


@torch.no_grad()
def noise(bench: Bench) -> Finding:
    """1: the same noise at six levels, and the image that the prediction implies."""
    model, eps = bench.model, normal(bench.clean, 0)
    lines, noisy, foreseen = ["   t  signal  noise  mean squared error"], [], []
    for time in (1, 201, 401, 601, 801, 981):
        latent = model.schedule.add_noise(bench.clean, eps, torch.tensor([time]))
        predicted = model.unet(latent, time, bench.text).noise
        error = (predicted - eps).square().mean().item()
        alpha = model.schedule.alpha(time)
        lines.append(f"{time:4}  {alpha.sqrt():6.3f}  {(1 - alpha).sqrt():5.3f}  {error:.4f}")
        noisy.append(Panel(decode(model, latent), f"t = {time}"))
        clean = decode(model, model.schedule.step(latent, predicted, time, -1))
        foreseen.append(Panel(clean, f"error {error:.3f}"))
    return Finding(lines, stack([row(noisy), row(foreseen)]))


@torch.no_grad()
def inversion(bench: Bench) -> Finding:
    """2: up to the noise and down again, with guidance on the way down alone, and on both ways."""
    model, config = bench.model, EditConfig.official()
    negative = model.encode_text("")

    def predictor(scale: float) -> NoisePredictor:
        return model.unet if scale == 1 else guided(model.unet, negative, scale)

    lines, panels, curves = ["up   down  PSNR"], [Panel(bench.image, "the image")], []
    for up, downs in ((1.0, (1.0, 2.0, 4.0, 7.5)), (7.5, (7.5,))):
        path = [bench.clean, *invert(predictor(up), model.schedule, bench.clean, bench.text, config)]
        for down in downs:
            level = len(path) - 1
            walk = denoise(predictor(down), model.schedule, path[-1:], bench.text, level, config)
            back = [latent for (latent,) in walk]
            gaps = [(one - other).abs().mean().item() for one, other in zip(path[-2::-1], back, strict=True)]
            curves.append(
                Curve(f"up {up:g}, down {down:g}", [(level - 1 - i, gap) for i, gap in enumerate(gaps)])
            )
            image = decode(model, back[-1])
            lines.append(f"{up:3g}  {down:4g}  {psnr(image, bench.image):.1f} dB")
            panels.append(Panel(image, f"up {up:g}, down {down:g}: {psnr(image, bench.image):.1f} dB"))
    return Finding(lines, stack([row(panels), chart(curves, "level", "apart", (880, 230))]))


@torch.no_grad()
def features(bench: Bench) -> Finding:
    """3: principal components of the features of a scene before and after its object moved."""
    frames, prompt = scene_frames("object", 18)
    page = features_page(bench.model, frames, prompt, (10, 20, 35, 50), (1, 2, 3, 4))
    width = 900
    figure = page.resize((width, round(page.height * width / page.width)), Image.Resampling.LANCZOS)
    return Finding(["Within a pair, equal colors mean equal features."], figure)


def lora(bench: Bench) -> Finding:
    """4: samples from fresh noise, and the loss, while a LoRA learns an image of a look never seen."""
    case, model, config = make_case("object", 0, 18, "hatched"), bench.model, LORA
    moments, text = encode(model, case.before, config), model.encode_text(case.prompt)
    rng = torch.Generator().manual_seed(0)
    untrained = initialize(model.unet, config.lora_rank, config.lora_targets, rng)
    rows, curves, lines, done = [], [], ["steps  loss at t = " + ", ".join(map(str, LORA_TIMES))], 0
    with lora_attached(model.unet, model.text_encoder, untrained):
        training = train(model.unet, model.schedule, moments, text, config, rng)
        for steps in (0, 40, config.lora_steps):
            done += sum(1 for _ in islice(training, steps - done))
            losses = noise_losses(model, moments[0], text, LORA_TIMES, 9)
            lines.append(f"{steps:5}  " + ", ".join(f"{loss:.3f}" for loss in losses))
            curves.append(Curve(f"{steps} steps", list(zip(LORA_TIMES, losses, strict=True))))
            shown = [sample(model, normal(moments[0], seed), text, 20) for seed in range(3)]
            rows.append(
                [Panel(image, f"sample {seed + 1}, {steps} steps") for seed, image in enumerate(shown)]
            )
    column = row([Panel(case.before, "the one image")], 2 * SIDE)
    plot = chart(curves, "timestep t", "loss", (2 * SIDE + 60, 230))
    return Finding(lines, beside([stack([column, plot]), stack([row(panels) for panels in rows])]))


def supervision(bench: Bench) -> Finding:
    """5: where the gradient of the motion loss lies, and what the updates change."""
    steps, task = bench.one_level, bench.task
    start = steps[0].latent
    leaf = start.clone().requires_grad_()
    loss = motion_loss(bench.look(leaf).features, task.handles, task.targets, ONE_LEVEL)
    (gradient,) = torch.autograd.grad(loss, leaf)
    size, mask = gradient.abs().mean(1)[0], bench.latent_mask
    panels = [Panel(bench.drawing, "the drag"), Panel(heat(size, 0), "size of the gradient", cells=True)]
    lines = ["update  change of the latent in the mask  outside"]
    for number in (1, 10, 40):
        change = (steps[number].latent - start).abs().mean(1)[0]
        inside, outside = (float((change * part).sum() / part.sum()) for part in (mask, 1 - mask))
        lines.append(f"{number:6}  {inside:31.3f}  {outside:7.3f}")
        panels.append(Panel(heat(change, 0), f"update {number}: {inside:.3f}, {outside:.3f}", cells=True))
    share = float((size * mask).sum() / size.sum())
    lines.append(
        f"{100 * share:.0f} % of the first gradient lies in the mask, {100 * mask.mean():.0f} % of the cells"
    )
    foreseen = [Panel(decode(bench.model, steps[i].predicted), f"foreseen, {i}") for i in (0, 10, 20, 30, 40)]
    curve = Curve("motion loss plus mask term", [(i, step.loss) for i, step in enumerate(steps) if step.loss])
    return Finding(lines, stack([row(panels), row(foreseen), chart([curve], "update", "loss", (720, 200))]))


@torch.no_grad()
def tracking(bench: Bench) -> Finding:
    """6: maps of the distance to the handle's feature during a drag, and in an image with a twin."""
    steps, handle = bench.one_level, bench.task.handles[0]
    origin = Origin(bench.task.handles, bench.look(steps[0].latent))
    lines, panels, best = ["update  handle (row, column)  its distance"], [], []
    for number, step in enumerate(steps):
        values = distance_map(bench.look(step.latent).features, origin, handle)
        at = step.handles[0]
        best.append((number, float(values[int(at.row), int(at.column)])))
        if number in (0, 10, 20, 40):
            before = steps[max(number - 1, 0)].handles[0]
            panels.append(Panel(marked(values, before, at), f"update {number}: {best[-1][1]:.0f}"))
            lines.append(f"{number:6}  {at.row:12g}, {at.column:2g}        {best[-1][1]:12.0f}")
    image, clean = bench.twin
    path = list(invert(bench.model.unet, bench.model.schedule, clean, bench.text, ONE_LEVEL))
    view = bench.look(path[-1])
    values = distance_map(view.features, Origin([handle], view), handle)
    half = values.shape[1] // 2 + 4  # columns right of the first ball
    other = float(values[:, half:].min())
    lines.append(f"in the image with a twin the other ball's nearest cell is {other:.0f} away")
    twins = [
        Panel(image, "a twin"),
        Panel(marked(values, handle, handle), f"its map: {other:.0f} at the other"),
    ]
    curves = [Curve("at the handle", best), Curve("at the twin, before any drag", [(0, other), (40, other)])]
    plot = chart(curves, "update", "distance", (430, 175))
    return Finding(lines, stack([row(panels), beside([row(twins), plot])]))


def marked(values: Tensor, before: Cell, at: Cell, scale: int = 4) -> Image.Image:
    """A distance map, near bright, with the window of the search and its arg-min."""
    image = heat(-values, -float(values.median()), 0)
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    canvas, (low, high) = ImageDraw.Draw(image), window(before, ONE_LEVEL.track_radius, values.shape)
    corners = [scale * low.column, scale * low.row, scale * (high.column + 1), scale * (high.row + 1)]
    canvas.rectangle(corners, outline=(255, 255, 255), width=2)
    x, y = scale * (at.column + 0.5), scale * (at.row + 0.5)
    canvas.ellipse((x - 3, y - 3, x + 3, y + 3), (226, 32, 44))
    return image


@torch.no_grad()
def control(bench: Bench) -> Finding:
    """7: samples that read the keys and values of an image with another look than their prompt asks for."""
    model, original = bench.model, [bench.clean]
    original += invert(model.unet, model.schedule, bench.clean, bench.text, SHORT)
    rows, lines = [], ["prompt; mean color of the sample's lower half with 0, 1, 2, 3 blocks"]
    for prompt in (
        "a red ball in the middle, on snow, at dusk",
        "a blue ball in the middle, on sand, by day",
    ):
        text, panels, colors = model.encode_text(prompt), [], []
        for blocks in range(4):
            reference, latent = original[-1], normal(bench.clean, 2)
            for time, below in model.schedule.pairs(SHORT.steps):
                noise, _, pairs = model.unet(reference, time, bench.text)
                reference = model.schedule.step(reference, noise, time, below)
                noise, _, _ = model.unet(latent, time, text, pairs[4 - blocks :])
                latent = model.schedule.step(latent, noise, time, below)
            image = decode(model, latent)
            lower = np.asarray(image)[image.height // 2 :].reshape(-1, 3).mean(axis=0)
            colors.append(" ".join(f"{value:.0f}" for value in lower))
            panels.append(Panel(image, f"{blocks} blocks"))
        lines.append(f"{prompt}; {', '.join(colors)}")
        rows.append(row([Panel(bench.image, "keys and values of this"), *panels]))
    return Finding(lines, stack(rows))


def measuring(bench: Bench) -> Finding:
    """8: the true distance beside what the paper's MD sees, for edits and baselines."""
    cases = make_cases(6, ["object", "light"], 7)
    names = ("no edit", "cut and paste", "edit", "truth")
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    lines, shown = ["case        image          true distance    MD  SSIM to the original"], []
    for case in cases:
        images = [case.before, pasted(case), edit_case(bench, case, EditConfig.fast()).image, case.truth]
        before = image_features(bench.model, case.before, case.prompt)
        panels = []
        for name, image in zip(names, images, strict=True):
            after = image_features(bench.model, image, case.prompt)
            parts = before, after, case.handles, case.targets, image.size
            found, placed = sum(distances(*parts)) / len(case.handles), place(image, case.scene, case.drag)
            same = ssim(image, case.before)
            true = "lost" if placed.lost else f"{placed.distance:.1f}"
            lines.append(f"{case.name:10}  {name:13}  {true:>13}  {found:4.1f}  {same:.2f}")
            panels.append(Panel(image, f"{name}: {true}, MD {found:.1f}, {same:.2f}"))
            if not placed.lost:
                points[name].append((placed.distance, found))
        shown.append(row(panels, 160))
    curves = [Curve(name, points[name]) for name in names]
    plot = chart(curves, "true distance to the target in pixels", "MD", (640, 260), dots=True)
    return Finding(lines, stack([*shown[:2], plot]))


def alternation(bench: Bench) -> Finding:
    """9: the same two drags at one noise level, in turn with denoising, and with a warped start."""
    methods = {
        "one level": replace(EditConfig.official(), lora_steps=0, keep_background=True),
        "in turn": EditConfig(lora_steps=0, warp_start=False),
        "and warped": EditConfig(lora_steps=0),
    }
    rows, lines = [], ["case        method      updates  handle's distance  true distance"]
    for kind, number in (("object", 2), ("light", 0)):
        case = make_case(kind, number, 2611)
        mask = torch.from_numpy(case.mask.astype(np.float32))
        panels = [Panel(draw_drags(case.before, case.handles, case.targets, mask), case.drag.name)]
        for name, config in methods.items():
            edit = edit_case(bench, case, config)
            placed = place(edit.image, case.scene, case.drag)
            true = "lost" if placed.lost else f"{placed.distance:.1f}"
            panels.append(Panel(edit.image, f"{name}: {true}"))
            left = edit.remaining[0]
            lines.append(f"{case.name:10}  {name:10}  {len(edit.losses):7}  {left:17.1f}  {true:>13}")
        rows.append(row([*panels, Panel(case.truth, "the true result")], 160))
    return Finding(lines, stack(rows))


def edit_case(bench: Bench, case: SceneCase, config: EditConfig) -> Edit:
    mask = torch.from_numpy(case.mask.astype(np.float32))
    points = case.handles, case.targets
    return drag_edit(bench.model, case.before, *points, mask=mask, prompt=case.prompt, config=config)


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
}
