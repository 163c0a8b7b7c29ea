"""Latent optimization against slow references: the equations as loops over cells, gradients by hand."""

import math
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.testing import assert_close

from minidrag.config import EditConfig
from minidrag.method import drag, dragdiffusion
from minidrag.method.ddim import Denoiser, KeysValues, NoisePredictor, Schedule
from minidrag.method.drag import (
    Cell,
    Cells,
    Origin,
    Step,
    View,
    arrived,
    background_loss,
    motion_loss,
    patch,
    pull,
    sample,
    track,
)
from minidrag.method.dragdiffusion import Task
from minidrag.method.progress import Progress
from minidrag.networks.unet import UNet, UNetConfig

SCHEDULE = Schedule()
LEVEL, TIME, BELOW = 35, 681, 661  # of the dragged latent: its level, its timestep, and the timestep below
TEXT = torch.linspace(-1, 1, 77 * 8, dtype=torch.float64).reshape(1, 77, 8)
Output = tuple[Tensor, list[Tensor], KeysValues]
# From the gradients with respect to the feature map and z_{t-1} to the gradient with respect to the latent.
Backward = Callable[[Tensor, Tensor], Tensor]
# From a latent to its feature map and z_{t-1}, both without a graph, and the backward pass.
Forward = Callable[[Tensor], tuple[Tensor, Tensor, Backward]]


def assert_equal(found: Tensor, expected: Tensor | float) -> None:
    """Equal except for rounding in float64."""
    assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def config_of(**changes: Any) -> EditConfig:
    """The authors' program with changes."""
    return replace(EditConfig.official(), **changes)


def origin_of(features: Tensor, handles: Cells) -> Origin:
    """Origin with these features; nothing else of its view is used."""
    return Origin(handles, View(features, torch.empty(0), torch.empty(0), LEVEL))


def loss_of(
    features: Tensor, handles: Cells, targets: Cells, config: EditConfig, origin: Origin | None = None
) -> Tensor:
    """Motion loss, by default with the features themselves as its reference, as in the paper."""
    return motion_loss(features, handles, targets, origin or origin_of(features, handles), config)


# The slow references.


def corners(row: float, column: float, height: int, width: int) -> list[tuple[int, int, float]]:
    """The four cells around a point and their bilinear weights; beyond the border the border repeats."""
    top, left = math.floor(row), math.floor(column)
    down, right = row - top, column - left
    four = (
        (top, left, (1 - down) * (1 - right)),
        (top, left + 1, (1 - down) * right),
        (top + 1, left, down * (1 - right)),
        (top + 1, left + 1, down * right),
    )
    return [(min(max(r, 0), height - 1), min(max(c, 0), width - 1), weight) for r, c, weight in four]


def slow_patch(center: Cell, radius: int, height: int, width: int) -> list[tuple[int, int]]:
    offsets = range(-radius, radius + 1)
    cells = [(int(center.row) + down, int(center.column) + right) for down in offsets for right in offsets]
    return [(row, column) for row, column in cells if 0 <= row < height and 0 <= column < width]


def slow_motion(
    features: Tensor, handles: Cells, targets: Cells, config: EditConfig, origin: Origin | None = None
) -> tuple[float, Tensor]:
    """First term of eq. 3 and its gradient, to which F_q itself contributes nothing.

    origin: read F_q there, as far from its handle as q is from the handle now.
    """
    (channels, height, width), total, gradient = features.shape, 0.0, torch.zeros_like(features)
    source, starts = (origin.view.features, origin.handles) if origin else (features, handles)
    for handle, target, start in zip(handles, targets, starts, strict=True):
        down, right = target.row - handle.row, target.column - handle.column
        distance = math.sqrt(down**2 + right**2)
        near = distance == 0 or distance < config.tolerance
        if near and not config.hold_steps:
            continue
        divisor = 1 if near else distance / min(config.motion_step, max(distance, 1))
        shift = start.row - handle.row, start.column - handle.column
        cells = slow_patch(handle, config.motion_radius, height, width)
        area = (2 * config.motion_radius + 1) ** 2
        weight = area / (len(cells) * channels) if config.motion_loss == "mean" else 1.0
        for r, c in cells:
            ahead = corners(r + down / divisor, c + right / divisor, height, width)
            here = corners(r + shift[0], c + shift[1], height, width)
            for channel in range(channels):
                values, held = features[channel], source[channel]
                difference = sum(share * values[i, j].item() for i, j, share in ahead)
                difference -= sum(share * held[i, j].item() for i, j, share in here)
                total += weight * abs(difference)
                sign = 0 if abs(difference) < 1e-12 else math.copysign(1, difference)
                for i, j, share in ahead:
                    gradient[channel, i, j] += weight * share * sign
    return total, gradient


