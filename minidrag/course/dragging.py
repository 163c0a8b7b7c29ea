"""Exercises on the drag: sampling, the two losses, tracking, and the alternation with denoising."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad

from minidrag.config import EditConfig
from minidrag.course.diffusion import toy_denoiser
from minidrag.course.exercise import Exercise, Function, Inputs, Slip, normal, whole
from minidrag.method import drag as loop
from minidrag.method.ddim import Denoiser, invert
from minidrag.method.drag import (
    Cell,
    Cells,
    Origin,
    Step,
    View,
    background_loss,
    motion_loss,
    patch,
    pull,
    sample,
    track,
)
from minidrag.method.dragdiffusion import Task, observer, supervisor
from minidrag.method.gooddrag import PATIENCE, gooddrag


def sample_inputs(rng: Generator) -> list[Inputs]:
    features = normal(rng, 3, 5, 7, grad=True)
    size = torch.tensor([5.0, 7.0], dtype=torch.float64)
    inside = torch.rand(9, 2, generator=rng, dtype=torch.float64) * (size - 1)
    around = torch.rand(12, 2, generator=rng, dtype=torch.float64) * (size + 4) - 2.5
    corners = torch.tensor([[0, 0], [4, 6], [0, 6], [4, 0], [4, 2.5], [1.5, 6]], dtype=torch.float64)
    return [{"features": features, "points": points} for points in (inside, around, corners)]


def exchanged(features: Tensor, points: Tensor) -> Tensor:
    """Bilinear sampling with each weight on the wrong neighbor."""
    points = torch.minimum(points.clamp(min=0), points.new_tensor(features.shape[1:]) - 1)
    return sample(features, 2 * points.floor() + 1 - points)


BILINEAR = Exercise(
    "bilinear",
    sample,
    sample_inputs,
    (
        Slip(
            "row and column swapped",
            "A point is (row, column): the first number goes down, the second to the right.",
            lambda features, points: sample(features, points.flip(1)),
        ),
        Slip(
            "zero beyond the border",
            "A point beyond the border gets the features of the nearest point on the border.",
            lambda features, points: sample(pad(features, (1, 1, 1, 1)), points + 1),
        ),
        Slip(
            "weights exchanged",
            "The nearer a neighbor, the larger its weight: the lower row has `down`, the upper row 1 - down.",
            exchanged,
        ),
        Slip(
            "nearest cell",
            "Mix the four cells around the point; rounding would make the loss jump.",
            lambda features, points: sample(features, points.round()),
        ),
        Slip(
            "half a cell off",
            "Whole numbers are cell centers here, so nothing is to be added or subtracted.",
            lambda features, points: sample(features, points - 0.5),
        ),
        Slip(
            "no gradient",
            "The loss needs the gradient of the features: leave out detach, no_grad, and item.",
            lambda features, points: sample(features.detach(), points),
        ),
    ),
    (
        "minidrag.method.drag.sample",
        "minidrag.method.warp.sample",
        "minidrag.detail.sample",
    ),
)


def random_cells(rng: Generator, *cells: tuple[int, int]) -> list[Cell]:
    """Cells, followed by two in the middle of a grid of 9 x 11."""
    inside = [(whole(rng, 2, 6), whole(rng, 2, 8)) for _ in range(2)]
    return [Cell(float(row), float(column)) for row, column in (*cells, *inside)]


def view_of(features: Tensor) -> View:
    """A view of which only the features matter."""
    return View(features, features.new_zeros(()), features.new_zeros(()), 7)


def motion_inputs(rng: Generator) -> list[Inputs]:
    """The paper's settings; a mean, a long step, and targets nearer than it; the original as reference.

    One handle is at a corner and one has arrived.
    """
    paper = EditConfig.paper()
    mean = replace(paper, motion_loss="mean", motion_radius=2, motion_step=2.5, tolerance=0.5)
    calls: list[Inputs] = []
    for config, original in ((paper, False), (mean, False), (mean, True)):
        handles = random_cells(rng, (0, 10), (5, 5))
        away = torch.randint(2, 5, (len(handles), 2), generator=rng).tolist()
        targets = [
            Cell(at.row + down + 0.25, at.column - right)
            for at, (down, right) in zip(handles, away, strict=True)
        ]
        targets[1] = Cell(5.25, 4.75)  # arrived
        if config is mean:  # nearer than the step, and nearer than a cell
            for i, distance in ((2, 1.25), (3, 0.5)):
                targets[i] = Cell(handles[i].row + distance, handles[i].column - distance)
        features = normal(rng, 4, 9, 11, grad=True)
        reference = Origin(handles, view_of(features))
        if original:
            reference = Origin(random_cells(rng, (1, 9), (4, 4)), view_of(normal(rng, 4, 9, 11)))
        calls.append(
            {
                "features": features,
                "handles": handles,
                "targets": targets,
                "reference": reference,
                "config": config,
            }
        )
    return calls


def difference(
    ahead: Tensor, handles: Cells, targets: Cells, reference: Origin, config: EditConfig
) -> Tensor:
    """Motion supervision without any stop-gradient. ahead: features one step ahead."""
    total = ahead.sum() * 0
    for handle, target, start in zip(handles, targets, reference.handles, strict=True):
        if (offset := pull(handle, target, config)) is None:
            continue
        cells = patch(handle, config.motion_radius, ahead)
        before = cells + (cells.new_tensor(start) - cells.new_tensor(handle))
        gap = (
            sample(ahead, cells + cells.new_tensor(offset)) - sample(reference.view.features, before)
        ).abs()
        area = (2 * config.motion_radius + 1) ** 2
        total = total + (gap.sum() if config.motion_loss == "sum" else gap.mean() * area)
    return total


def with_targets(move: Function) -> Function:
    """Motion supervision with a target made of each handle and target."""
    return lambda features, handles, targets, *rest: motion_loss(
        features, handles, [move(*pair) for pair in zip(handles, targets, strict=True)], *rest
    )


def with_settings(**settings: Any) -> Function:
    """Motion supervision with other settings."""
    return lambda features, handles, targets, reference, config: motion_loss(
        features, handles, targets, reference, replace(config, **settings)
    )


def without_area(*inputs: Any) -> Tensor:
    config = inputs[-1]
    area = (2 * config.motion_radius + 1) ** 2 if config.motion_loss == "mean" else 1
    return motion_loss(*inputs) / area


MOTION_LOSS = Exercise(
    "motion_loss",
    motion_loss,
    motion_inputs,
    (
        Slip(
            "no stop-gradient",
            "Detach F_q, or the patch at the handle is pulled back as hard as the one ahead is pulled on.",
            difference,
        ),
        Slip(
            "stop-gradient on the wrong patch",
            "The patch ahead is to change, so its gradient has to flow; F_q at the handle is fixed.",
            lambda features, *rest: difference(features.detach(), *rest),
        ),
        Slip(
            "no gradient at all",
            "Detach F_q alone: the features one step ahead need their gradient.",
            lambda features, *rest: motion_loss(features.detach(), *rest),
        ),
        Slip(
            "handle and target swapped",
            "d_i points from the handle to the target, g_i - h_i.",
            with_targets(lambda at, to: Cell(2 * at.row - to.row, 2 * at.column - to.column)),
        ),
        Slip(
            "row and column swapped in d_i",
            "Cells and features both have the row first.",
            with_targets(lambda at, to: Cell(at.row + to.column - at.column, at.column + to.row - at.row)),
        ),
        Slip(
            "d_i not of its length",
            "Divide g_i - h_i by its length: the patch moves by config.motion_step, not all the way at once.",
            with_settings(motion_step=1e6),
        ),
        Slip(
            "sum for mean",
            'With config.motion_loss "mean", take the mean over channels and cells, times the area.',
            with_settings(motion_loss="sum"),
        ),
        Slip(
            "mean without the area",
            "The mean is multiplied by the number of cells in a whole patch, (2 r_1 + 1)^2.",
            without_area,
        ),
        Slip(
            "handles that have arrived still pull",
            "Leave out a handle that is nearer to its target than the tolerance.",
            with_settings(tolerance=0.0),
        ),
        Slip(
            "original read at the present handle",
            "The handle's content is at reference.handles[i] in the reference.",
            lambda features, handles, targets, reference, config: motion_loss(
                features, handles, targets, reference._replace(handles=handles), config
            ),
        ),
    ),
    ("minidrag.method.dragdiffusion.motion_loss", "minidrag.method.drag.motion_loss"),
    returns=("loss",),
    tolerance=1e-4,  # a direction of float32, as in an edit, is right too
)


def track_inputs(rng: Generator) -> list[Inputs]:
    """Handles that have moved a little; their content lies a little farther still, in one channel changed.

    A cell beside each handle is nearer to it by the sum of squares, and one out of reach is its twin.
    """
    calls: list[Inputs] = []
    for radius in (2, 3):
        starts = random_cells(rng, (0, 0), (8, 10))
        before = normal(rng, 4, 9, 11)
        after = normal(rng, 4, 9, 11)
        steps = torch.randint(1, 3, (len(starts), 2), generator=rng).tolist()
        steps[1] = [-1, -2]  # from the lower right corner
        handles = []
        for start, (down, right) in zip(starts, steps, strict=True):
            handles.append(Cell(start.row + down, start.column + right))
            row, column = map(int, start)
            content = before[:, row, column]
            after[:, (row + down + 5) % 9, (column + right + 6) % 11] = content
            after[:, row + down - 1, column + right] = content + 0.2
            farther = content + torch.tensor([0.5, 0, 0, 0])
            after[:, min(row + 2 * down, 8), min(column + 2 * right, 10)] = farther
        origin = Origin(starts, view_of(before))
        calls.append({"features": after, "handles": handles, "origin": origin, "radius": radius})
    return calls


TRACKING = Exercise(
    "tracking",
    track,
    track_inputs,
    (
        Slip(
            "compared with the present features",
            "Look for the feature that the handle had at first: what is there now matches itself best.",
            lambda features, handles, origin, radius: track(
                features, handles, Origin(handles, view_of(features.detach())), radius
            ),
        ),
        Slip(
            "reference follows the handle",
            "F_{h_i^0}(z_t) is read at origin.handles[i], the first place, however far the handle went.",
            lambda features, handles, origin, radius: track(
                features, handles, origin._replace(handles=handles), radius
            ),
        ),
        Slip(
            "window around the first place",
            "The window goes with the handle: it is around h_i^k.",
            lambda features, handles, origin, radius: track(features, origin.handles, origin, radius),
        ),
        Slip(
            "whole image searched",
            "Only cells at most `radius` rows and columns away: farther off there may be a twin.",
            lambda features, handles, origin, radius: track(features, handles, origin, 1000),
        ),
        Slip(
            "reference and search in the same image",
            "Take the reference from the original, origin.view.features, and search the present features.",
            lambda features, handles, origin, radius: track(origin.view.features, handles, origin, radius),
        ),
        Slip(
            "row and column swapped",
            "A Cell is (row, column).",
            lambda *inputs: [Cell(to.column, to.row) for to in track(*inputs)],
        ),
    ),
    ("minidrag.method.drag.track",),
    returns=("cells",),
    part=Cell,
)


def background_inputs(rng: Generator) -> list[Inputs]:
    shapes = ((5, 7), (3, 4))
    return [
        {
            "previous": normal(rng, 1, 4, *shape, grad=True),
            "original": normal(rng, 1, 4, *shape),
            "mask": (torch.rand(shape, generator=rng) < 0.4).float(),
        }
        for shape in shapes
    ]


BACKGROUND_LOSS = Exercise(
    "background_loss",
    background_loss,
    background_inputs,
    (
        Slip(
            "mask inverted",
            "The mask is 1 where the image may change: 1 - M is what has to stay.",
            lambda previous, original, mask: background_loss(previous, original, 1 - mask),
        ),
        Slip(
            "mean for sum",
            "|| ||_1 is the sum of the absolute values.",
            lambda previous, original, mask: background_loss(previous, original, mask) / previous.numel(),
        ),
        Slip(
            "square for absolute value",
            "|| ||_1 is the sum of the absolute values, not of the squares.",
            lambda previous, original, mask: ((previous - original).square() * (1 - mask.to(previous))).sum(),
        ),
        Slip(
            "no absolute value",
            "Without it, changes of opposite sign cancel.",
            lambda previous, original, mask: ((previous - original) * (1 - mask.to(previous))).sum(),
        ),
        Slip(
            "no gradient",
            "z_{t-1} is to be held back, so its gradient has to flow: leave out detach, no_grad, and item.",
            lambda previous, original, mask: background_loss(previous.detach(), original, mask),
        ),
    ),
    ("minidrag.method.dragdiffusion.background_loss", "minidrag.method.drag.background_loss"),
    returns=("loss",),
)


def alternation_inputs(rng: Generator) -> list[Inputs]:
    """Drags so rough that handles jump and never arrive, one that has arrived, and one that stands still.

    Two of them may go through more levels than there are.
    """
    rough = EditConfig(steps=8, inversion_steps=5, drag_levels=3, drag_steps=1, drag_lr=1.0, warp_start=False)
    rough = replace(rough, motion_radius=1, motion_step=1.0, track_radius=1, scale_radii=False, tolerance=0)
    calls: list[Inputs] = []
    deep = replace(rough, drag_levels=9)
    for config in (rough, deep, replace(rough, tolerance=100), replace(deep, track_radius=0)):
        denoiser = toy_denoiser(rng, config.steps)
        clean = normal(rng, 1, 4, 4, 5)
        path = [clean, *invert(denoiser, clean, config.levels)]
        mask = (torch.rand(4, 5, generator=rng) < 0.7).double()
        handles = random_cells(rng, (1, 9))
        targets = [Cell(8 - row, 9.5 - column) for row, column in handles]
        task = Task(handles, targets, mask, (9, 11))
        calls.append({"denoiser": denoiser, "path": path, "task": task, "config": config})
    return calls


def alternate_with(slip: str) -> Function:
    """The alternation, with a slip."""

    def alternate(denoiser: Denoiser, path: list[Tensor], task: Task, config: EditConfig) -> Iterator[Step]:
        top = len(path) - 1
        latent = path[top]
        handles = task.handles
        supervise = supervisor(task, config)
        idle = 0
        for level in range(top, max(top - config.drag_levels, 0), -1):
            observe = observer(denoiser, level, task, config)
            with torch.no_grad():
                origin = Origin(handles if slip == "moved origin" else task.handles, observe(path[level]))
            last = yield from loop.drag(latent, handles, task.targets, observe, supervise, config, origin)
            moved = last.handles != handles
            moved = moved or loop.all_arrived(last.handles, task.targets, config.tolerance)
            idle = 0 if moved else idle + 1
            if idle == PATIENCE and slip != "tireless":
                return
            latent = last.latent if slip == "not lowered" else last.previous
            handles = task.handles if slip == "forgotten" else last.handles

    return alternate


ALTERNATION_STEP = Exercise(
    "alternation",
    gooddrag,
    alternation_inputs,
    (
        Slip(
            "no step down",
            "The next level begins with last.previous, the latent one DDIM step down, not with last.latent.",
            alternate_with("not lowered"),
        ),
        Slip(
            "original at the wrong level",
            "At every level compare with the original at that level, path[level].",
            lambda denoiser, path, *rest: gooddrag(denoiser, path[-1:] * len(path), *rest),
        ),
        Slip(
            "one level too low",
            "path[0] is the clean latent, so the last level is len(path) - 1.",
            lambda denoiser, path, *rest: gooddrag(denoiser, path[:-1], *rest),
        ),
        Slip(
            "handles start anew at every level",
            "The next level goes on from last.handles.",
            alternate_with("forgotten"),
        ),
        Slip(
            "original's handles move along",
            "In the original the handles are at task.handles, whatever the level.",
            alternate_with("moved origin"),
        ),
        Slip(
            "handles that stand still go unnoticed",
            "Stop after the third level in a row in which no handle moved.",
            alternate_with("tireless"),
        ),
    ),
    ("minidrag.edit.gooddrag", "minidrag.method.gooddrag.gooddrag"),
    returns=("steps",),
)
