"""Latent optimization against slow references: the equations as loops over cells, gradients by hand."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.testing import assert_close

import minidrag.method.dragdiffusion as dragdiffusion_module
from minidrag.config import EditConfig
from minidrag.edit import watch
from minidrag.method import drag
from minidrag.method.ddim import KeysValues, Schedule
from minidrag.method.drag import (
    Cell,
    Origin,
    Step,
    View,
    arrived,
    background_loss,
    motion_loss,
    patch,
    sample,
    track,
)
from minidrag.method.dragdiffusion import Task, dragdiffusion, observe
from minidrag.networks.unet import UNet, UNetConfig

SCHEDULE = Schedule()
LEVEL, TIME, BELOW = 35, 681, 661  # of the dragged latent, and the timestep below
TEXT = torch.linspace(-1, 1, 77 * 8, dtype=torch.float64).reshape(1, 77, 8)
Output = tuple[Tensor, list[Tensor], KeysValues]
# From a latent to its feature map and the latent one step down, both without a graph, and a function that
# pulls gradients with respect to the two back to the latent.
Look = Callable[[Tensor], tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]]


def exactly(found: Tensor, wanted: Tensor | float) -> None:
    assert_close(found, torch.as_tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-12)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# The slow references.


def corners(row: float, column: float, height: int, width: int) -> list[tuple[int, int, float]]:
    """The four cells around a point and their bilinear weights; the map goes on as it is at its border."""
    top, left = math.floor(row), math.floor(column)
    down, across = row - top, column - left
    four = (
        (top, left, (1 - down) * (1 - across)),
        (top, left + 1, (1 - down) * across),
        (top + 1, left, down * (1 - across)),
        (top + 1, left + 1, down * across),
    )
    return [(min(max(r, 0), height - 1), min(max(c, 0), width - 1), weight) for r, c, weight in four]


def origin_of(features: Tensor, handles: Sequence[Cell]) -> Origin:
    """Origin with these features; nothing else of its view is used."""
    return Origin(handles, View(features, torch.empty(0), torch.empty(0), LEVEL))


def slow_patch(center: Cell, radius: int, height: int, width: int) -> list[tuple[int, int]]:
    around = range(-radius, radius + 1)
    cells = [(int(center[0]) + down, int(center[1]) + across) for down in around for across in around]
    return [(row, column) for row, column in cells if 0 <= row < height and 0 <= column < width]


def slow_motion(
    features: Tensor,
    handles: Sequence[Cell],
    targets: Sequence[Cell],
    config: EditConfig,
    origin: Origin | None = None,
) -> tuple[float, Tensor]:
    """First term of eq. 3 and its gradient, to which F_q itself contributes nothing.

    origin: read F_q there, as far from its handle as q is from the handle now.
    """
    (channels, height, width), total, gradient = features.shape, 0.0, torch.zeros_like(features)
    source, begun = (origin.view.features, origin.handles) if origin else (features, handles)
    for (row, column), target, began in zip(handles, targets, begun, strict=True):
        down, across = target[0] - row, target[1] - column
        way = math.sqrt(down**2 + across**2)
        if way == 0 or way < config.tolerance:
            continue
        length = way / min(config.motion_step, max(way, 1))
        back = began[0] - row, began[1] - column
        cells = slow_patch((row, column), config.motion_radius, height, width)
        area = (2 * config.motion_radius + 1) ** 2
        weight = area / (len(cells) * channels) if config.motion_loss == "mean" else 1.0
        for r, c in cells:
            ahead = corners(r + down / length, c + across / length, height, width)
            behind = corners(r + back[0], c + back[1], height, width)
            for channel in range(channels):
                values, kept = features[channel], source[channel]
                difference = sum(share * values[i, j].item() for i, j, share in ahead)
                difference -= sum(share * kept[i, j].item() for i, j, share in behind)
                total += weight * abs(difference)
                sign = 0 if abs(difference) < 1e-12 else math.copysign(1, difference)
                for i, j, share in ahead:
                    gradient[channel, i, j] += weight * share * sign
    return total, gradient


def slow_change(lower: Tensor, original: Tensor, mask: Tensor) -> tuple[float, Tensor]:
    """Second term of eq. 3 without lambda, and its gradient."""
    total, gradient = 0.0, torch.zeros_like(lower)
    for channel in range(lower.shape[1]):
        for row in range(lower.shape[2]):
            for column in range(lower.shape[3]):
                place, outside = (0, channel, row, column), 1 - mask[row, column].item()
                difference = (lower[place] - original[place]).item()
                total += abs(difference) * outside
                gradient[place] = outside * (difference > 0) - outside * (difference < 0)
    return total, gradient


def slow_track(features: Tensor, start: Tensor, handle: Cell, radius: int) -> Cell:
    """Equation 5."""
    best, nearest = math.inf, handle
    for row, column in slow_patch(handle, radius, *features.shape[1:]):
        pairs = zip(features[:, row, column].tolist(), start.tolist(), strict=True)
        distance = sum(abs(now - then) for now, then in pairs)
        if distance < best:
            best, nearest = distance, Cell(float(row), float(column))
    return nearest


def slow_drag(
    look: Look,
    latent: Tensor,
    handles: list[Cell],
    targets: list[Cell],
    mask: Tensor | None,
    config: EditConfig,
    steps: int,
) -> tuple[Tensor, list[list[Cell]], list[float], list[Tensor]]:
    """Updates by the equations and by Adam (arXiv 1412.6980, algorithm 1); returns the gradients last."""
    first, second = torch.zeros_like(latent), torch.zeros_like(latent)
    paths, losses, gradients = [[handle] for handle in handles], [], []
    features, original, _ = look(latent)
    starts = [features[:, int(row), int(column)] for row, column in handles]
    begun = origin_of(features, handles) if config.motion_reference == "start" else None
    for step in range(1, steps + 1):
        features, lower, pull = look(latent)
        loss, upon_features = slow_motion(features, [path[-1] for path in paths], targets, config, begun)
        upon_lower = torch.zeros_like(lower)
        if mask is not None:
            change, upon_lower = slow_change(lower, original, mask)
            loss, upon_lower = loss + config.mask_weight * change, config.mask_weight * upon_lower
        gradient = pull(upon_features, upon_lower)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        mean, deviation = first / (1 - 0.9**step), (second / (1 - 0.999**step)).sqrt()
        latent = latent - config.drag_lr * mean / (deviation + 1e-8)
        losses.append(loss)
        gradients.append(gradient)
        features, _, _ = look(latent)
        for path, start in zip(paths, starts, strict=True):
            path.append(slow_track(features, start, path[-1], config.track_radius))
    return latent, paths, losses, gradients


# Networks to drag in.


class Linear:
    """A stand-in for the UNet: noise and each block's features are matrices times a cell of the latent."""

    def __init__(self, channels: int = 3):
        self.mixes = [random(channels, 4, seed=10 + block) for block in range(4)]
        self.noise = 0.3 * random(4, 4, seed=20)

    def __call__(
        self, latent: Tensor, timestep: int, text: Tensor, keys_values: KeysValues | None = None
    ) -> Output:
        assert timestep == TIME and text is TEXT and keys_values is None
        features = [torch.einsum("ck,bkhw->bchw", mix, latent) for mix in self.mixes]
        return torch.einsum("ck,bkhw->bchw", self.noise, latent), features, []

    def look(self, block: int, grid: tuple[int, int]) -> Look:
        """The same by hand, backwards too."""
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        keep, add = SCHEDULE.step(one, zero, TIME, BELOW), SCHEDULE.step(zero, one, TIME, BELOW)
        mix, step = self.mixes[block - 1], keep * torch.eye(4, dtype=torch.float64) + add * self.noise

        def look(latent: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]:
            down, across = (stretching(*sizes) for sizes in zip(latent.shape[2:], grid, strict=True))
            features = torch.einsum("ck,khw,rh,sw->crs", mix, latent[0], down, across)

            def pull(upon_features: Tensor, upon_lower: Tensor) -> Tensor:
                moved = torch.einsum("ck,crs,rh,sw->khw", mix, upon_features, down, across)
                return moved[None] + torch.einsum("ck,bchw->bkhw", step, upon_lower)

            return features, torch.einsum("ck,bkhw->bchw", step, latent), pull

        return look


