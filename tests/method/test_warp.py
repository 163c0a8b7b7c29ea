"""The warped start against a slow loop over cells, and what it moves and leaves."""

import math

import pytest
import torch
from torch import Tensor

from minidrag.method.drag import Cell
from minidrag.method.dragdiffusion import Task
from minidrag.method.warp import CUT, RIVAL, SIMILAR, SPREAD, UNLIKE, object_cells, warp

LATENT, GRID = (9, 10), (18, 20)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scene(*boxes: tuple[int, int, int, int]) -> Tensor:
    """Features of boxes (top, left, bottom, right) on a background, (C, *GRID), all boxes different."""
    features = torch.zeros(len(boxes) + 1, *GRID)
    features[0] = 1
    for number, (top, left, bottom, right) in enumerate(boxes, 1):
        features[:, top:bottom, left:right] = torch.eye(len(boxes) + 1)[number, :, None, None]
    return features + 0.01 * random(*features.shape, seed=7)


Place = tuple[int, int]


def units_by_loop(features: Tensor) -> list[list[Tensor]]:
    """The centered, normalized features of each cell of the grid."""
    rows, columns = features.shape[1:]
    centered = features - features.mean((1, 2), keepdim=True)
    return [[centered[:, r, c] / centered[:, r, c].norm() for c in range(columns)] for r in range(rows)]


def looks_by_loop(unit: list[list[Tensor]]) -> list[list[list[Tensor]]]:
    """The features of each cell of the latent: those of a few cells of the grid."""
    rows, columns = len(unit), len(unit[0])
    tall, wide = rows // LATENT[0], columns // LATENT[1]
    return [
        [
            [unit[tall * y + i][wide * x + j] for i in range(tall) for j in range(wide)]
            for x in range(LATENT[1])
        ]
        for y in range(LATENT[0])
    ]


def belongs_by_loop(features: Tensor, handle: Cell, mask: Tensor) -> set[Place]:
    """Cells like the handle; in the mask more like it than like what is outside, or like nothing there."""
    unit, (rows, columns) = units_by_loop(features), features.shape[1:]
    near = [
        unit[r][c]
        for r in range(int(handle.row) - 1, int(handle.row) + 2)
        for c in range(int(handle.column) - 1, int(handle.column) + 2)
        if 0 <= r < rows and 0 <= c < columns
    ]
    own = torch.stack(near).mean(0)
    own = own / own.norm()
    looks = looks_by_loop(unit)
    means = {(y, x): torch.stack(looks[y][x]).mean(0) for y in range(LATENT[0]) for x in range(LATENT[1])}
    outside = [mean for place, mean in means.items() if mask[place] == 0]
    found = set()
    for (y, x), mean in means.items():
        alike = sum(float(look @ own) for look in looks[y][x]) / len(looks[y][x])
        if outside and mask[y, x] > 0:
            rival = max(float(torch.cosine_similarity(mean, other, dim=0)) for other in outside)
            belongs = alike > rival - RIVAL or rival < UNLIKE
        else:
            belongs = alike > SIMILAR
        found |= {(y, x)} if belongs else set()
    return found


def thing_by_loop(features: Tensor, handle: Cell, mask: Tensor | None = None) -> set[Place]:
    """Flood fill over the eight neighbors."""
    belongs = belongs_by_loop(features, handle, torch.ones(LATENT) if mask is None else mask)
    start = int(handle.row * LATENT[0] / GRID[0]), int(handle.column * LATENT[1] / GRID[1])
    found, waiting = {start}, [start]
    while waiting:
        row, column = waiting.pop()
        for r in range(max(row - 1, 0), min(row + 2, LATENT[0])):
            for c in range(max(column - 1, 0), min(column + 2, LATENT[1])):
                if (r, c) in belongs and (r, c) not in found:
                    found.add((r, c))
                    waiting.append((r, c))
    return found


