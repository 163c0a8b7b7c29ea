"""Sections of a report in the order of the method: text, code, formula, question, and figures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from minidrag import images
from minidrag.app import draw
from minidrag.config import EditConfig
from minidrag.course.chart import Curve
from minidrag.course.excerpt import Excerpt, excerpt
from minidrag.course.replay import Moment, Replay, window
from minidrag.course.svg import box, dot, drags, figure, heat, line, plot, row
from minidrag.detail import explain, parts
from minidrag.edit import Edit, drag_edit
from minidrag.images import psnr
from minidrag.method import drag as loop
from minidrag.method.ddim import Schedule, denoise, invert
from minidrag.method.drag import Cell, snap
from minidrag.method.dragdiffusion import dragdiffusion, observer, supervisor
from minidrag.method.gooddrag import gooddrag
from minidrag.method.lora import LoRALayer, noise_loss
from minidrag.method.warp import warp
from minidrag.networks.layers import Attention


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
        """Size of images in the report, the model's own."""
        return self.replay.samples[0].size

    @property
    def original(self) -> Image.Image:
        """The original at that size."""
        return images.resize(self.image, self.size)

    @property
    def config(self) -> EditConfig:
        """The settings, with radii in cells of this run's grid."""
        return self.edit.config.scaled(self.edit.task.grid)

    @property
    def drags(self) -> str:
        """Marks of the handles before the drag, and of their targets."""
        return drags(self.edit.task.handles, self.edit.task.targets)

    def trails(self, index: int) -> str:
        """Marks of the handles' paths up to a state, and of their targets."""
        steps = self.edit.steps[: index + 1]
        paths = zip(*(step.handles for step in steps), strict=True)
        trails = "".join(line(path, "trail") for path in paths)
        return trails + drags(steps[-1].handles, self.edit.task.targets)


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
    formula: str
    opening: str = ""  # a figure that is not folded


def sections(subject: Subject) -> list[Section]:
    """All sections, in the method's order."""
    start = [warped_start(subject)] if subject.edit.config.warp_start else []
    prepared = [task(subject), lora(subject), inversion(subject), features(subject)]
    dragged = [supervision(subject), tracking(subject), update(subject), steps(subject)]
    detail = [carried(subject)] if subject.edit.config.detail else []
    return [*prepared, *start, *dragged, control(subject), *detail, result(subject)]


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def task(subject: Subject) -> Section:
    task = subject.edit.task
    rows, columns = task.grid
    small = images.resize(subject.image, (columns, rows))
    maps = figure(small, f"{columns} x {rows} cells", subject.drags, task.grid, cells=True)
    if task.mask is not None:
        height, width = task.mask.shape
        maps += figure(heat(task.mask, 0, 1), f"mask M on the latent, {width} x {height}", cells=True)
    drawing = subject.original
    freedom = "There is no mask, so all of the image may change."
    if subject.mask is not None:
        drawing = draw.dim(drawing, subject.mask)
        freedom = "The bright region may change; outside it the mask asks the image to stay as it is."
    at = task.handles[0]
    return Section(
        "task",
        "The image and the task",
        f"Each red handle point should go to its blue target point, and take its content along. {freedom}",
        [excerpt(loop.rescale, "scales =", "return")],
        f"The method sees no pixels. On a grid of {columns} x {rows} cells, in which cell does the handle "
        "lie?",
        row(maps),
        f"Handle 1 lies in row {at.row:g}, column {at.column:g}, always a whole cell. "
        f"One cell is {subject.image.width / columns:g} pixels wide, so no handle is placed more finely "
        "than that.",
        r"h = (x + \frac{1}{2}) s - \frac{1}{2}",
        figure(drawing, subject.prompt or "no prompt", subject.drags, task.grid),
    )


def lora(subject: Subject) -> Section:
    replay = subject.replay
    names = ("a sample without the LoRA", "the same noise with it")
    samples = [figure(image, name) for image, name in zip(replay.samples, names, strict=True)]
    if any(factors.up.any() for factors in subject.edit.lora.unet.values()):
        answer = (
            "On the same noise at 20 timesteps the LoRA lowers the loss on this image by "
            f"{100 * (1 - replay.lora_loss):.1f} %. A model that knew such images has little to learn; "
            "on photos others measured hardly any movement without one."
        )
    else:
        answer = "This run has no trained LoRA, so both samples and both losses are the same."
    return Section(
        "lora",
        "LoRA: learn this one image",
        "The weights of the UNet stay; beside each attention projection a product of two thin matrices "
        "learns. It trains on the denoising loss of this image alone, so that what is moved later keeps "
        "its identity.",
        [excerpt(LoRALayer.forward, "output =", "return"), excerpt(noise_loss, "noisy =", "return")],
        "Both samples below start from the same fresh noise. Which will look more like the image, and how "
        "much?",
        row(figure(subject.original, "the image"), *samples),
        answer,
        r"L_{\text{ft}}(z, \Delta\theta) = \E_{\epsilon, t} \| \epsilon - "
        r"\epsilon_{\theta + \Delta\theta}(\alpha_t z + \sigma_t \epsilon) \|_2^2",
    )