def stretching(cells: int, size: int) -> Tensor:
    """(size, cells), the matrix that enlarges a row of cells bilinearly, border on border."""
    matrix = torch.zeros(size, cells, dtype=torch.float64)
    for i in range(size):
        for _, at, weight in corners(0, (i + 0.5) * cells / size - 0.5, 1, cells):
            matrix[i, at] += weight
    return matrix


def same_features(
    latent: Tensor, timestep: int, text: Tensor, keys_values: KeysValues | None = None
) -> Output:
    """Stand-in for the UNet that predicts no noise; each block's features are the latent."""
    return latent * 0, [latent] * 4, []


def real_unet() -> UNet:
    torch.manual_seed(0)
    channels = (8, 8, 12, 12)
    config = UNetConfig(
        block_out_channels=channels,
        heads=(2,) * 4,
        layers_per_block=1,
        cross_attention_dim=8,
        norm_num_groups=4,
    )
    return UNet(config).double().requires_grad_(False)


def look_at(unet: UNet, block: int, grid: tuple[int, int]) -> Look:
    def look(latent: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]:
        latent = latent.clone().requires_grad_()
        noise, features, _ = unet(latent, TIME, TEXT)
        lower = SCHEDULE.step(latent, noise, TIME, BELOW)
        down, across = (stretching(*sizes) for sizes in zip(features[block - 1].shape[2:], grid, strict=True))
        enlarged = torch.einsum("chw,rh,sw->crs", features[block - 1][0], down, across)

        def pull(*gradients: Tensor) -> Tensor:
            return torch.autograd.grad((enlarged, lower), latent, gradients)[0]

        return enlarged.detach(), lower.detach(), pull

    return look


