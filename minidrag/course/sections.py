"""Sections of a report, in the order of the method: what each says, asks, quotes, and shows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from minidrag import images
from minidrag.app import draw
from minidrag.app.runs import rescale
from minidrag.config import EditConfig
from minidrag.course.excerpt import Excerpt, excerpt
from minidrag.course.replay import TIMES, Moment, Replay, changes, window
from minidrag.course.svg import Curve, box, chart, dot, drags, heat, line, picture, row, size_of
from minidrag.edit import Edit, drag_edit
from minidrag.images import psnr
from minidrag.method.ddim import Schedule, denoise, invert
from minidrag.method.drag import Cell, drag, motion_loss, snap, track
from minidrag.method.dragdiffusion import dragdiffusion, observe, supervise
from minidrag.method.gooddrag import gooddrag
from minidrag.method.lora import LoRALayer, noise_loss
from minidrag.method.warp import warp
from minidrag.networks.layers import Attention
from minidrag.points import Pixel, to_cells

SHOWN = 128  # pixels: about the shorter side of an image among many


@dataclass(frozen=True)
class Subject:
    """One finished edit, with everything that a report says about it."""

    image: Image.Image
    mask: Tensor | None
    prompt: str
    model: str
    edit: Edit
    replay: Replay

    @property
    def size(self) -> tuple[int, int]:
        """Size at which images are shown, the model's own."""
        return self.replay.samples[0].size

    @property
    def shown(self) -> Image.Image:
        """The original at that size."""
        return images.resize(self.image, self.size)

    @property
    def grid(self) -> tuple[int, int]:
        """Width and height of the feature grid."""
        rows, columns = self.edit.task.grid
        return columns, rows

    @property
    def config(self) -> EditConfig:
        """The settings, with radii in cells of this run's grid."""
        return self.edit.config.scaled(self.edit.task.grid)

    def pixels(self, cells: Sequence[Cell], size: tuple[int, int] | None = None) -> list[Pixel]:
        """Cells of the feature grid as pixels of the image at a size; None: as it is shown."""
        return rescale([Pixel(column, row) for row, column in cells], self.grid, size or self.size)


@dataclass(frozen=True)
class Section:
    """One page of a report."""

    name: str
    title: str
    lead: str
    code: list[Excerpt]
    question: str
    figure: str  # folded under the question
    answer: str  # under the figure
    formula: str = ""
    opening: str = ""  # a figure that is not folded


def sections(subject: Subject) -> list[Section]:
    """All sections, in the method's order."""
    start = [moved_start(subject)] if subject.edit.config.warp_start else []
    learned = [task(subject), lora(subject), inversion(subject), features(subject)]
    dragged = [supervision(subject), tracking(subject), update(subject), steps(subject)]
    return [*learned, *start, *dragged, control(subject), result(subject)]


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def task(subject: Subject) -> Section:
    edit, size = subject.edit, subject.size
    handles, targets = (rescale(points, subject.image.size, size) for points in (edit.handles, edit.targets))
    base = subject.shown if subject.mask is None else draw.dim(subject.shown, subject.mask)
    columns, rows = subject.grid
    small = images.resize(subject.image, subject.grid)
    points = [subject.pixels(cells, subject.grid) for cells in (edit.task.handles, edit.task.targets)]
    grid = picture(small, f"{columns} x {rows} cells", drags(points[0], points[1], small.size), cells=True)
    masked = []
    if edit.task.mask is not None:
        height, width = edit.task.mask.shape
        masked = [
            picture(heat(edit.task.mask, 0, 1), f"mask M on the latent, {width} x {height}", cells=True)
        ]
    kept = "There is no mask, so all of the image may change."
    if subject.mask is not None:
        kept = "The bright region may change; outside it the mask asks the image to stay as it is."
    at = edit.task.handles[0]
    return Section(
        "task",
        "The image and the task",
        f"Each red handle point should go to its blue target point, and take its content along. {kept}",
        [excerpt(to_cells, "down, right", "return")],
        f"The method sees no pixels. On a grid of {columns} x {rows} cells, in which cell does the handle "
        "lie?",
        row(grid, *masked),
        f"Handle 1 lies in row {at.row:g}, column {at.column:g}, always a whole cell. "
        f"One cell is {subject.image.width / columns:g} pixels wide, so no handle is placed more finely "
        "than that.",
        r"h = (x + \frac{1}{2}) s - \frac{1}{2}",
        picture(base, subject.prompt or "no prompt", drags(handles, targets, size)),
    )