def slow_background(previous: Tensor, original: Tensor, mask: Tensor) -> tuple[float, Tensor]:
    """Second term of eq. 3 without lambda, and its gradient."""
    total, gradient = 0.0, torch.zeros_like(previous)
    for channel in range(previous.shape[1]):
        for row in range(previous.shape[2]):
            for column in range(previous.shape[3]):
                place, unmasked = (0, channel, row, column), 1 - mask[row, column].item()
                difference = (previous[place] - original[place]).item()
                total += abs(difference) * unmasked
                gradient[place] = unmasked * (difference > 0) - unmasked * (difference < 0)
    return total, gradient


def slow_track(features: Tensor, reference: Tensor, handle: Cell, radius: int) -> Cell:
    """Equation 5. reference: (C,)."""
    least, best = math.inf, handle
    height, width = features.shape[1:]
    for row, column in slow_patch(handle, radius, height, width):
        pairs = zip(features[:, row, column].tolist(), reference.tolist(), strict=True)
        distance = sum(abs(value - original) for value, original in pairs)
        if distance < least:
            least, best = distance, Cell(float(row), float(column))
    return best


def slow_drag(
    forward: Forward,
    latent: Tensor,
    handles: Cells,
    targets: Cells,
    mask: Tensor | None,
    config: EditConfig,
    steps: int,
) -> tuple[Tensor, list[list[Cell]], list[float], list[Tensor]]:
    """Updates by the equations and by Adam (arXiv 1412.6980, algorithm 1).

    Returns the latent, the path of each handle, the losses, and the gradients.
    """
    first, second = torch.zeros_like(latent), torch.zeros_like(latent)
    paths, losses, gradients = [[handle] for handle in handles], [], []
    features, original, _ = forward(latent)
    references = [features[:, int(row), int(column)] for row, column in handles]
    origin = origin_of(features, handles) if config.motion_reference == "start" else None
    for step in range(1, steps + 1):
        features, previous, backward = forward(latent)
        loss, features_gradient = slow_motion(features, [path[-1] for path in paths], targets, config, origin)
        previous_gradient = torch.zeros_like(previous)
        if mask is not None:
            change, change_gradient = slow_background(previous, original, mask)
            loss, previous_gradient = loss + config.mask_weight * change, config.mask_weight * change_gradient
        gradient = backward(features_gradient, previous_gradient)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        mean, deviation = first / (1 - 0.9**step), (second / (1 - 0.999**step)).sqrt()
        latent = latent - config.drag_lr * mean / (deviation + 1e-8)
        losses.append(loss)
        gradients.append(gradient)
        features, _, _ = forward(latent)
        for path, reference in zip(paths, references, strict=True):
            path.append(slow_track(features, reference, path[-1], config.track_radius))
    return latent, paths, losses, gradients


# Networks to drag in.


class LinearUNet:
    """Fake UNet: the noise and each block's features are matrices times a cell of the latent."""

    def __init__(self, channels: int = 3):
        self.mixes = [random(channels, 4, seed=10 + block) for block in range(4)]
        self.noise = 0.3 * random(4, 4, seed=20)

    def __call__(
        self, latent: Tensor, timestep: int | Tensor, text: Tensor, keys_values: KeysValues | None = None, /
    ) -> Output:
        assert timestep == TIME and text is TEXT and keys_values is None
        features = [torch.einsum("ck,bkhw->bchw", mix, latent) for mix in self.mixes]
        return torch.einsum("ck,bkhw->bchw", self.noise, latent), features, []

    def by_hand(self, block: int, grid: tuple[int, int]) -> Forward:
        """The same without autograd."""
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        of_latent, of_noise = SCHEDULE.step(one, zero, TIME, BELOW), SCHEDULE.step(zero, one, TIME, BELOW)
        mix = self.mixes[block - 1]
        step = of_latent * torch.eye(4, dtype=torch.float64) + of_noise * self.noise

        def forward(latent: Tensor) -> tuple[Tensor, Tensor, Backward]:
            rows, columns = (upsampling(*sizes) for sizes in zip(latent.shape[2:], grid, strict=True))
            features = torch.einsum("ck,khw,rh,sw->crs", mix, latent[0], rows, columns)

            def backward(features_gradient: Tensor, previous_gradient: Tensor) -> Tensor:
                gradient = torch.einsum("ck,crs,rh,sw->khw", mix, features_gradient, rows, columns)
                return gradient[None] + torch.einsum("ck,bchw->bkhw", step, previous_gradient)

            return features, torch.einsum("ck,bkhw->bchw", step, latent), backward

        return forward


def upsampling(cells: int, size: int) -> Tensor:
    """Matrix (size, cells) that enlarges a row of cells bilinearly, aligned at the outer borders."""
    matrix = torch.zeros(size, cells, dtype=torch.float64)
    for i in range(size):
        for _, at, weight in corners(0, (i + 0.5) * cells / size - 0.5, 1, cells):
            matrix[i, at] += weight
    return matrix