class Drag(NamedTuple):
    """Steps of a drag, transposed."""

    latent: Tensor
    paths: list[list[Cell]]
    losses: list[float]
    predicted: list[Tensor]
    arrived: bool

    @classmethod
    def of(cls, steps: Iterable[Step], targets: Sequence[Cell], config: EditConfig) -> "Drag":
        steps = list(watch("drag", steps, config.drag_steps + 1))
        paths = [list(path) for path in zip(*[step.handles for step in steps], strict=True)]
        losses, predicted = [step.loss for step in steps[1:]], [step.predicted for step in steps]
        there = all(arrived(path[-1], to, config.tolerance) for path, to in zip(paths, targets, strict=True))
        assert steps[0].loss is None and all(step.level == LEVEL for step in steps)
        return cls(steps[-1].latent, paths, [loss for loss in losses if loss is not None], predicted, there)


def run(
    unet: Any,
    latent: Tensor,
    handles: Sequence[tuple[float, float]],
    targets: Sequence[tuple[float, float]],
    mask: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    **settings: Any,
) -> Drag:
    """`dragdiffusion`, by default on a grid of the latent's own size."""
    starts, ends = ([Cell(*point) for point in points] for points in (handles, targets))
    task, config = (
        Task(starts, ends, mask, grid or (latent.shape[2], latent.shape[3])),
        EditConfig(**settings),
    )
    path = [latent * math.nan] * LEVEL + [latent]
    return Drag.of(dragdiffusion(unet, SCHEDULE, path, TEXT, task, config), ends, config)


# Reading between cells.


def test_sampling_is_the_four_corner_formula_inside_on_and_beyond_every_border_with_gradients() -> None:
    features = random(3, 4, 5).requires_grad_()
    steps = [i * 0.5 for i in range(-3, 13)] + [-0.3, 0.1, 2.7, 3.9, 4.2]
    points = [(row, column) for row in steps for column in steps]
    found = sample(features, torch.tensor(points, dtype=torch.float64))
    upon, gradient, wanted = random(3, len(points), seed=1), 0 * features, random(3, len(points)) * 0
    for place, point in enumerate(points):
        for row, column, weight in corners(*point, 4, 5):
            wanted[:, place] += weight * features[:, row, column]
            gradient[:, row, column] += weight * upon[:, place]
    exactly(found, wanted)
    exactly(torch.autograd.grad(found, features, upon)[0], gradient)


def test_sampling_at_cells_gives_the_cells_bit_for_bit() -> None:
    features = random(3, 4, 5)
    cells = torch.cartesian_prod(torch.arange(4), torch.arange(5)).double()
    assert torch.equal(sample(features, cells), features.flatten(1))


@pytest.mark.parametrize("radius", [0, 1, 3, 9])
def test_a_patch_has_the_cells_around_any_cell_that_lie_on_the_map(radius: int) -> None:
    features = torch.zeros(2, 5, 7)
    for row in range(5):
        for column in range(7):
            found = [tuple(cell) for cell in patch((row, column), radius, features).long().tolist()]
            assert found == slow_patch((row, column), radius, 5, 7)