def lora(subject: Subject) -> Section:
    replay = subject.replay
    without, with_it = replay.noise_losses
    trained = any(factors.up.any() for factors in subject.edit.lora.unet.values())
    gains = [(time, 100 * (1 - new / old)) for time, old, new in zip(TIMES, without, with_it, strict=True)]
    names = ("a sample without the LoRA", "the same noise with it")
    shown = [picture(image, name) for image, name in zip(replay.samples, names, strict=True)]
    mean = sum(gain for _, gain in gains) / len(gains)
    answer = (
        f"At these {len(TIMES)} noise levels the LoRA lowers the loss on this image by {mean:.1f} % on "
        "average. A model that knew such images before has little to learn; on photos others measured "
        "hardly any movement without a LoRA."
    )
    curve = [
        Curve("loss removed by the LoRA; 0: none, or it rose", [(t, max(gain, 0.0)) for t, gain in gains])
    ]
    plot = chart(curve, "timestep t", "percent")
    if not trained:
        answer, plot = "This run has no trained LoRA, so both samples and both losses are the same.", ""
    return Section(
        "lora",
        "LoRA: learn this one image",
        "The weights of the UNet stay; beside each attention projection a product of two thin matrices "
        "learns. It trains on the denoising loss of this image alone, so that what is moved later keeps "
        "its identity.",
        [excerpt(LoRALayer.forward, "output, x, up", "return"), excerpt(noise_loss, "noisy =", "return")],
        "Both samples below start from the same fresh noise. Which will look more like the image, and how "
        "much?",
        row(picture(subject.shown, "the image"), *shown) + plot,
        answer,
        r"L_{\text{ft}}(z, \Delta\theta) = \E_{\epsilon, t} \| \epsilon - "
        r"\epsilon_{\theta + \Delta\theta}(\alpha_t z + \sigma_t \epsilon) \|_2^2",
    )


def inversion(subject: Subject) -> Section:
    edit, config = subject.edit, subject.edit.config
    shown = [picture(image, name) for name, image in subject.replay.levels]
    back = images.resize(edit.reconstruction, subject.size)
    quality = psnr(edit.reconstruction, subject.image)
    return Section(
        "inversion",
        "Inversion: back to noise, without chance",
        "DDIM steps without added noise can be walked upward, each asking the UNet which noise is in the "
        f"latent. After {config.inversion_steps} of {config.steps} steps the layout is still there but free "
        "to change.",
        [excerpt(invert, "for time", "yield"), excerpt(Schedule.step, "clean =", "return")],
        "After which of these levels can you no longer tell what the image shows?",
        row(*shown)
        + row(picture(subject.shown, "the image"), picture(back, f"up and down again, {quality:.1f} dB")),
        f"Walking down again without a drag returns the image at {quality:.1f} dB, autoencoder included. "
        "No guidance is used: it would pull both walks away from the latents that the image really has.",
        r"z_{t+1} = \sqrt{\bar\alpha_{t+1}} \frac{z_t - \sqrt{1 - \bar\alpha_t} \, \epsilon_\theta}"
        r"{\sqrt{\bar\alpha_t}} + \sqrt{1 - \bar\alpha_{t+1}} \, \epsilon_\theta",
    )


def features(subject: Subject) -> Section:
    edit, last = subject.edit, subject.edit.steps[-1]
    rows = []
    for images_of, name, cells in zip(
        subject.replay.colors, ("original", "edit"), (edit.task.handles, last.handles), strict=True
    ):
        shown = []
        for number, image in enumerate(images_of, 1):
            points = subject.pixels(cells, image.size)
            marks = "".join(dot(point, image.size, "handle") for point in points)
            label = f"block {number}, {name}" + (", tapped" if number == edit.config.block else "")
            shown.append(picture(image, label, marks, cells=True))
        rows.append(row(*shown))
    return Section(
        "features",
        "Features: what the UNet knows of each place",
        "On the way to the noise, the UNet describes every place of the latent by a vector. "
        f"The drag reads the vectors of up block {edit.config.block}, enlarged to half the image's size.",
        [excerpt(observe, "noise, features", "enlarged =")],
        "One block knows only where objects are, another only edges. In which would you look for a point "
        "again?",
        "".join(rows),
        "The colors are three principal components over both images of a block: equal colors mean equal "
        "features. Look for the block in which the object keeps its color while it moves.",
        r"F(z_t) = \text{up block " + str(edit.config.block) + r" of } \epsilon_\theta(z_t, t)",
    )