def identity_unet(
    latent: Tensor, timestep: int | Tensor, text: Tensor, keys_values: KeysValues | None = None, /
) -> Output:
    """Fake UNet that predicts zero noise; each block's features are the latent."""
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


def with_autograd(unet: UNet, block: int, grid: tuple[int, int]) -> Forward:
    """Forward and backward pass of a UNet by autograd; the rest of equation 3 stays by hand."""

    def forward(latent: Tensor) -> tuple[Tensor, Tensor, Backward]:
        latent = latent.clone().requires_grad_()
        noise, features, _ = unet(latent, TIME, TEXT)
        previous, tapped = SCHEDULE.step(latent, noise, TIME, BELOW), features[block - 1]
        rows, columns = (upsampling(*sizes) for sizes in zip(tapped.shape[2:], grid, strict=True))
        enlarged = torch.einsum("chw,rh,sw->crs", tapped[0], rows, columns)

        def backward(features_gradient: Tensor, previous_gradient: Tensor) -> Tensor:
            gradients = features_gradient, previous_gradient
            return torch.autograd.grad((enlarged, previous), latent, gradients)[0]

        return enlarged.detach(), previous.detach(), backward

    return forward


class Result(NamedTuple):
    """Steps of a drag, transposed."""

    latent: Tensor
    paths: list[list[Cell]]
    losses: list[float]
    predicted: list[Tensor]
    arrived: bool

    @classmethod
    def of(cls, steps: Iterable[Step], targets: Cells, config: EditConfig) -> "Result":
        steps = list(Progress()("drag", steps, config.drag_steps))
        paths = [list(path) for path in zip(*[step.handles for step in steps], strict=True)]
        losses, predicted = [step.loss for step in steps[1:]], [step.predicted for step in steps]
        assert steps[0].loss is None and all(step.level == LEVEL for step in steps)
        assert None not in losses
        there = all(arrived(path[-1], to, config.tolerance) for path, to in zip(paths, targets, strict=True))
        return cls(steps[-1].latent, paths, [loss for loss in losses if loss is not None], predicted, there)


def run(
    unet: NoisePredictor,
    latent: Tensor,
    handles: Cells,
    targets: Cells,
    mask: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    config: EditConfig = EditConfig.official(),  # noqa: B008, it is frozen
) -> Result:
    """Run `dragdiffusion`, by default on a grid of the latent's own size."""
    task = Task(handles, targets, mask, grid or (latent.shape[2], latent.shape[3]))
    path = [latent * math.nan] * LEVEL + [latent]
    steps = dragdiffusion.dragdiffusion(Denoiser(unet, SCHEDULE, TEXT, 50), path, task, config)
    return Result.of(steps, targets, config)


# Features between cells.


def test_samples_and_gradients_equal_the_four_corner_formula_inside_and_beyond_every_border() -> None:
    features = random(3, 4, 5).requires_grad_()
    steps = [i * 0.5 for i in range(-3, 13)] + [-0.3, 0.1, 2.7, 3.9, 4.2]
    points = [(row, column) for row in steps for column in steps]
    found = sample(features, torch.tensor(points, dtype=torch.float64))
    upstream, gradient, expected = random(3, len(points), seed=1), 0 * features, random(3, len(points)) * 0
    for place, point in enumerate(points):
        for row, column, weight in corners(*point, 4, 5):
            expected[:, place] += weight * features[:, row, column]
            gradient[:, row, column] += weight * upstream[:, place]
    assert_equal(found, expected)
    assert_equal(torch.autograd.grad(found, features, upstream)[0], gradient)


def test_samples_at_cell_centers_are_the_cells_bit_for_bit() -> None:
    features = random(3, 4, 5)
    cells = torch.cartesian_prod(torch.arange(4), torch.arange(5)).double()
    assert torch.equal(sample(features, cells), features.flatten(1))


@pytest.mark.parametrize("radius", [0, 1, 3, 9])
def test_a_patch_has_the_cells_around_its_center_that_lie_on_the_grid(radius: int) -> None:
    features = torch.zeros(2, 5, 7)
    for row in range(5):
        for column in range(7):
            center = Cell(row, column)
            found = [tuple(cell) for cell in patch(center, radius, features).long().tolist()]
            assert found == slow_patch(center, radius, 5, 7)


# Motion supervision.