def inversion(subject: Subject) -> Section:
    config = subject.config
    levels = [figure(image, name) for name, image in subject.replay.levels]
    back = images.resize(subject.edit.reconstruction, subject.size)
    quality = psnr(subject.edit.reconstruction, subject.image)
    return Section(
        "inversion",
        "Inversion: back to noise, without chance",
        "DDIM steps without added noise can be walked upward, each asking the UNet which noise is in the "
        f"latent. After {config.levels} of {config.steps} steps the layout is still there but free "
        "to change.",
        [excerpt(invert, "for level", "yield"), excerpt(Schedule.step, "clean =", "return")],
        "After which of these levels can you no longer tell what the image shows?",
        row(*levels)
        + row(figure(subject.original, "the image"), figure(back, f"up and down again, {quality:.1f} dB")),
        f"Walking down again without a drag returns the image at {quality:.1f} dB, autoencoder included. "
        "No guidance is used: it would pull both walks away from the latents that the image really has.",
        r"z_{t+1} = \sqrt{\bar\alpha_{t+1}} \frac{z_t - \sqrt{1 - \bar\alpha_t} \, \epsilon_\theta}"
        r"{\sqrt{\bar\alpha_t}} + \sqrt{1 - \bar\alpha_{t+1}} \, \epsilon_\theta",
    )


def features(subject: Subject) -> Section:
    edit = subject.edit
    handles = (edit.task.handles, edit.steps[-1].handles)
    rows = []
    for colors, name, cells in zip(subject.replay.colors, ("original", "edit"), handles, strict=True):
        maps = []
        for number, image in enumerate(colors, 1):
            marks = "".join(dot(cell, "handle") for cell in cells)
            label = f"block {number}, {name}" + (", tapped" if number == edit.config.block else "")
            maps.append(figure(image, label, marks, edit.task.grid, cells=True))
        rows.append(row(*maps))
    return Section(
        "features",
        "Features: what the UNet knows of each place",
        "On the way to the noise, the UNet describes every place of the latent by a vector. "
        f"The drag reads the vectors of up block {edit.config.block}, enlarged to half the image's size.",
        [excerpt(observer, "noise, features", "enlarged =")],
        "One block knows only where objects are, another only edges. In which would you look for a point "
        "again?",
        "".join(rows),
        "The colors are three principal components over both images of a block: equal colors mean equal "
        "features. Look for the block in which the object keeps its color while it moves.",
        r"F(z_t) = \text{up block " + str(edit.config.block) + r" of } \epsilon_\theta(z_t, t)",
    )


def warped_start(subject: Subject) -> Section:
    replay = subject.replay
    cells = replay.object_cells
    small = images.resize(subject.image, (cells.shape[1], cells.shape[0]))
    pale = Image.blend(small, Image.new("RGB", small.size, images.WHITE), 0.65)
    selected = Image.composite(small, pale, Image.fromarray((cells.cpu().numpy() * 255).astype("uint8")))
    figures = [figure(selected, f"handle 1's object: {count(int(cells.sum()), 'cell')}", cells=True)]
    names = ("predicted before the warp", "and after it")
    figures += [figure(m.image, name) for m, name in zip(replay.moments[:2], names, strict=False)]
    moved = "Here nothing was moved, as the mask cuts the object."
    if replay.moved:
        moved = "Here these cells were carried to the target in one stroke."
    return Section(
        "start",
        "A start that is already near",
        "Not in the paper: before the first update the default moves the objects under the handles in the "
        "noisy latent. Features decide what belongs to an object; its surroundings fill what it uncovers.",
        [excerpt(warp, "source = fill", "warped =")],
        "The warp takes what connects to the handle and looks more like it than like what is outside. "
        "Which part of the image will that be?",
        row(*figures),
        f"{moved} Denoising must repair the seams, and motion supervision brings the rest along.",
        r"z_t[q] \leftarrow z_t[q - (g_i - h_i)]"
        "\n"
        r"\text{where } q - (g_i - h_i) \text{ belongs to the object}",
    )


