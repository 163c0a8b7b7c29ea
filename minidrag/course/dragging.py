"""Exercises on the drag: sampling, the two losses, tracking, and the alternation with denoising."""

from dataclasses import replace

import torch
from torch import Generator, Tensor

from minidrag.config import EditConfig
from minidrag.course.diffusion import toy_denoiser
from minidrag.course.exercise import Exercise, Inputs, Slip, normal, whole
from minidrag.method.ddim import invert
from minidrag.method.drag import Cell, Origin, View, background_loss, motion_loss, sample, track
from minidrag.method.dragdiffusion import Task
from minidrag.method.gooddrag import gooddrag


def sample_inputs(rng: Generator) -> list[Inputs]:
    features = normal(rng, 3, 5, 7, grad=True)
    size = torch.tensor([5.0, 7.0], dtype=torch.float64)
    inside = torch.rand(9, 2, generator=rng, dtype=torch.float64) * (size - 1)
    around = torch.rand(12, 2, generator=rng, dtype=torch.float64) * (size + 4) - 2.5
    corners = torch.tensor([[0, 0], [4, 6], [0, 6], [4, 0], [4, 2.5], [1.5, 6]], dtype=torch.float64)
    return [{"features": features, "points": points} for points in (inside, around, corners)]


BILINEAR = Exercise(
    "bilinear",
    sample,
    sample_inputs,
    (
        Slip(
            "row and column swapped",
            "A point is (row, column): the first number goes down, the second to the right.",
            {"points.clamp(min=0)": "points.flip(1).clamp(min=0)"},
        ),
        Slip(
            "zero beyond the border",
            "A point beyond the border gets the features of the nearest point on the border.",
            {
                "(features: Tensor, points: Tensor) -> Tensor:": "(features, points):\n"
                "    features = F.pad(features, (1, 1, 1, 1))\n    points = points + 1",
            },
        ),
        Slip(
            "weights exchanged",
            "The nearer a neighbor, the larger its weight: the lower row has `down`, the upper row 1 - down.",
            {"(points - corner)": "(corner + 1 - points)"},
        ),
        Slip(
            "nearest cell",
            "Mix the four cells around the point; rounding would make the loss jump.",
            {"(points - corner)": "(points - corner).round()"},
        ),
        Slip(
            "half a cell off",
            "Whole numbers are cell centers here, so nothing is to be added or subtracted.",
            {"points.clamp(min=0)": "(points - 0.5).clamp(min=0)"},
        ),
        Slip(
            "no gradient",
            "The loss needs the gradient of the features: leave out detach, no_grad, and item.",
            {"    last =": "    features = features.detach()\n    last ="},
        ),
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


MOTION_LOSS = Exercise(
    "motion_loss",
    motion_loss,
    motion_inputs,
    (
        Slip(
            "no stop-gradient",
            "Detach F_q, or the patch at the handle is pulled back as hard as the one ahead is pulled on.",
            {"features.detach()": "features"},
        ),
        Slip(
            "stop-gradient on the wrong patch",
            "The patch ahead is to change, so its gradient has to flow; F_q at the handle is fixed.",
            {"features.detach()": "features", "sample(features": "sample(features.detach()"},
        ),
        Slip(
            "no gradient at all",
            "Detach F_q alone: the features one step ahead need their gradient.",
            {"sample(features": "sample(features.detach()"},
        ),
        Slip(
            "handle and target swapped",
            "d_i points from the handle to the target, g_i - h_i.",
            {"pull(handle, target": "pull(target, handle"},
        ),
        Slip(
            "row and column swapped in d_i",
            "Cells and features both have the row first.",
            {"new_tensor(offset)": "new_tensor(offset[::-1])"},
        ),
        Slip(
            "d_i not of its length",
            "Divide g_i - h_i by its length: the patch moves by config.motion_step, not all the way at once.",
            {"new_tensor(offset)": "new_tensor(target) - cells.new_tensor(handle)"},
        ),
        Slip(
            "sum for mean",
            'With config.motion_loss "mean", take the mean over channels and cells, times the area.',
            {"difference.mean() * area": "difference.sum()"},
        ),
        Slip(
            "mean without the area",
            "The mean is multiplied by the number of cells in a whole patch, (2 r_1 + 1)^2.",
            {"difference.mean() * area": "difference.mean()"},
        ),
        Slip(
            "handles that have arrived still pull",
            "Leave out a handle that is nearer to its target than the tolerance.",
            {"target, config)": "target, EditConfig(motion_step=config.motion_step, tolerance=0.0))"},
        ),
        Slip(
            "original read at the present handle",
            "The handle's content is at reference.handles[i] in the reference.",
            {"(cells.new_tensor(start) - cells.new_tensor(handle))": "0"},
        ),
    ),
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
            {
                "origin.view.features": "features.detach()",
                "int(row), int(column)": "int(handle.row), int(handle.column)",
            },
        ),
        Slip(
            "reference follows the handle",
            "F_{h_i^0}(z_t) is read at origin.handles[i], the first place, however far the handle went.",
            {"int(row), int(column)": "int(handle.row), int(handle.column)"},
        ),
        Slip(
            "window around the first place",
            "The window goes with the handle: it is around h_i^k.",
            {"patch(handle": "patch(Cell(row, column)"},
        ),
        Slip(
            "whole image searched",
            "Only cells at most `radius` rows and columns away: farther off there may be a twin.",
            {"radius, features)": "1000, features)"},
        ),
        Slip(
            "reference and search in the same image",
            "Take the reference from the original, origin.view.features, and search the present features.",
            {"sample(features.detach()": "sample(origin.view.features"},
        ),
        Slip(
            "row and column swapped",
            "A Cell is (row, column).",
            {"tolist()": "tolist()[::-1]"},
        ),
    ),
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
            {"1 - mask.to(previous)": "mask.to(previous)"},
        ),
        Slip(
            "mean for sum",
            "|| ||_1 is the sum of the absolute values.",
            {"sum()": "mean()"},
        ),
        Slip(
            "square for absolute value",
            "|| ||_1 is the sum of the absolute values, not of the squares.",
            {"abs()": "square()"},
        ),
        Slip(
            "no absolute value",
            "Without it, changes of opposite sign cancel.",
            {".abs()": ""},
        ),
        Slip(
            "no gradient",
            "z_{t-1} is to be held back, so its gradient has to flow: leave out detach, no_grad, and item.",
            {"(previous - original)": "(previous.detach() - original)"},
        ),
    ),
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


ALTERNATION_STEP = Exercise(
    "alternation",
    gooddrag,
    alternation_inputs,
    (
        Slip(
            "no step down",
            "The next level begins with last.previous, the latent one DDIM step down, not with last.latent.",
            {"last.previous": "last.latent"},
        ),
        Slip(
            "original at the wrong level",
            "At every level compare with the original at that level, path[level].",
            {"path[level]": "path[top]"},
        ),
        Slip(
            "one level too low",
            "path[0] is the clean latent, so the last level is len(path) - 1.",
            {"len(path) - 1": "len(path) - 2"},
        ),
        Slip(
            "handles start anew at every level",
            "The next level goes on from last.handles.",
            {"handles = last.handles": "handles = task.handles"},
        ),
        Slip(
            "original's handles move along",
            "In the original the handles are at task.handles, whatever the level.",
            {"Origin(task.handles": "Origin(handles"},
        ),
        Slip(
            "handles that stand still go unnoticed",
            "Stop after the third level in a row in which no handle moved.",
            {"idle == PATIENCE": "False"},
        ),
    ),
    returns=("steps",),
)