# Motion supervision.

PLACES: dict[str, tuple[list[Cell], list[Cell]]] = {  # on a map of 6 x 7
    "inside, at a slant": ([(3, 3)], [(0.4, 5.5)]),
    "inside, along a row": ([(3, 3)], [(3, 6)]),
    "top left corner, inwards": ([(0, 0)], [(5, 3)]),
    "top left corner, off the grid": ([(0, 0)], [(-4, -3)]),
    "top border, off the grid": ([(0, 3)], [(-5, 3)]),
    "top border, along it": ([(0, 3)], [(0, 6)]),
    "left border, outwards at a slant": ([(3, 0)], [(0, -2.5)]),
    "bottom border, along it": ([(5, 3)], [(5, 0)]),
    "right border, off the grid": ([(2, 6)], [(2.5, 11)]),
    "bottom right corner, off the grid": ([(5, 6)], [(8, 10)]),
    "bottom right corner, along the border": ([(5, 6)], [(0, 6)]),
    "three, two of them overlapping": ([(2, 2), (3, 3), (5, 6)], [(5, 5), (0, 3), (1, 1)]),
    "one of three has arrived, one stays": ([(2, 2), (4, 4), (1, 5)], [(5, 5), (5, 5), (1, 5)]),
    "all have arrived": ([(2, 2), (4, 4)], [(2, 2), (5, 4)]),
}


@pytest.mark.parametrize("kind", ["sum", "mean"])
@pytest.mark.parametrize("place", PLACES)
def test_motion_loss_and_gradient_are_those_of_the_equation(place: str, kind: str) -> None:
    (handles, targets), features = PLACES[place], random(4, 6, 7, seed=3).requires_grad_()
    for radius in (0, 1, 2):
        config = EditConfig(motion_radius=radius, motion_loss=kind)
        loss = motion_loss(features, handles, targets, config)
        wanted, gradient = slow_motion(features.detach(), handles, targets, config)
        exactly(loss, wanted)
        exactly(torch.autograd.grad(loss, features)[0], gradient)


@pytest.mark.parametrize("place", PLACES)
def test_a_patch_held_to_the_original_and_a_longer_step_are_those_of_the_slow_reference(place: str) -> None:
    (handles, targets), features = PLACES[place], random(4, 6, 7, seed=3).requires_grad_()
    for begun in (handles, [(5, 0), (0, 6), (2, 3)][: len(handles)]):
        original = origin_of(random(4, 6, 7, seed=4), begun)
        for step in (0.5, 2.0, 3.7):
            config = EditConfig(motion_step=step, motion_reference="start")
            loss = motion_loss(features, handles, targets, config, original)
            wanted, gradient = slow_motion(features.detach(), handles, targets, config, original)
            exactly(loss, wanted)
            exactly(torch.autograd.grad(loss, features)[0], gradient)


def test_the_two_motion_losses_differ_by_channels_inside_and_by_less_at_a_border() -> None:
    features = random(5, 9, 9)

    def ratio(handle: Cell) -> float:
        configs = EditConfig(motion_loss="sum"), EditConfig(motion_loss="mean")
        whole, mean = (motion_loss(features, [handle], [(4, 20)], config) for config in configs)
        return (whole / mean).item()

    assert math.isclose(ratio((4, 4)), 5)  # 9 cells times 5 channels, against 9
    assert math.isclose(ratio((0, 4)), 5 * 6 / 9)  # of a cut patch, the official factor stays as it is
    assert math.isclose(ratio((0, 0)), 5 * 4 / 9)


def test_a_step_is_one_grid_unit_long_however_far_the_target() -> None:
    ramp = torch.arange(12.0).double().expand(1, 12, 12)  # the feature is the column
    for far in (2.0, 3.5, 100.0):
        loss = motion_loss(ramp, [(5, 4)], [(5, 4 + far)], EditConfig())
        exactly(loss, 9)
    slanted = motion_loss(ramp, [(5, 4)], [(5 + 30, 4 + 40)], EditConfig())
    exactly(slanted, 9 * 0.8)


def test_a_longer_step_ends_at_the_target() -> None:
    ramp = torch.arange(12.0).double().expand(1, 12, 12)  # the feature is the column
    for far, gone in ((2.5, 2.5), (3.0, 3.0), (5.0, 3.0), (0.4, 1.0)):
        loss = motion_loss(ramp, [(5, 4)], [(5, 4 + far)], EditConfig(motion_step=3.0, tolerance=0.0))
        exactly(loss, 9 * gone)