def around(cells: Sequence[Cell], margin: float, grid: Sequence[int]) -> tuple[float, float, float, float]:
    """Left, top, width, and height of a square around cells, within the grid if it fits."""
    spans = [(min(axis) - margin, max(axis) + 1 + margin) for axis in zip(*cells, strict=True)]
    side = min(max(high - low for low, high in spans), *grid)
    corner = [(low + high - side) / 2 for low, high in spans]
    top, left = (min(max(at, 0), whole - side) for at, whole in zip(corner, grid, strict=True))
    return left, top, side, side


def patches(subject: Subject, moment: Moment) -> str:
    """The supervised patches at a state, and where the next update pulls them, around the first drag."""
    task = subject.edit.task
    radius = subject.config.motion_radius
    marks = drags(moment.step.handles, task.targets)
    for at, to in zip(moment.step.handles, task.targets, strict=True):
        low, high = window(at, radius, task.grid)
        marks += box(low, high, "patch")
        if (offset := loop.pull(at, to, subject.config)) is not None:
            down, right = offset
            low, high = (Cell(row + down, column + right) for row, column in (low, high))
            marks += box(low, high, "ahead")
    ends = moment.step.handles[0], task.targets[0]
    view = around(ends, 4 * radius + 4 + math.dist(*ends) / 2, task.grid)
    label = f"state {moment.index}: the patch, and where it is pulled"
    return figure(moment.image, label, marks, task.grid, view=view)