def moved_start(subject: Subject) -> Section:
    replay = subject.replay
    cells = replay.object_cells
    small = images.resize(subject.image, size_of(cells))
    pale = Image.blend(small, Image.new("RGB", small.size, images.WHITE), 0.65)
    cut = Image.fromarray((cells.cpu().numpy() * 255).astype("uint8"))
    chosen = Image.composite(small, pale, cut)
    shown = [picture(chosen, f"handle 1's object: {count(int(cells.sum()), 'cell')}", cells=True)]
    names = ("foreseen before the warp", "and after it")
    shown += [picture(m.image, name) for m, name in zip(replay.moments[:2], names, strict=False)]
    moved = "Here nothing was moved, as the mask cuts the object."
    if replay.moved:
        moved = "Here these cells were carried to the target in one stroke."
    return Section(
        "start",
        "A start that is already near",
        "Not in the paper: before the first update the default moves the objects under the handles in the "
        "noisy latent. What belongs to an object is decided by features, and what it uncovers is filled from "
        "its surroundings.",
        [excerpt(warp, "movers, others", "warped =")],
        "The warp takes what connects to the handle and looks more like it than like what is outside. "
        "Which part of the image will that be?",
        row(*shown),
        f"{moved} Denoising must repair the seams, and motion supervision brings what was left behind.",
        r"z_t[q] \leftarrow z_t[q - (g_i - h_i)]"
        "\n"
        r"\text{where } q - (g_i - h_i) \text{ belongs to the object}",
    )