def test_what_is_at_the_handle_is_held_and_only_what_lies_ahead_follows() -> None:
    features = random(2, 9, 9).requires_grad_()
    loss = motion_loss(features, [(4, 3)], [(4, 8)], EditConfig(motion_radius=0, motion_loss="sum"))
    (gradient,) = torch.autograd.grad(loss, features)
    assert gradient[:, 4, 4].abs().eq(1).all()
    gradient[:, 4, 4] = 0
    assert not gradient.any()


@pytest.mark.parametrize("distance", [0.0, 5e-324, 1e-300, 1e-9])
def test_no_distance_is_divided_by_zero_without_a_tolerance(distance: float) -> None:
    features = random(2, 5, 5).requires_grad_()
    loss = motion_loss(features, [(0, 0)], [(0, distance)], EditConfig(tolerance=0))
    (gradient,) = torch.autograd.grad(loss, features)
    assert loss.isfinite() and gradient.isfinite().all()
    assert bool(loss) == bool(gradient.any()) == (distance > 0)


# Tracking.


def holding(reference: Tensor) -> Origin:
    """Origin with one handle whose feature is (C,)."""
    return origin_of(reference[:, None, None], [Cell(0, 0)])


@pytest.mark.parametrize("radius", [0, 1, 3, 9])
def test_tracking_finds_what_the_equation_finds_from_every_cell(radius: int) -> None:
    features = random(3, 6, 7, seed=4)
    for row in range(6):
        for column in range(7):
            for start in random(3, 3, seed=10 * row + column):
                handle = Cell(row, column)
                [found] = track(features, [handle], holding(start), radius)
                assert found == slow_track(features, start, handle, radius)


def test_tracking_measures_by_the_sum_of_differences_and_not_of_squares() -> None:
    features = torch.full((4, 3, 3), 9.0)
    features[:, 0, 1] = torch.tensor([1.5, 0.0, 0.0, 0.0])  # sum 1.5, squares 2.25
    features[:, 2, 2] = torch.tensor([0.5, 0.5, 0.5, 0.5])  # sum 2.0, squares 1.0
    assert track(features, [Cell(1, 1)], holding(torch.zeros(4)), 1) == [(0, 1)]


def test_tracking_does_not_look_beyond_its_window() -> None:
    features = torch.full((1, 9, 9), 5.0)
    features[0, 4, 8] = 0.0
    features[0, 4, 7] = 1.0
    assert track(features, [Cell(4, 4)], holding(torch.zeros(1)), 3) == [(4, 7)]
    assert track(features, [Cell(4, 4)], holding(torch.zeros(1)), 4) == [(4, 8)]


def test_each_handle_is_tracked_by_its_own_feature() -> None:
    features, handles = random(3, 8, 9, seed=5), [Cell(1, 2), Cell(6, 7)]
    moved = features.roll((1, -1), (1, 2))
    assert track(moved, handles, origin_of(features, handles), 2) == [(2, 1), (7, 6)]


# The mask.


def test_the_mask_term_and_its_gradient_are_those_of_the_equation() -> None:
    lower, original = random(1, 4, 5, 6, seed=5).requires_grad_(), random(1, 4, 5, 6, seed=6)
    mask = (random(5, 6, seed=7) > 0).float()
    found = background_loss(lower, original, mask)
    wanted, gradient = slow_change(lower.detach(), original, mask)
    exactly(found, wanted)
    exactly(torch.autograd.grad(found, lower)[0], gradient)
    assert 0 < mask.sum() < 30
    assert background_loss(lower, original, torch.ones(5, 6)) == 0
    assert background_loss(original, original, mask) == 0


# Whole steps.