def warp_by_loop(latent: Tensor, task: Task, features: Tensor) -> tuple[Tensor, list[Cell]]:
    cells = [(row, column) for row in range(LATENT[0]) for column in range(LATENT[1])]

    def shrunk(cell: Cell) -> tuple[float, ...]:
        return tuple((at + 0.5) * n / m - 0.5 for at, n, m in zip(cell, LATENT, GRID, strict=True))

    handles, targets = [shrunk(cell) for cell in task.handles], [shrunk(cell) for cell in task.targets]
    editable = {cell for cell in cells if task.mask is None or task.mask[cell] > 0}
    moving, ends = set(), []
    for handle, target in zip(task.handles, task.targets, strict=True):
        found = thing_by_loop(features, handle, task.mask)
        free = len(found - editable) <= CUT * len(found)
        moving |= found & editable if free else set()
        ends.append(Cell(*map(round, target)) if free else handle)
    landed = {}
    for cell in cells:
        if cell in moving:
            nearest = min(range(len(handles)), key=lambda i: math.dist(cell, handles[i]))
            pairs = zip(cell, handles[nearest], targets[nearest], strict=True)
            landed[cell] = tuple(at + end - start for at, start, end in pairs)
    warped = latent.clone()
    for cell in editable:
        source = min(landed, key=lambda other: math.dist(cell, landed[other]), default=cell)
        if not landed or math.dist(cell, landed[source]) >= 0.75:
            source = cell
            if cell in moving:
                staying = sorted((x for x in cells if x not in moving), key=lambda x: math.dist(cell, x))
                near = staying[:SPREAD]
                source = near[7 * sorted(moving).index(cell) % len(near)]
        warped[..., cell[0], cell[1]] = latent[..., source[0], source[1]]
    return warped, ends


BOX = (6, 6, 12, 12)
ALL_BUT_THE_RIM = torch.zeros(LATENT)
ALL_BUT_THE_RIM[1:-1, 1:-1] = 1
CASES: dict[str, tuple[Tensor, list[Cell], list[Cell], Tensor | None]] = {
    "one object": (scene(BOX), [Cell(9, 9)], [Cell(5, 12.3)], ALL_BUT_THE_RIM),
    "without a mask": (scene(BOX), [Cell(9, 9)], [Cell(12.7, 4.1)], None),
    "out of the image": (scene(BOX), [Cell(9, 9)], [Cell(1, 19)], None),
    "from the corner": (scene((0, 0, 5, 6)), [Cell(0, 0)], [Cell(6, 3)], None),
    "to the rim of the mask": (scene(BOX), [Cell(9, 9)], [Cell(9, 15)], ALL_BUT_THE_RIM),
    "two objects": (
        scene(BOX, (12, 14, 18, 20)),
        [Cell(9, 9), Cell(15, 17)],
        [Cell(5, 9), Cell(15, 13)],
        None,
    ),
    "torn apart": (scene(BOX), [Cell(7, 9), Cell(10, 9)], [Cell(3, 9), Cell(14, 9)], None),
    "one end kept": (scene(BOX), [Cell(7, 9), Cell(10, 9)], [Cell(3, 9), Cell(10, 9)], None),
}


@pytest.mark.parametrize("name", CASES)
def test_a_warp_is_that_of_a_slow_loop(name: str) -> None:
    features, handles, targets, mask = CASES[name]
    latent, task = random(1, 4, *LATENT), Task(handles, targets, mask, GRID)
    expected, ends = warp_by_loop(latent, task, features)
    found, moved = warp(latent, task, features)
    assert torch.equal(found, expected) and moved == ends
    assert not torch.equal(found, latent)