PLACES: dict[str, tuple[list[Cell], list[Cell]]] = {  # handles and targets on a grid of 6 x 7
    "inside, diagonal": ([Cell(3, 3)], [Cell(0.4, 5.5)]),
    "inside, along a row": ([Cell(3, 3)], [Cell(3, 6)]),
    "top left corner, inwards": ([Cell(0, 0)], [Cell(5, 3)]),
    "top left corner, off the grid": ([Cell(0, 0)], [Cell(-4, -3)]),
    "top border, off the grid": ([Cell(0, 3)], [Cell(-5, 3)]),
    "top border, along it": ([Cell(0, 3)], [Cell(0, 6)]),
    "left border, diagonally off the grid": ([Cell(3, 0)], [Cell(0, -2.5)]),
    "bottom border, along it": ([Cell(5, 3)], [Cell(5, 0)]),
    "right border, off the grid": ([Cell(2, 6)], [Cell(2.5, 11)]),
    "bottom right corner, off the grid": ([Cell(5, 6)], [Cell(8, 10)]),
    "bottom right corner, along the border": ([Cell(5, 6)], [Cell(0, 6)]),
    "three, two of them overlapping": (
        [Cell(2, 2), Cell(3, 3), Cell(5, 6)],
        [Cell(5, 5), Cell(0, 3), Cell(1, 1)],
    ),
    "one of three has arrived, one stays": (
        [Cell(2, 2), Cell(4, 4), Cell(1, 5)],
        [Cell(5, 5), Cell(5, 5), Cell(1, 5)],
    ),
    "all have arrived": ([Cell(2, 2), Cell(4, 4)], [Cell(2, 2), Cell(5, 4)]),
}


@pytest.mark.parametrize("kind", ["sum", "mean"])
@pytest.mark.parametrize("place", PLACES)
def test_the_motion_loss_and_its_gradient_equal_the_equation(place: str, kind: str) -> None:
    (handles, targets), features = PLACES[place], random(4, 6, 7, seed=3).requires_grad_()
    for radius in (0, 1, 2):
        config = config_of(motion_radius=radius, motion_loss=kind)
        loss = loss_of(features, handles, targets, config)
        expected, gradient = slow_motion(features.detach(), handles, targets, config)
        assert_equal(loss, expected)
        assert_equal(torch.autograd.grad(loss, features)[0], gradient)


@pytest.mark.parametrize("held", [0, 2])
@pytest.mark.parametrize("place", PLACES)
def test_a_motion_loss_against_the_original_with_any_step_equals_the_slow_reference(
    place: str, held: int
) -> None:
    (handles, targets), features = PLACES[place], random(4, 6, 7, seed=3).requires_grad_()
    for starts in (handles, [Cell(5, 0), Cell(0, 6), Cell(2, 3)][: len(handles)]):
        origin = origin_of(random(4, 6, 7, seed=4), starts)
        for length in (0.5, 2.0, 3.7):
            config = config_of(motion_step=length, motion_reference="start", hold_steps=held)
            loss = loss_of(features, handles, targets, config, origin)
            expected, gradient = slow_motion(features.detach(), handles, targets, config, origin)
            assert_equal(loss, expected)
            assert_equal(torch.autograd.grad(loss, features)[0], gradient)


def test_sum_and_mean_differ_by_the_channels_and_by_less_at_a_border() -> None:
    features = random(5, 9, 9)

    def ratio(handle: Cell) -> float:
        configs = config_of(motion_loss="sum"), config_of(motion_loss="mean")
        total, mean = (loss_of(features, [handle], [Cell(4, 20)], config) for config in configs)
        return (total / mean).item()

    assert math.isclose(ratio(Cell(4, 4)), 5)  # 9 cells times 5 channels, against 9
    assert math.isclose(ratio(Cell(0, 4)), 5 * 6 / 9)  # for a clipped patch, the official factor stays 9
    assert math.isclose(ratio(Cell(0, 0)), 5 * 4 / 9)


def ramp() -> Tensor:
    """Feature map (1, 12, 12) whose feature is the column."""
    return torch.arange(12.0).double().expand(1, 12, 12)


def test_a_step_is_one_cell_long_however_far_the_target() -> None:
    for distance in (2.0, 3.5, 100.0):
        loss = loss_of(ramp(), [Cell(5, 4)], [Cell(5, 4 + distance)], config_of())
        assert_equal(loss, 9)
    diagonal = loss_of(ramp(), [Cell(5, 4)], [Cell(5 + 30, 4 + 40)], config_of())
    assert_equal(diagonal, 9 * 0.8)


def test_a_longer_step_ends_at_the_target() -> None:
    config = config_of(motion_step=3.0, tolerance=0.0)
    for distance, length in ((2.5, 2.5), (3.0, 3.0), (5.0, 3.0), (0.4, 1.0)):
        loss = loss_of(ramp(), [Cell(5, 4)], [Cell(5, 4 + distance)], config)
        assert_equal(loss, 9 * length)


def test_what_has_arrived_is_held_at_its_target() -> None:
    config = config_of(motion_reference="start", hold_steps=1)  # with a tolerance of 2
    origin = origin_of(ramp(), [Cell(5, 1)])
    for column in (3.0, 4.0, 5.0):
        assert_equal(loss_of(ramp(), [Cell(5, column)], [Cell(5, 4)], config, origin), 9 * 3)
        nothing = loss_of(ramp(), [Cell(5, column)], [Cell(5, 4)], replace(config, hold_steps=0), origin)
        assert_equal(nothing, 0)