@pytest.mark.parametrize("kind", ["sum", "mean"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize(("reference", "length"), [("moving", 1.0), ("start", 1.0), ("start", 2.0)])
def test_steps_equal_a_hand_computation(
    kind: str, masked: bool, block: int, reference: str, length: float
) -> None:
    fake, latent, grid = Linear(), random(1, 4, 5, 6, seed=8), (10, 12)
    handles, targets = [(3.0, 2.0), (9.0, 11.0)], [(8.5, 9.25), (2.0, 6.0)]
    mask = torch.zeros(5, 6) if masked else None
    if masked:
        mask[1:3, 1:5] = 1
    config = {"motion_loss": kind, "block": block, "drag_lr": 0.05, "mask_weight": 0.1}
    config |= {"motion_reference": reference, "motion_step": length}
    made = run(fake, latent, handles, targets, mask=mask, grid=grid, drag_steps=6, **config)
    wanted, paths, losses, _ = slow_drag(
        fake.look(block, grid), latent, handles, targets, mask, EditConfig(**config), 6
    )
    assert_close(made.latent, wanted, rtol=0, atol=1e-10)
    assert_close(made.losses, losses, rtol=0, atol=1e-10)
    assert made.paths == paths and len(set(paths[0] + paths[1])) > 2, "no handle moved: this proves little"


def test_the_first_step_is_the_rate_along_the_sign_of_the_gradient() -> None:
    fake, latent = Linear(), random(1, 4, 6, 6)
    config = EditConfig(drag_lr=0.01)
    made = run(fake, latent, [(2, 2)], [(5, 5)], drag_steps=1)
    *_, gradients = slow_drag(fake.look(3, (6, 6)), latent, [(2, 2)], [(5, 5)], None, config, 1)
    wanted = -0.01 * gradients[0] / (gradients[0].abs() + 1e-8)
    exactly(made.latent - latent, wanted)
    assert ((made.latent - latent).abs() > 0.0099).any()


@pytest.mark.parametrize("masked", [False, True])
def test_steps_on_a_real_unet_equal_the_equations(masked: bool) -> None:
    unet, latent, grid = real_unet(), random(1, 4, 8, 9, seed=2), (16, 18)
    handles, targets, mask = [(5.0, 5.0), (15.0, 0.0)], [(12.0, 14.5), (9.0, 3.0)], torch.zeros(8, 9)
    mask[2:6, 2:7] = 1
    told = mask if masked else None
    made = run(unet, latent, handles, targets, mask=told, grid=grid, drag_steps=3)
    wanted, paths, losses, gradients = slow_drag(
        look_at(unet, 3, grid), latent, handles, targets, told, EditConfig(), 3
    )
    assert_close(made.latent, wanted, rtol=0, atol=1e-9)
    assert_close(made.losses, losses, rtol=0, atol=1e-9)
    assert made.paths == paths and all(gradient.abs().max() > 1e-3 for gradient in gradients)
    free = run(unet, latent, handles, targets, grid=grid, drag_steps=3).latent
    assert masked == (not torch.equal(made.latent, free))


def test_the_foreseen_pictures_are_of_the_moments_of_the_paths() -> None:
    fake, latent = Linear(), random(1, 4, 6, 6)
    made = run(fake, latent, [(2, 2)], [(5, 5)], drag_steps=3)
    assert len(made.predicted) == len(made.paths[0]) == 4 and len(made.losses) == 3
    for foreseen, moment in ((made.predicted[0], latent), (made.predicted[-1], made.latent)):
        exactly(foreseen, SCHEDULE.step(moment, fake(moment, TIME, TEXT)[0], TIME, -1))


# The loop.


def noting(events: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Output]:
    """`same_features`, noting in `events` each UNet call, supervision, and tracking."""

    def note(name: str, function: Callable) -> Callable:
        return lambda *given: (events.append(name), function(*given))[1]

    monkeypatch.setattr(dragdiffusion_module, "motion_loss", note("supervise", motion_loss))
    monkeypatch.setattr(drag, "track", note("track", track))
    return note("observe", same_features)


def test_each_update_supervises_then_observes_then_tracks(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    made = run(noting(events, monkeypatch), random(1, 4, 9, 9), [(2, 2)], [(8, 8)], drag_steps=3)
    assert events == ["observe", *["supervise", "observe", "track"] * 3]
    assert not made.arrived


def test_without_updates_it_observes_once_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    latent = random(1, 4, 9, 9)
    made = run(noting(events, monkeypatch), latent, [(2, 2)], [(8, 8)], drag_steps=0)
    assert events == ["observe"] and not made.arrived
    assert torch.equal(made.latent, latent) and made.paths == [[(2, 2)]] and made.losses == []


@pytest.mark.parametrize("targets", [[(2, 2), (5, 5)], [(2, 3.9), (6, 6)]])
def test_pairs_that_have_arrived_change_nothing(
    targets: list[tuple[float, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    latent = random(1, 4, 9, 9)
    made = run(noting(events, monkeypatch), latent, [(2, 2), (5, 5)], targets)
    assert events == ["observe"] and made.arrived
    assert torch.equal(made.latent, latent) and made.paths == [[(2, 2)], [(5, 5)]] and made.losses == []


def test_a_given_origin_is_what_handles_are_supervised_and_tracked_by() -> None:
    """As in alternating methods: the drag goes on at another level, from where its handles are by now."""
    fake, before, latent, grid = Linear(), random(1, 4, 8, 9, seed=3), random(1, 4, 8, 9, seed=4), (8, 9)
    config = EditConfig(drag_steps=2, motion_reference="start")
    look = partial(observe, fake, SCHEDULE, TEXT, grid, config, LEVEL)
    origin, begun, now = Origin([Cell(2, 3)], look(before)), Cell(2, 3), Cell(4, 4)
    seen: list[tuple[Sequence[Cell], Origin]] = []

    def supervise(view: View, handles: Sequence[Cell], given: Origin) -> Tensor:
        seen.append((handles, given))
        return motion_loss(view.features, handles, [Cell(7, 8)], config, given)

    steps = list(drag.drag(latent, [now], [Cell(7, 8)], look, supervise, config, origin))
    start = origin.view.features[:, int(begun.row), int(begun.column)]
    handle = slow_track(look(latent).features, start, now, config.track_radius)
    assert steps[0].handles == [handle] and len(steps) == 3
    assert seen[0] == ([handle], origin) and all(given is origin for _, given in seen)
    after = look(steps[1].latent).features
    assert steps[1].handles == [slow_track(after, start, handle, config.track_radius)]


def scripted(monkeypatch: pytest.MonkeyPatch, ways: list[list[tuple[int, int]]]) -> list[list[Cell]]:
    """Move handles as the test says; returns the list in which each supervision notes those it pulls."""
    found, seen = iter([[Cell(*point) for point in moment] for moment in zip(*ways, strict=True)]), []
    monkeypatch.setattr(drag, "track", lambda *given: next(found))

    def note(
        features: Tensor, handles: Sequence[Cell], targets: Sequence[Cell], config: EditConfig, held: None
    ):
        pairs = zip(handles, targets, strict=True)
        seen.append([handle for handle, to in pairs if math.dist(handle, to) >= config.tolerance])
        return motion_loss(features, handles, targets, config)

    monkeypatch.setattr(dragdiffusion_module, "motion_loss", note)
    return seen


def test_it_stops_when_the_last_handle_is_nearer_than_the_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    # At (4, 6) the handle is exactly 2 away, not nearer.
    scripted(monkeypatch, [[(4, 5), (4, 6), (4, 7), (0, 0)]])
    made = run(same_features, random(1, 4, 9, 9), [(4, 4)], [(4, 8)])
    assert made.arrived and made.paths == [[(4, 4), (4, 5), (4, 6), (4, 7)]]
    assert len(made.losses) == 3 and len(made.predicted) == 4


def test_it_goes_on_until_all_handles_have_arrived_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = [(4, 7), (4, 4), (4, 7), (0, 0)], [(1, 1), (1, 7), (1, 8), (0, 0)]
    seen = scripted(monkeypatch, [one, other])
    made = run(same_features, random(1, 4, 9, 9), [(4, 4), (1, 0)], [(4, 8), (1, 8)])
    assert made.arrived and made.paths == [[(4, 4), *one[:3]], [(1, 0), *other[:3]]]
    # A handle that has arrived is released, and taken up again when it drifts off.
    assert seen == [[(4, 4), (1, 0)], [(1, 1)], [(4, 4)]]


def test_arriving_with_the_last_update_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [[(4, 5), (4, 7)]])
    assert run(same_features, random(1, 4, 9, 9), [(4, 4)], [(4, 8)], drag_steps=2).arrived


def test_without_a_tolerance_only_the_very_cell_is_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [[(4, 7), (4, 8), (0, 0)]])
    made = run(same_features, random(1, 4, 9, 9), [(4, 4)], [(4, 8)], tolerance=0)
    assert made.arrived and made.paths[0][-1] == (4, 8)


def test_a_drag_can_be_stopped_by_whoever_consumes_it() -> None:
    latent, task = random(1, 4, 9, 9), Task([Cell(2, 2)], [Cell(8, 8)], None, (9, 9))
    steps = dragdiffusion(Linear(), SCHEDULE, [latent] * (LEVEL + 1), TEXT, task, EditConfig())
    first, second = next(steps), next(steps)
    steps.close()
    assert torch.equal(first.latent, latent) and not torch.equal(second.latent, latent)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("tolerance", [0.0, 2.0])
def test_handles_anywhere_going_anywhere_stay_on_the_grid(place: str, tolerance: float) -> None:
    handles, targets = PLACES[place]
    made = run(Linear(), random(1, 4, 6, 7), handles, targets, drag_steps=6, tolerance=tolerance)
    assert made.latent.isfinite().all() and all(math.isfinite(loss) for loss in made.losses)
    assert all(0 <= row < 6 and 0 <= column < 7 for path in made.paths for row, column in path)
    assert all(len(path) == len(made.losses) + 1 for path in made.paths)


# What it leaves alone, and numbers that leave their range.


def test_latent_network_and_gradient_mode_stay_as_they_were() -> None:
    unet, latent = real_unet().requires_grad_(), random(1, 4, 8, 8)
    before, weights = latent.clone(), {key: x.clone() for key, x in unet.state_dict().items()}
    with torch.no_grad():
        made = run(unet, latent, [(2, 2)], [(7, 7)], drag_steps=2)
        assert not torch.is_grad_enabled()
    assert torch.equal(latent, before) and not latent.requires_grad and not torch.equal(made.latent, before)
    assert all(torch.equal(x, weights[key]) for key, x in unet.state_dict().items())
    assert all(parameter.grad is None for parameter in unet.parameters())
    results = [made.latent, *made.predicted]
    assert not any(x.requires_grad for x in results)


def test_the_same_drag_twice_is_the_same_bit_for_bit() -> None:
    one, other = (run(real_unet(), random(1, 4, 8, 8), [(2, 2)], [(7, 7)], drag_steps=3) for _ in range(2))
    assert torch.equal(one.latent, other.latent) and one.losses == other.losses and one.paths == other.paths


@pytest.mark.parametrize("step", [1, 3])
def test_a_loss_that_is_not_a_number_stops_the_drag_and_says_where(step: int) -> None:
    calls: list[int] = []

    def spoilt(*given: Any) -> Output:
        calls.append(1)
        noise, features, _ = same_features(*given)
        return noise, [x * (math.nan if len(calls) == step else 1) for x in features], []

    with pytest.raises(
        FloatingPointError, match=f"drag: a number is not finite after {step + 1} of 81$"
    ):
        run(spoilt, random(1, 4, 9, 9), [(2, 2)], [(8, 8)])


@pytest.mark.parametrize("steps", [1, 5])
def test_a_gradient_that_is_not_a_number_stops_the_drag(steps: int) -> None:
    def steep(latent: Tensor, *given: Any) -> Output:
        return latent * 0, [latent + (latent * 0).sqrt()] * 4, []  # its slope at 0 is infinite, times 0

    with pytest.raises(FloatingPointError, match=f"drag: a number is not finite after 2 of {steps + 1}$"):
        run(steep, random(1, 4, 9, 9), [(2, 2)], [(8, 8)], drag_steps=steps)


# The purpose of it all.


def blob(row: float, column: float, size: int = 16) -> Tensor:
    """(1, 4, size, size): a soft bright spot on a dark ground, of another brightness in each channel."""
    down, across = (torch.arange(size).double() - at for at in (row, column))
    spot = torch.exp(-(down[:, None] ** 2 + across**2) / 8)
    return 0.5 * spot * torch.tensor([1.0, 0.8, 0.6, 0.4]).double()[:, None, None][None]


@pytest.mark.parametrize("target", [(14.0, 22.0), (20.0, 20.0), (9.0, 9.0)])
def test_a_bright_spot_is_dragged_to_its_target(target: Cell) -> None:
    latent, start = blob(7, 7), (14.0, 14.0)
    made = run(same_features, latent, [start], [target], grid=(32, 32))
    (path,) = made.paths
    assert made.arrived and math.dist(path[-1], target) < 2 and len(made.losses) < 80
    before, after = (interpolate(x, size=(32, 32), mode="bilinear")[0].mean(0) for x in (latent, made.latent))
    row, column = map(int, path[-1])
    assert before[row, column] < 0.31 * before.max() and after[row, column] > 0.9 * before.max()
    assert after[14, 14] < 0.8 * before[14, 14]