def supervision(subject: Subject) -> Section:
    moments = subject.replay.moments
    config = subject.config
    original = config.motion_reference == "start"
    losses = [(i, step.loss) for i, step in enumerate(subject.edit.steps) if step.loss is not None]
    chart = plot([Curve("both terms", losses)], "update", "loss") if losses else ""
    trend = "Without an update there is no loss"
    if losses:
        trend = f"Over the drag the loss went from {losses[0][1]:.1f} to {losses[-1][1]:.1f}"
    states = (moments[0], moments[len(moments) // 2])
    return Section(
        "supervision",
        "Motion supervision: the pull",
        "The features one small step d ahead of the handle should become what they are at the handle "
        f"{'in the original' if original else 'now'}. The second term asks the latent outside the mask, one "
        "DDIM step down, to stay.",
        [
            excerpt(loop.motion_loss, "offset =", "total = total"),
            excerpt(loop.pull, "distance =", "return ["),
            excerpt(supervisor, "return loss +", "return loss +"),
        ],
        "Each update should lower the first term. Will it be zero when the handle has arrived?",
        row(*(patches(subject, moment) for moment in states)) + chart,
        f"{trend}; a handle that has arrived is "
        f"{'held there' if config.hold_steps else 'not pulled any more'}. Whenever a handle advances, the "
        "frame advances too, so the loss can jump up again.",
        r"L_{\text{ms}} = \sum_i \sum_{q \in \Omega(h_i^k, r_1)} \| F_{q + d_i}(\hat z_t^k) - "
        + (r"F_{q - h_i^k + h_i^0}(z_t)" if original else r"\sg(F_q(\hat z_t^k))")
        + " \\|_1\n"
        + r"+ \lambda \| (\hat z_{t-1}^k - \sg(\hat z_{t-1}^0)) \odot (1 - M) \|_1",
    )


def tracking_map(subject: Subject, moment: Moment, dark: float) -> str:
    """Distances to the first handle's feature at a state, with the window and the cell that is nearest in it.

    dark: the distance that is darkest.
    """
    edit = subject.edit
    before = edit.steps[max(moment.index - 1, 0)].handles[0]
    if moment.index == 1 and subject.replay.moved:
        before = snap(edit.task.targets[0], edit.task.grid)  # where the warp left the handle
    start = edit.task.handles[0]
    marks = box(*window(before, subject.config.track_radius, edit.task.grid), "window")
    marks += dot(edit.task.targets[0], "target") + box(start, start, "origin")
    marks += dot(moment.step.handles[0], "handle")
    label = f"state {moment.index}, level {moment.step.level}"
    return figure(heat(-moment.distances, -dark, 0), label, marks, edit.task.grid, cells=True)


def darkest(moments: Sequence[Moment]) -> float:
    """The distance that is darkest in the maps of these states."""
    return max(float(moment.distances.quantile(0.5)) for moment in moments)


def tracking(subject: Subject) -> Section:
    moments = subject.replay.moments
    states = [moments[i] for i in sorted({0, len(moments) // 2, len(moments) - 1})]
    side = 2 * subject.config.track_radius + 1
    last = states[-1].distances
    at = states[-1].step.handles[0]
    whole = float(last[int(at.row), int(at.column)]) <= float(last.min()) + 1e-6
    best = "the best match of the whole map" if whole else "the best match of its window only"
    return Section(
        "tracking",
        "Point tracking: where is the handle now?",
        "After each update the method looks for the handle: it compares every cell of a window with the "
        f"handle's original feature. The nearest, among at most {side} x {side} cells, is the new handle.",
        [excerpt(loop.track, "for handle", "append(")],
        "Bright cells resemble the handle of the original. Is the brightest cell of the image always in "
        "the window?",
        row(*(tracking_map(subject, moment, darkest(states)) for moment in states)),
        "Bright is near; the frame is the window, the red disc its arg-min, the small square the handle's "
        f"first place. At the end the handle sits on {best}: tracking compares features and cannot know "
        "what was meant.",
        r"h_i^{k+1} = \argmin_{q \in \Omega(h_i^k, r_2)} \| F_q(\hat z_t^{k+1}) - F_{h_i^0}(z_t) \|_1",
    )


def update(subject: Subject) -> Section:
    edit = subject.edit
    last = edit.steps[-1]
    change = (last.latent - edit.path[last.level]).abs().mean(dim=1)[0]  # (H, W)
    answer = f"At the end the latent has changed by {float(change.mean()):.3f} on average."
    if (mask := edit.task.mask) is not None:
        inside = float((change * mask).sum() / mask.sum())
        outside = float((change * (1 - mask)).sum() / (1 - mask).sum().clamp(min=1))
        answer = (
            f"At the end the mean change is {inside:.3f} inside the mask and {outside:.3f} outside, "
            "where only the mask term holds it."
        )
    return Section(
        "update",
        "The update: what changes in the latent",
        "The only unknown is the latent: its gradient goes through the UNet, whose weights are fixed. "
        f"Adam takes steps of about {edit.config.drag_lr:g} in every element, however small its gradient.",
        [excerpt(loop.drag, "loss = supervise", "yield")],
        "The loss looks at a few cells around the handle. Will the latent change only there?",
        row(
            figure(
                heat(change, 0), "change of the latent at the end", subject.drags, edit.task.grid, cells=True
            )
        ),
        f"{answer} Every feature depends on all of the latent, so a pull at one point reaches everywhere.",
        r"\hat z_t^{k+1} = \hat z_t^k - \eta \cdot "
        r"\frac{\partial L_{\text{ms}}(\hat z_t^k)}{\partial \hat z_t^k}",
    )


def frame(subject: Subject, moment: Moment, dark: float) -> str:
    """One state for the slider: the predicted image with trails, and the first handle's map."""
    edit = subject.edit
    index = moment.index
    paths = zip(edit.paths, edit.targets, strict=True)
    remaining = ", ".join(f"{math.dist(path[index], target):.1f}" for path, target in paths)
    loss = "no update yet at this level" if moment.step.loss is None else f"loss {moment.step.loss:.1f}"
    note = f"level {moment.step.level}, {loss}, {remaining} pixels to go"
    label = f"state {index} of {len(edit.steps) - 1}, predicted"
    figures = figure(moment.image, label, subject.trails(index), edit.task.grid)
    figures += tracking_map(subject, moment, dark)
    return f'<div class="frame">{row(figures)}<p class="note">{note}</p></div>'


def steps(subject: Subject) -> Section:
    edit = subject.edit
    moments = subject.replay.moments
    dark = darkest(moments)
    frames = "".join(frame(subject, moment, dark) for moment in moments)
    slider = f'<input type="range" min="0" max="{len(moments) - 1}" value="0" aria-label="state of the drag">'
    levels = len({step.level for step in edit.steps})
    if edit.config.warp_start or edit.config.drag_levels > 1:
        lead = (
            "The paper makes all updates at one noise level; the default alternates a few updates with one "
            "denoising step. Each step down brings the latent back to what the UNet knows, and each level "
            "has a new optimizer."
        )
        code = excerpt(gooddrag, "last = yield from", "handles = last")
        formula = r"\hat z_t^0 \leftarrow \hat z_{t-1}^K \text{ one level further down}"
    else:
        lead = "All updates are made at one noise level, as in the paper. The rest is denoising."
        code = excerpt(dragdiffusion, "level =", "return")
        formula = r"\hat z_t^0 = z_t"
    return Section(
        "steps",
        "The drag, state by state",
        lead,
        [code],
        "Does the object follow its handle, or does the handle run ahead of it? Then move the slider.",
        f'<div class="slider">{slider}{frames}</div>',
        f"{count(len(edit.losses), 'update')} at {count(levels, 'noise level')}; here are {len(moments)} of "
        f"{len(edit.steps)} states. "
        + ("Every handle arrived." if edit.arrived else "Not every handle arrived."),
        formula,
    )


def control(subject: Subject) -> Section:
    replay = subject.replay
    outside = None if subject.mask is None else ~subject.mask.cpu().numpy()
    alone = images.resize(replay.uncontrolled, subject.image.size)
    near, apart = (psnr(image, subject.image, outside) for image in (subject.edit.raw, alone))
    where = "As a whole" if outside is None else "Outside the mask"
    names = ((subject.edit.raw, "with the original's keys and values"), (replay.uncontrolled, "without"))
    both = [figure(images.resize(image, subject.size), name) for image, name in names]
    return Section(
        "control",
        "Reference-latent-control: ask the original",
        "While denoising, self-attention of the edit uses the keys and values of the original, which is "
        "denoised beside it. The edit decides what stands where; the original supplies how it looks.",
        [
            excerpt(denoise, "noise, _, keys_values", "edits[i] ="),
            excerpt(Attention.forward, "key, value", "return"),
        ],
        "Denoised without the original, from the same dragged latent, what will differ?",
        row(*both),
        f"{where} the edit, before any pasting, keeps the original at {near:.1f} dB with the original's "
        f"keys and values and at {apart:.1f} dB without.",
        r"\text{Attention}(Q, K^0, V^0) = \softmax(\frac{Q {K^0}^\top}{\sqrt{d}}) V^0",
    )


def carried(subject: Subject) -> Section:
    edit = subject.edit
    small, source = (images.resize(image, subject.size) for image in (edit.raw, edit.reconstruction))
    points = edit.window.enter(edit.handles), edit.window.enter(edit.targets)
    *moved, (_, still) = parts(source, small, *points, edit.window.size)
    along = torch.stack([weight for _, weight in moved]).sum(0)
    both = [
        figure(images.resize(image, subject.size), name)
        for image, name in (
            (edit.raw, "the edit, decoded"),
            (edit.image, "with the original's pixels"),
        )
    ]
    return Section(
        "detail",
        "The original's detail",
        "The decoder cannot return the finest detail, and an edit that is enlarged to the image's size is a "
        "blur. But most of an edit is the original, still or moved along with an object: there its own "
        "pixels take the edit's place.",
        [excerpt(explain, "misfits =", "uncovered |=")],
        "Where does the original explain the edit, and where must the edit speak for itself?",
        row(figure(heat(along, 0, 1), "moved"), figure(heat(still, 0, 1), "still"), *both),
        f"The moved original explains {along.mean():.0%} and the still one {still.mean():.0%}. What an "
        "object uncovers is always the edit: the original has never shown it.",
        r"C_d = \frac{| E - R_d |}{\tau + 2 | \nabla R_d |} \text{, moved where } C_d < \frac{1}{2} C_0",
    )


def result(subject: Subject) -> Section:
    edit = subject.edit
    curves = []
    for number, (path, target) in enumerate(zip(edit.paths, edit.targets, strict=True), 1):
        curves.append(Curve(f"handle {number}", [(i, math.dist(at, target)) for i, at in enumerate(path)]))
    remain = ", ".join(
        f"handle {number} has {remaining:.1f} of {distance:.1f} pixels left"
        for number, (remaining, distance) in enumerate(zip(edit.remaining, edit.distances, strict=True), 1)
    )
    final = images.resize(edit.image, subject.size)
    pasting = "nothing is pasted over it"
    formula = r"x = D(\hat z_0)"
    if subject.mask is not None and edit.config.keep_background:
        pasting = "the default then puts the original's pixels back outside the mask"
        formula = r"x = M \odot D(\hat z_0) + (1 - M) \odot x^0"
    return Section(
        "result",
        "The result",
        f"What the decoder returns is the edit; {pasting}. "
        "The paths are what tracking believed, not what a ruler on the image would measure.",
        [excerpt(drag_edit, "reconstruction =", "return")],
        "Where will the edit differ from what you had in mind?",
        row(figure(final, "edit with the paths", subject.trails(len(edit.steps) - 1), edit.task.grid))
        + plot(curves, "state", "pixels to the target"),
        f"After {count(len(edit.losses), 'update')} {remain}. Compare the object itself with the target "
        "before you believe it.",
        formula,
    )