def test_only_the_features_ahead_have_a_gradient() -> None:
    features, config = random(2, 9, 9).requires_grad_(), config_of(motion_radius=0, motion_loss="sum")
    loss = loss_of(features, [Cell(4, 3)], [Cell(4, 8)], config)
    (gradient,) = torch.autograd.grad(loss, features)
    assert gradient[:, 4, 4].abs().eq(1).all()
    gradient[:, 4, 4] = 0
    assert not gradient.any()


@pytest.mark.parametrize("distance", [0.0, 5e-324, 1e-300, 1e-9])
def test_without_a_tolerance_no_distance_divides_by_zero(distance: float) -> None:
    features = random(2, 5, 5).requires_grad_()
    loss = loss_of(features, [Cell(0, 0)], [Cell(0, distance)], config_of(tolerance=0))
    (gradient,) = torch.autograd.grad(loss, features)
    assert loss.isfinite() and gradient.isfinite().all()
    assert bool(loss) == bool(gradient.any()) == (distance > 0)


# Point tracking.


def origin_with(reference: Tensor) -> Origin:
    """Origin with one handle whose feature is (C,)."""
    return origin_of(reference[:, None, None], [Cell(0, 0)])


@pytest.mark.parametrize("radius", [0, 1, 3, 9])
def test_tracking_from_every_cell_equals_the_equation(radius: int) -> None:
    features = random(3, 6, 7, seed=4)
    for row in range(6):
        for column in range(7):
            for reference in random(3, 3, seed=10 * row + column):
                handle = Cell(row, column)
                [found] = track(features, [handle], origin_with(reference), radius)
                assert found == slow_track(features, reference, handle, radius)


def test_tracking_uses_the_l1_distance_and_not_the_l2_distance() -> None:
    features = torch.full((4, 3, 3), 9.0)
    features[:, 0, 1] = torch.tensor([1.5, 0.0, 0.0, 0.0])  # sum 1.5, squares 2.25
    features[:, 2, 2] = torch.tensor([0.5, 0.5, 0.5, 0.5])  # sum 2.0, squares 1.0
    assert track(features, [Cell(1, 1)], origin_with(torch.zeros(4)), 1) == [Cell(0, 1)]


def test_tracking_does_not_look_beyond_its_window() -> None:
    features = torch.full((1, 9, 9), 5.0)
    features[0, 4, 8] = 0.0
    features[0, 4, 7] = 1.0
    assert track(features, [Cell(4, 4)], origin_with(torch.zeros(1)), 3) == [Cell(4, 7)]
    assert track(features, [Cell(4, 4)], origin_with(torch.zeros(1)), 4) == [Cell(4, 8)]


def test_each_handle_is_tracked_by_its_own_feature() -> None:
    features, handles = random(3, 8, 9, seed=5), [Cell(1, 2), Cell(6, 7)]
    moved = features.roll((1, -1), (1, 2))
    assert track(moved, handles, origin_of(features, handles), 2) == [Cell(2, 1), Cell(7, 6)]


# The unmasked region.


def test_the_background_loss_and_its_gradient_equal_the_equation() -> None:
    previous, original = random(1, 4, 5, 6, seed=5).requires_grad_(), random(1, 4, 5, 6, seed=6)
    mask = (random(5, 6, seed=7) > 0).float()
    found = background_loss(previous, original, mask)
    expected, gradient = slow_background(previous.detach(), original, mask)
    assert_equal(found, expected)
    assert_equal(torch.autograd.grad(found, previous)[0], gradient)
    assert 0 < mask.sum() < 30
    assert background_loss(previous, original, torch.ones(5, 6)) == 0
    assert background_loss(original, original, mask) == 0


# Whole updates.