@pytest.mark.parametrize("seed", range(4))
def test_the_object_is_what_a_flood_fill_finds(seed: int) -> None:
    features = torch.nn.functional.avg_pool2d(random(1, 3, *GRID, seed=seed), 5, 1, 2)[0]
    handle = Cell(4.0 * seed, 5.0 * seed)
    for mask in (torch.ones(LATENT), (random(*LATENT, seed=9) > 1).float(), torch.zeros(LATENT)):
        expected = thing_by_loop(features, handle, mask)
        assert {(int(r), int(c)) for r, c in object_cells(features, handle, mask).nonzero()} == expected
        assert len(expected) > 1


def test_a_part_of_another_look_moves_with_its_object() -> None:
    """An eye in a face goes along, unless such eyes are outside the mask too."""
    for other, goes in ((0, True), (1, False)):
        features = scene((6, 6, 14, 14), (8, 8, 10, 10))
        if other:
            features[:, :2, :2] = features[:, 8:10, 8:10]
        found = object_cells(features, Cell(12, 12), ALL_BUT_THE_RIM)
        assert bool(found[4, 4]) == goes and found[6, 6] and found[3:7, 3:7].sum() == 15 + goes
        assert found.sum() == 15 + goes


def test_an_object_moves_by_whole_cells_and_its_surroundings_fill_the_hole() -> None:
    latent, task = random(1, 4, *LATENT), Task([Cell(9, 9)], [Cell(9, 13)], None, GRID)
    warped, _ = warp(latent, task, scene(BOX))
    assert torch.equal(warped[..., 3:6, 5:8], latent[..., 3:6, 3:6])  # the box, two cells to the right
    around = [latent[0, :, row, column] for row in range(9) for column in range(8) if row not in (3, 4, 5)]
    around += [latent[0, :, row, column] for row in (3, 4, 5) for column in (0, 1, 2, 6, 7)]
    filled = [warped[0, :, row, column] for row in (3, 4, 5) for column in (3, 4)]
    assert all(any(torch.equal(cell, other) for other in around) for cell in filled)
    assert len({tuple(cell.tolist()) for cell in filled}) >= 5  # of 6: noise hardly repeats itself
    warped[..., 3:6, 3:8] = latent[..., 3:6, 3:8]
    assert torch.equal(warped, latent)


def test_opposite_drags_do_not_cancel() -> None:
    latent = random(1, 4, *LATENT)
    task = Task([Cell(7, 9), Cell(10, 9)], [Cell(3, 9), Cell(14, 9)], None, GRID)
    warped, _ = warp(latent, task, scene(BOX))
    assert torch.equal(warped[..., 1, 3:6], latent[..., 3, 3:6])
    assert torch.equal(warped[..., 7, 3:6], latent[..., 5, 3:6])


def test_an_object_that_the_mask_cuts_stays() -> None:
    mask = torch.ones(LATENT)
    mask[5:] = 0  # a third of the box
    latent = random(1, 4, *LATENT)
    warped, handles = warp(latent, Task([Cell(7, 9)], [Cell(1, 9)], mask, GRID), scene(BOX))
    assert torch.equal(warped, latent) and handles == [Cell(7, 9)]


def test_nothing_changes_outside_the_mask() -> None:
    latent = random(1, 4, *LATENT)
    task = Task([Cell(9, 9)], [Cell(9, 16)], ALL_BUT_THE_RIM, GRID)
    warped, _ = warp(latent, task, scene(BOX))
    outside = ALL_BUT_THE_RIM == 0
    assert torch.equal(warped[..., outside], latent[..., outside]) and not torch.equal(warped, latent)


def test_without_anything_to_move_the_latent_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    latent, task = random(1, 4, *LATENT), Task([Cell(9, 9)], [Cell(9, 13)], None, GRID)
    for value in (0.0, 1.0):  # no cell, all cells
        monkeypatch.setattr(
            "minidrag.method.warp.object_cells", lambda *_, value=value: torch.full(LATENT, value)
        )
        warped, handles = warp(latent, task, scene(BOX))
        assert torch.equal(warped, latent) and handles == task.handles