def around(
    points: Sequence[Pixel], margin: float, size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """Left, top, width, and height of a square around points, within an image of `size` if it fits."""
    spans = [(min(axis) - margin, max(axis) + margin) for axis in zip(*points, strict=True)]
    side = min(max(high - low for low, high in spans), *size)
    corner = [(low + high - side) / 2 for low, high in spans]
    left, top = (min(max(at, 0), whole - side) for at, whole in zip(corner, size, strict=True))
    return left, top, side, side


def patches(subject: Subject, moment: Moment) -> str:
    """The supervised patches at a state, and where the next update pulls them, around the first drag."""
    edit, config, size = subject.edit, subject.config, moment.image.size
    half = size[0] / edit.task.grid[1] / 2  # of a cell
    points = subject.pixels(moment.step.handles), subject.pixels(edit.task.targets)
    first = points[0][0], points[1][0]
    view = around(first, (4 * config.motion_radius + 4) * 2 * half + math.dist(*first) / 2, size)
    shown = round(view[2]), round(view[3])
    frames = []
    for handle, target in zip(moment.step.handles, edit.task.targets, strict=True):
        low, high = window(handle, config.motion_radius, edit.task.grid)
        distance = math.dist(handle, target)
        length = min(config.motion_step, max(distance, 1.0)) / max(distance, 1e-9)
        down, right = (length * (to - at) for at, to in zip(handle, target, strict=True))
        moved = [Cell(row + down, column + right) for row, column in (low, high)]
        for corners, kind in (((low, high), "patch"), (moved, "ahead")):
            (left, top), (end, bottom) = subject.pixels(corners)
            inner = half - 0.5
            frames.append(
                box(Pixel(left - inner, top - inner), Pixel(end + inner, bottom + inner), shown, kind)
            )
    label = f"state {moment.index}: the patch, and where it is pulled"
    return picture(moment.image, label, drags(*points, shown) + "".join(frames), view=view)


def borders(edit: Edit) -> list[float]:
    """States at which another noise level begins."""
    pairs = enumerate(zip(edit.steps, edit.steps[1:], strict=False))
    return [number + 0.5 for number, (one, other) in pairs if one.level != other.level]


def supervision(subject: Subject) -> Section:
    edit, moments, config = subject.edit, subject.replay.moments, subject.config
    curves = [
        Curve(f"handle {number + 1}", [(m.index, m.losses[number]) for m in moments])
        for number in range(len(edit.handles))
    ]
    curves.append(
        Curve("lambda times the change outside the mask", [(m.index, m.background) for m in moments])
    )
    held = "in the original" if config.motion_reference == "start" else "now"
    first, last = (sum(moment.losses) for moment in (moments[0], moments[-1]))
    chosen = [moments[0], moments[len(moments) // 2]]
    return Section(
        "supervision",
        "Motion supervision: the pull",
        "The features one small step d ahead of the handle should become what they are at the handle "
        f"{held}. The second term asks the latent outside the mask, one DDIM step down, to stay.",
        [
            excerpt(motion_loss, "distance =", "total = total"),
            excerpt(supervise, "return loss +", "return loss +"),
        ],
        "Each update should lower the first term. Will it be zero when the handle has arrived?",
        row(*(patches(subject, moment) for moment in chosen)) + chart(curves, "state", "loss", borders(edit)),
        f"Over the drag the pull went from {first:.1f} to {last:.1f}; a handle that has arrived is "
        f"{'held there' if config.hold_steps else 'not pulled any more'}. Whenever a handle advances, the "
        "frame advances too, so the loss can jump up again.",
        r"L_{\text{ms}} = \sum_i \sum_{q \in \Omega(h_i^k, r_1)} \| F_{q + d_i}(\hat z_t^k) - "
        + (r"F_{q - h_i^k + h_i^0}(z_t)" if held != "now" else r"\sg(F_q(\hat z_t^k))")
        + " \\|_1\n"
        + r"+ \lambda \| (\hat z_{t-1}^k - \sg(\hat z_{t-1}^0)) \odot (1 - M) \|_1",
    )


def tracking_map(subject: Subject, moment: Moment, number: int, high: float) -> str:
    """Distances to a handle's feature at a state, with the window and the cell that is nearest in it."""
    edit, values = subject.edit, moment.maps[number]
    size, target = size_of(values), edit.task.targets[number]
    at, start = moment.step.handles[number], edit.task.handles[number]
    before = edit.steps[max(moment.index - 1, 0)].handles[number]
    if moment.index == 1 and subject.replay.moved:
        before = snap(target, edit.task.grid)  # where the warp left the handle
    low, top = window(before, subject.config.track_radius, edit.task.grid)
    marks = box(Pixel(low.column, low.row), Pixel(top.column, top.row), size, "window")
    marks += dot(Pixel(target.column, target.row), size, "target")
    marks += box(Pixel(start.column, start.row), Pixel(start.column, start.row), size, "origin")
    marks += dot(Pixel(at.column, at.row), size, "handle")
    return picture(
        heat(-values, -high, 0), f"state {moment.index}, level {moment.step.level}", marks, cells=True
    )


def tracking(subject: Subject) -> Section:
    moments = subject.replay.moments
    chosen = [moments[i] for i in sorted({0, len(moments) // 2, len(moments) - 1})]
    high = max(float(moment.maps[0].quantile(0.5)) for moment in chosen)
    maps = row(*(tracking_map(subject, moment, 0, high) for moment in chosen))
    radius = subject.config.track_radius
    side = 2 * radius + 1
    low = float(chosen[-1].maps[0].min())
    at = chosen[-1].step.handles[0]
    own = float(chosen[-1].maps[0][int(at.row), int(at.column)])
    best = "the best match of the whole map" if own <= low + 1e-6 else "the best match of its window only"
    return Section(
        "tracking",
        "Point tracking: where is the handle now?",
        "After each update the method looks for the handle: it compares every cell of a window with the "
        f"handle's original feature. The nearest, among at most {side} x {side} cells, is the new handle.",
        [excerpt(track, "for handle", "found.append")],
        "Bright cells resemble the handle of the original. Is the brightest cell of the image always in "
        "the window?",
        maps,
        "Bright is near; the frame is the window, the red disc its arg-min, the small square the handle's "
        f"first place. At the end the handle sits on {best}: tracking compares features and cannot know "
        "what was meant.",
        r"h_i^{k+1} = \argmin_{q \in \Omega(h_i^k, r_2)} \| F_q(\hat z_t^{k+1}) - F_{h_i^0}(z_t) \|_1",
    )


def update(subject: Subject) -> Section:
    edit = subject.edit
    inside, outside, change = changes(edit)
    curves = [Curve("inside the mask" if edit.task.mask is not None else "change", list(enumerate(inside)))]
    if edit.task.mask is not None:
        curves.append(Curve("outside", list(enumerate(outside))))
    size = size_of(change)
    points = [subject.pixels(cells, size) for cells in (edit.task.handles, edit.task.targets)]
    marks = drags(points[0], points[1], size)
    found = f"At the end the latent has changed by {inside[-1]:.3f} on average."
    if edit.task.mask is not None:
        found = (
            f"At the end the mean change is {inside[-1]:.3f} inside the mask and {outside[-1]:.3f} outside, "
            "where only the mask term holds it."
        )
    return Section(
        "update",
        "The update: what changes in the latent",
        "The only unknown is the latent: its gradient goes through the UNet, whose weights are fixed. "
        f"Adam takes steps of about {edit.config.drag_lr:g} in every element, however small its gradient.",
        [excerpt(drag, "loss = supervise", "yield")],
        "The loss looks at a few cells around the handle. Will the latent change only there?",
        row(picture(heat(change, 0), "change of the latent at the end", marks, cells=True))
        + chart(curves, "state", "mean change", borders(edit)),
        f"{found} Every feature depends on all of the latent, so a pull at one point reaches everywhere.",
        r"\hat z_t^{k+1} = \hat z_t^k - \eta \cdot "
        r"\frac{\partial L_{\text{ms}}(\hat z_t^k)}{\partial \hat z_t^k}",
    )


def frame(subject: Subject, moment: Moment, high: float) -> str:
    """One state for the slider: the image foreseen with trails, and the first handle's map."""
    edit, size, index = subject.edit, moment.image.size, moment.index
    trails = [rescale(path[: index + 1], subject.image.size, size) for path in edit.paths]
    marks = "".join(line(trail, size, "trail") for trail in trails)
    marks += drags([trail[-1] for trail in trails], subject.pixels(edit.task.targets), size)
    remaining = [
        math.dist(path[index], target) for path, target in zip(edit.paths, edit.targets, strict=True)
    ]
    loss = "no update yet at this level" if moment.step.loss is None else f"loss {moment.step.loss:.1f}"
    label = f"level {moment.step.level}, {loss}, {', '.join(f'{d:.1f}' for d in remaining)} pixels to go"
    shown = picture(moment.image, f"state {index} of {len(edit.steps) - 1}, as foreseen", marks)
    shown += tracking_map(subject, moment, 0, high)
    return f'<div class="frame"><div class="row">{shown}</div><p class="note">{label}</p></div>'


def steps(subject: Subject) -> Section:
    edit, moments, config = subject.edit, subject.replay.moments, subject.edit.config
    high = max(float(moment.maps[0].quantile(0.5)) for moment in moments)
    frames = "".join(frame(subject, moment, high) for moment in moments)
    slider = f'<input type="range" min="0" max="{len(moments) - 1}" value="0" aria-label="state of the drag">'
    levels = len({step.level for step in edit.steps})
    turn = config.warp_start or config.drag_levels > 1
    lead = "All updates are made at one noise level, as in the paper. The rest is denoising."
    code = excerpt(dragdiffusion, "level =", "return")
    if turn:
        lead = (
            "The paper makes all updates at one noise level; the default drags a little and takes one "
            "denoising step, in turn. Each step down brings the latent back to what the UNet knows, and "
            "has an optimizer of its own."
        )
        code = excerpt(gooddrag, "score, before", "latent, handles = step")
    return Section(
        "steps",
        "The drag, state by state",
        lead,
        [code],
        "Does the object follow its handle, or does the handle run ahead of it? Then move the slider.",
        f'<div class="slider">{slider}{frames}</div>',
        f"{count(len(edit.losses), 'update')} at {count(levels, 'noise level')}, {len(moments)} of "
        f"{len(edit.steps)} states shown. "
        + ("Every handle arrived." if edit.arrived else "Not every handle arrived."),
        r"\hat z_t^0 \leftarrow \hat z_{t-1}^K \text{ one level further down}"
        if turn
        else r"\hat z_t^0 = z_t",
    )


def asked(subject: Subject) -> str:
    """The attention of one query of the edit: the original, the weights over it, and the cell that asks."""
    edit, replay = subject.edit, subject.replay
    size, at = size_of(replay.attention), Pixel(replay.query.column, replay.query.row)
    return row(
        picture(images.resize(edit.raw, size), "the cell that asks", box(at, at, size, "asks"), cells=True),
        picture(heat(replay.attention, 0), "weights over the original", cells=True),
        picture(images.resize(subject.image, size), "the original at that size", cells=True),
    )


def control(subject: Subject) -> Section:
    edit, replay = subject.edit, subject.replay
    outside = None if subject.mask is None else subject.mask.cpu().numpy() < 0.5
    alone = images.resize(replay.uncontrolled, subject.image.size)
    near, apart = (psnr(image, subject.image, outside) for image in (edit.raw, alone))
    where = "As a whole" if outside is None else "Outside the mask"
    names = ((edit.raw, "with the original's keys and values"), (replay.uncontrolled, "without"))
    both = [picture(images.resize(image, subject.size), name) for image, name in names]
    peak, width = int(replay.attention.argmax()), replay.attention.shape[1]
    share = replay.attention.numel() * float(replay.attention.max())
    return Section(
        "control",
        "Reference-latent-control: ask the original",
        "While denoising, self-attention of the edit uses the keys and values of the original, which is "
        "denoised beside it. The edit decides what stands where; the original supplies how it looks.",
        [
            excerpt(denoise, "for latent in", "reference ="),
            excerpt(Attention.forward, "key, value", "return"),
        ],
        "A cell at the target asks the original. Where in the original will its answer come from?",
        row(*both) + asked(subject),
        f"The largest weight, {share:.0f} times an even share, lies in row {peak // width}, column "
        f"{peak % width}. {where} the edit, before any pasting, keeps the original at {near:.1f} dB with "
        f"the original's keys and values and at {apart:.1f} dB without.",
        r"\text{Attention}(Q, K^0, V^0) = \softmax(\frac{Q {K^0}^\top}{\sqrt{d}}) V^0",
    )


def result(subject: Subject) -> Section:
    edit, size = subject.edit, subject.size
    trails = [rescale(path, subject.image.size, size) for path in edit.paths]
    marks = "".join(line(trail, size, "trail") for trail in trails)
    marks += drags([trail[-1] for trail in trails], rescale(edit.targets, subject.image.size, size), size)
    curves = []
    for number, (path, target) in enumerate(zip(edit.paths, edit.targets, strict=True), 1):
        curves.append(Curve(f"handle {number}", [(i, math.dist(at, target)) for i, at in enumerate(path)]))
    remain = ", ".join(
        f"handle {number} has {left:.1f} of {distance:.1f} pixels left"
        for number, (left, distance) in enumerate(zip(edit.remaining, edit.distances, strict=True), 1)
    )
    final = images.resize(edit.image, size)
    kept = subject.mask is not None and edit.config.keep_background
    return Section(
        "result",
        "The result",
        "What the decoder returns is the edit; "
        + (
            "the default then puts the original's pixels back outside the mask. "
            if kept
            else "nothing is pasted over it. "
        )
        + "The paths are what tracking believed, not what a ruler on the image would measure.",
        [excerpt(drag_edit, "reconstruction, raw", "return")],
        "Where will the edit differ from what you had in mind?",
        row(
            picture(subject.shown, "original"),
            picture(final, "edit"),
            picture(final, "edit with the paths", marks),
        )
        + chart(curves, "state", "pixels to the target", borders(edit)),
        f"After {count(len(edit.losses), 'update')} {remain}. Compare the object itself with the target "
        "before you believe it.",
        r"x = M \odot D(\hat z_0) + (1 - M) \odot x^0" if kept else r"x = D(\hat z_0)",
    )