@pytest.mark.parametrize("kind", ["sum", "mean"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize(("reference", "length"), [("moving", 1.0), ("start", 1.0), ("start", 2.0)])
def test_updates_equal_a_computation_by_hand(
    kind: str, masked: bool, block: int, reference: str, length: float
) -> None:
    unet, latent, grid = LinearUNet(), random(1, 4, 5, 6, seed=8), (10, 12)
    handles, targets = [Cell(3, 2), Cell(9, 11)], [Cell(8.5, 9.25), Cell(2, 6)]
    mask = torch.zeros(5, 6)
    mask[1:3, 1:5] = 1
    given = mask if masked else None
    config = config_of(
        block=block,
        drag_steps=6,
        drag_lr=0.05,
        motion_loss=kind,
        motion_reference=reference,
        motion_step=length,
        mask_weight=0.1,
    )
    found = run(unet, latent, handles, targets, given, grid, config)
    forward = unet.by_hand(block, grid)
    expected, paths, losses, _ = slow_drag(forward, latent, handles, targets, given, config, 6)
    assert_close(found.latent, expected, rtol=0, atol=1e-10)
    assert_close(found.losses, losses, rtol=0, atol=1e-10)
    assert found.paths == paths and len(set(paths[0] + paths[1])) > 2, "no handle moved: this proves little"


def test_the_first_update_is_the_learning_rate_along_the_sign_of_the_gradient() -> None:
    unet, latent = LinearUNet(), random(1, 4, 6, 6)
    config, handles, targets = config_of(drag_lr=0.01, drag_steps=1), [Cell(2, 2)], [Cell(5, 5)]
    found = run(unet, latent, handles, targets, config=config)
    *_, gradients = slow_drag(unet.by_hand(3, (6, 6)), latent, handles, targets, None, config, 1)
    expected = -0.01 * gradients[0] / (gradients[0].abs() + 1e-8)
    assert_equal(found.latent - latent, expected)
    assert ((found.latent - latent).abs() > 0.0099).any()


@pytest.mark.parametrize("masked", [False, True])
def test_updates_with_a_real_unet_equal_the_equations(masked: bool) -> None:
    unet, latent, grid, config = real_unet(), random(1, 4, 8, 9, seed=2), (16, 18), config_of(drag_steps=3)
    handles, targets = [Cell(5, 5), Cell(15, 0)], [Cell(12, 14.5), Cell(9, 3)]
    mask = torch.zeros(8, 9)
    mask[2:6, 2:7] = 1
    given = mask if masked else None
    found = run(unet, latent, handles, targets, given, grid, config)
    forward = with_autograd(unet, 3, grid)
    expected, paths, losses, gradients = slow_drag(forward, latent, handles, targets, given, config, 3)
    assert_close(found.latent, expected, rtol=0, atol=1e-9)
    assert_close(found.losses, losses, rtol=0, atol=1e-9)
    assert found.paths == paths and all(gradient.abs().max() > 1e-3 for gradient in gradients)
    without_mask = run(unet, latent, handles, targets, None, grid, config).latent
    assert masked == (not torch.equal(found.latent, without_mask))


def test_each_step_predicts_the_finished_latent_from_its_own() -> None:
    unet, latent = LinearUNet(), random(1, 4, 6, 6)
    found = run(unet, latent, [Cell(2, 2)], [Cell(5, 5)], config=config_of(drag_steps=3))
    assert len(found.predicted) == len(found.paths[0]) == 4 and len(found.losses) == 3
    for predicted, z in ((found.predicted[0], latent), (found.predicted[-1], found.latent)):
        assert_equal(predicted, SCHEDULE.step(z, unet(z, TIME, TEXT)[0], TIME, -1))


# The loop.


def recorded(events: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Output]:
    """`identity_unet`; records in `events` each UNet call, supervision, and tracking."""

    def record(name: str, function: Callable) -> Callable:
        return lambda *given: (events.append(name), function(*given))[1]

    monkeypatch.setattr(dragdiffusion, "motion_loss", record("supervise", motion_loss))
    monkeypatch.setattr(drag, "track", record("track", track))
    return record("observe", identity_unet)


def test_each_update_supervises_then_observes_then_tracks(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    unet, config = recorded(events, monkeypatch), config_of(drag_steps=3)
    found = run(unet, random(1, 4, 9, 9), [Cell(2, 2)], [Cell(8, 8)], config=config)
    assert events == ["observe", *["supervise", "observe", "track"] * 3]
    assert not found.arrived


def test_zero_updates_observe_once_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    unet, latent, config = recorded(events, monkeypatch), random(1, 4, 9, 9), config_of(drag_steps=0)
    found = run(unet, latent, [Cell(2, 2)], [Cell(8, 8)], config=config)
    assert events == ["observe"] and not found.arrived
    assert torch.equal(found.latent, latent) and found.paths == [[Cell(2, 2)]] and found.losses == []


@pytest.mark.parametrize("targets", [[Cell(2, 2), Cell(5, 5)], [Cell(2, 3.9), Cell(6, 6)]])
def test_handles_that_have_arrived_stop_the_drag_before_the_first_update(
    targets: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    latent, handles = random(1, 4, 9, 9), [Cell(2, 2), Cell(5, 5)]
    found = run(recorded(events, monkeypatch), latent, handles, targets)
    assert events == ["observe"] and found.arrived
    assert torch.equal(found.latent, latent) and found.losses == []
    assert found.paths == [[handle] for handle in handles]


def test_a_given_origin_supervises_and_tracks_the_handles() -> None:
    """As in a method that alternates: the drag goes on at another level, from where its handles are now."""
    before, latent, grid = random(1, 4, 8, 9, seed=3), random(1, 4, 8, 9, seed=4), (8, 9)
    config = config_of(drag_steps=2, motion_reference="start")
    start, now, target = Cell(2, 3), Cell(4, 4), Cell(7, 8)
    task = Task([now], [target], None, grid)
    observe = dragdiffusion.observer(Denoiser(LinearUNet(), SCHEDULE, TEXT, 50), LEVEL, task, config)
    origin = Origin([start], observe(before))
    supervised: list[tuple[Cells, Origin]] = []

    def supervise(view: View, handles: Cells, given: Origin) -> Tensor:
        supervised.append((handles, given))
        return motion_loss(view.features, handles, [target], given, config)

    steps = list(drag.drag(latent, [now], [target], observe, supervise, config, origin))
    reference = origin.view.features[:, int(start.row), int(start.column)]
    handle = slow_track(observe(latent).features, reference, now, config.track_radius)
    assert steps[0].handles == [handle] and len(steps) == 3
    assert supervised[0] == ([handle], origin) and all(given is origin for _, given in supervised)
    features = observe(steps[1].latent).features
    assert steps[1].handles == [slow_track(features, reference, handle, config.track_radius)]


def follow(monkeypatch: pytest.MonkeyPatch, *paths: list[Cell]) -> list[list[Cell]]:
    """Make tracking follow these paths; returns the list in which each supervision records what it pulls."""
    moments, pulled = iter([list(moment) for moment in zip(*paths, strict=True)]), []
    monkeypatch.setattr(drag, "track", lambda *given: next(moments))

    def record(
        features: Tensor, handles: Cells, targets: Cells, reference: Origin, config: EditConfig
    ) -> Tensor:
        pairs = zip(handles, targets, strict=True)
        pulled.append([handle for handle, target in pairs if math.dist(handle, target) >= config.tolerance])
        return motion_loss(features, handles, targets, reference, config)

    monkeypatch.setattr(dragdiffusion, "motion_loss", record)
    return pulled


def test_the_drag_stops_once_every_handle_is_nearer_than_the_tolerance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # At (4, 6) the handle is exactly 2 away, not nearer.
    path = [Cell(4, 5), Cell(4, 6), Cell(4, 7)]
    follow(monkeypatch, [*path, Cell(0, 0)])
    found = run(identity_unet, random(1, 4, 9, 9), [Cell(4, 4)], [Cell(4, 8)])
    assert found.arrived and found.paths == [[Cell(4, 4), *path]]
    assert len(found.losses) == 3 and len(found.predicted) == 4


def test_the_drag_goes_on_until_all_handles_have_arrived_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = [Cell(4, 7), Cell(4, 4), Cell(4, 7)], [Cell(1, 1), Cell(1, 7), Cell(1, 8)]
    pulled = follow(monkeypatch, [*first, Cell(0, 0)], [*second, Cell(0, 0)])
    handles, targets = [Cell(4, 4), Cell(1, 0)], [Cell(4, 8), Cell(1, 8)]
    found = run(identity_unet, random(1, 4, 9, 9), handles, targets)
    assert found.arrived and found.paths == [[handles[0], *first], [handles[1], *second]]
    # A handle that has arrived is released, and taken up again when it drifts off.
    assert pulled == [handles, [Cell(1, 1)], [Cell(4, 4)]]


def test_an_arrival_with_the_last_update_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch, [Cell(4, 5), Cell(4, 7)])
    config = config_of(drag_steps=2)
    assert run(identity_unet, random(1, 4, 9, 9), [Cell(4, 4)], [Cell(4, 8)], config=config).arrived


def test_without_a_tolerance_only_the_target_itself_is_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch, [Cell(4, 7), Cell(4, 8), Cell(0, 0)])
    config = config_of(tolerance=0)
    found = run(identity_unet, random(1, 4, 9, 9), [Cell(4, 4)], [Cell(4, 8)], config=config)
    assert found.arrived and found.paths[0][-1] == Cell(4, 8)


def test_the_consumer_can_stop_a_drag() -> None:
    latent, task = random(1, 4, 9, 9), Task([Cell(2, 2)], [Cell(8, 8)], None, (9, 9))
    path = [latent] * (LEVEL + 1)
    denoiser = Denoiser(LinearUNet(), SCHEDULE, TEXT, 50)
    steps = dragdiffusion.dragdiffusion(denoiser, path, task, config_of())
    assert isinstance(steps, Generator)
    first, second = next(steps), next(steps)
    steps.close()
    assert torch.equal(first.latent, latent) and not torch.equal(second.latent, latent)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("tolerance", [0.0, 2.0])
def test_handles_stay_on_the_grid_wherever_they_start_and_go(place: str, tolerance: float) -> None:
    handles, targets = PLACES[place]
    config = config_of(drag_steps=6, tolerance=tolerance)
    found = run(LinearUNet(), random(1, 4, 6, 7), handles, targets, config=config)
    assert found.latent.isfinite().all() and all(math.isfinite(loss) for loss in found.losses)
    assert all(0 <= row < 6 and 0 <= column < 7 for path in found.paths for row, column in path)
    assert all(len(path) == len(found.losses) + 1 for path in found.paths)


# Side effects, and numbers that are not finite.


def test_a_drag_changes_neither_its_latent_nor_the_network_nor_the_gradient_mode() -> None:
    unet, latent = real_unet().requires_grad_(), random(1, 4, 8, 8)
    before, weights = latent.clone(), {key: x.clone() for key, x in unet.state_dict().items()}
    with torch.no_grad():
        found = run(unet, latent, [Cell(2, 2)], [Cell(7, 7)], config=config_of(drag_steps=2))
        assert not torch.is_grad_enabled()
    assert torch.equal(latent, before) and not latent.requires_grad and not torch.equal(found.latent, before)
    assert all(torch.equal(x, weights[key]) for key, x in unet.state_dict().items())
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert not any(x.requires_grad for x in [found.latent, *found.predicted])


def test_the_same_drag_twice_is_equal_bit_for_bit() -> None:
    config = config_of(drag_steps=3)
    first, second = (
        run(real_unet(), random(1, 4, 8, 8), [Cell(2, 2)], [Cell(7, 7)], config=config) for _ in range(2)
    )
    assert torch.equal(first.latent, second.latent)
    assert first.losses == second.losses and first.paths == second.paths


@pytest.mark.parametrize("step", [1, 3])
def test_a_loss_that_is_not_finite_stops_the_drag_and_the_message_tells_when(step: int) -> None:
    calls: list[int] = []

    def broken(latent: Tensor, *given: Any) -> Output:
        calls.append(1)
        return latent * 0, [latent * (math.nan if len(calls) == step else 1)] * 4, []

    message = f"^drag: a number is not finite after {step} of 80$"
    with pytest.raises(FloatingPointError, match=message):
        run(broken, random(1, 4, 9, 9), [Cell(2, 2)], [Cell(8, 8)])


@pytest.mark.parametrize("steps", [1, 5])
def test_a_gradient_that_is_not_finite_stops_the_drag(steps: int) -> None:
    def steep(latent: Tensor, *given: Any) -> Output:
        return latent * 0, [latent + (latent * 0).sqrt()] * 4, []  # its slope at 0 is infinite, times 0

    message = f"^drag: a number is not finite after 1 of {steps}$"
    with pytest.raises(FloatingPointError, match=message):
        config = config_of(drag_steps=steps)
        run(steep, random(1, 4, 9, 9), [Cell(2, 2)], [Cell(8, 8)], config=config)


# An edit.


def blob(row: float, column: float, size: int = 16) -> Tensor:
    """Latent (1, 4, size, size): a soft bright spot on a dark ground, of another brightness per channel."""
    down, right = (torch.arange(size).double() - at for at in (row, column))
    spot = torch.exp(-(down[:, None] ** 2 + right**2) / 8)
    return 0.5 * spot * torch.tensor([1.0, 0.8, 0.6, 0.4]).double()[:, None, None][None]


@pytest.mark.parametrize("target", [Cell(14, 22), Cell(20, 20), Cell(9, 9)])
def test_a_bright_spot_is_dragged_to_its_target(target: Cell) -> None:
    latent = blob(7, 7)
    found = run(identity_unet, latent, [Cell(14, 14)], [target], grid=(32, 32))
    (path,) = found.paths
    assert found.arrived and math.dist(path[-1], target) < 2 and len(found.losses) < 80
    before, after = (
        interpolate(x, size=(32, 32), mode="bilinear")[0].mean(0) for x in (latent, found.latent)
    )
    row, column = map(int, path[-1])
    assert before[row, column] < 0.31 * before.max() and after[row, column] > 0.9 * before.max()
    assert after[14, 14] < 0.8 * before[14, 14]


# The pull of a handle, d_i.


@pytest.mark.parametrize("held", [0, 3])
def test_a_pull_is_the_equation_at_most_to_the_target_and_back_to_it_once_arrived(held: int) -> None:
    config = config_of(motion_step=3.0, tolerance=2.0, hold_steps=held)
    assert pull(Cell(5, 4), Cell(5, 14), config) == [0, 3]
    assert pull(Cell(5, 4), Cell(8, 8), config) == pytest.approx([3 * 0.6, 3 * 0.8])
    assert pull(Cell(5, 4), Cell(5, 6), config) == [0, 2]
    assert pull(Cell(5, 4), Cell(5, 3), config) == ([0, -1] if held else None)
    assert pull(Cell(5, 4), Cell(5, 4), config) == ([0, 0] if held else None)


def test_a_drag_returns_its_last_step() -> None:
    def whole() -> Generator[drag.Step, None, None]:
        last = yield from drag.drag(
            random(1, 4, 9, 9), task.handles, task.targets, observe, supervise, config
        )
        returned.append(last)

    config, task, returned = config_of(drag_steps=2), Task([Cell(2, 2)], [Cell(8, 8)], None, (9, 9)), []
    observe = dragdiffusion.observer(Denoiser(LinearUNet(), SCHEDULE, TEXT, 50), LEVEL, task, config)
    supervise = dragdiffusion.supervisor(task, config)
    steps = list(whole())
    assert len(steps) == 3 and returned[0] is steps[-1]
