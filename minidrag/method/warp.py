"""Warped start: move the objects under the handles in the noisy latent, each as a whole.

FastDrag (arXiv 2405.15769) stretches the latent between handle and target instead.
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d, normalize

from minidrag.method.drag import Cell, Cells, patch, rescale, sample, snap
from minidrag.method.dragdiffusion import Task

# Likeness to a handle: its unit feature times the mean of the unit features in a cell of the latent. It is at
# most their cosine, and less on the edge of an object, where the features of a cell differ.
SIMILAR = 0.45  # least likeness to the handle, where there is no mask to compare with
# A cell inside the mask belongs to the object if its likeness exceeds its largest cosine with a cell outside,
# less RIVAL, or if that cosine is below UNLIKE, whatever it looks like: eyes, wheels.
RIVAL = 0.2
UNLIKE = 0.4
# Uncovered cells copy this many neighbors in rotation: one cell repeated is not noise and becomes artifacts.
SPREAD = 16
TURN = 7  # coprime to SPREAD, so that neighbors are filled from different cells
LANDED = 0.75  # cells between a cell and the content that lands on it, at most
CUT = 0.1  # an object of which the mask cuts off more than this fraction is not moved: the drag stretches it


def warp(latent: Tensor, task: Task, features: Tensor) -> tuple[Tensor, Cells]:
    """Move the objects that lie within the mask; return the latent and its handles.

    latent: (1, 4, H, W). features: (C, R, S), of the original. Each cell of an object follows the nearest
    handle. Uncovered cells are filled from nearby cells that do not move.
    """
    shape = latent.shape[2:]
    editable = torch.ones(shape, device=latent.device) if task.mask is None else task.mask
    objects = torch.stack([object_cells(features, handle, editable) for handle in task.handles])  # (N, H, W)
    whole = (objects * (1 - editable)).sum((1, 2)) <= CUT * objects.sum((1, 2))  # (N,), not cut by the mask
    moving = (objects[whole].sum(0) * editable).flatten() > 0  # (H W,)
    if not moving.any() or moving.all():
        return latent, task.handles
    cells = torch.cartesian_prod(*(torch.arange(size) for size in shape)).to(latent.device, torch.float32)
    source = fill(cells, moving)
    grids = task.grid, (shape[0], shape[1])
    handles = cells.new_tensor(rescale(task.handles, *grids))
    targets = cells.new_tensor(rescale(task.targets, *grids))
    landing, mover = land(cells, moving, handles, targets)
    source = torch.where(landing & (editable.flatten() > 0), mover, source)
    warped = latent.flatten(2)[:, :, source].unflatten(2, shape)
    pairs = zip(task.handles, task.targets, whole.tolist(), strict=True)
    return warped, [snap(target, task.grid) if moved else handle for handle, target, moved in pairs]


def fill(cells: Tensor, moving: Tensor) -> Tensor:
    """Source of each cell, (H W,): itself, or if it moves away a nearby cell that does not.

    cells: (H W, 2). moving: (H W,), bool.
    """
    movers = moving.nonzero().flatten()
    others = (~moving).nonzero().flatten()
    near = torch.cdist(cells[movers], cells[others]).argsort(stable=True)[:, :SPREAD]  # (M, SPREAD)
    turns = TURN * torch.arange(len(movers)) % near.shape[1]
    source = torch.arange(len(cells), device=cells.device)
    source[movers] = others[near[range(len(movers)), turns]]
    return source


def land(cells: Tensor, moving: Tensor, handles: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cells on which a moving cell lands, (H W,), bool, and the moving cell that lands nearest, (H W,).

    cells: (H W, 2). moving: (H W,), bool. handles, targets: (N, 2), in cells of the latent.
    """
    movers = moving.nonzero().flatten()
    drags = (targets - handles)[torch.cdist(cells, handles).argmin(1)]  # (H W, 2)
    distance, nearest = torch.cdist(cells, (cells + drags)[movers]).min(1)
    return distance < LANDED, movers[nearest]


def object_cells(features: Tensor, handle: Cell, editable: Tensor) -> Tensor:
    """Cells of the object under a handle: (H, W), 1 or 0.

    They connect to the handle and are more similar to it than to the cells outside the mask.
    features: (C, R, S). editable: (H, W), 1 in the editable region.
    """
    features = normalize(features - features.mean((1, 2), keepdim=True), dim=0)
    own = normalize(sample(features, patch(handle, 1, features)).mean(1), dim=0)  # (C,)
    cells = interpolate(features[None], size=editable.shape, mode="area")[0].flatten(1)  # (C, H W)
    likeness = own @ cells  # (H W,)
    similar = likeness > SIMILAR
    inside = editable.flatten() > 0
    if not inside.all():
        unit = normalize(cells, dim=0)
        rival = (unit.T @ unit)[:, ~inside].amax(1)  # (H W,), largest cosine with a cell outside
        similar = torch.where(inside, (likeness > rival - RIVAL) | (rival < UNLIKE), similar)
    sizes = zip(handle, editable.shape, features.shape[1:], strict=True)
    return connected(similar.unflatten(0, editable.shape), *(int(at * n / m) for at, n, m in sizes))


def connected(region: Tensor, row: int, column: int) -> Tensor:
    """Cells of a region, (H, W), bool, that connect to one cell, diagonally too: (H, W), 1 or 0."""
    allowed = region.float()[None, None]
    grown = torch.zeros_like(allowed)
    grown[..., row, column] = 1
    component = torch.zeros_like(grown)
    while not torch.equal(component, grown):
        component = grown
        grown = torch.maximum(component, max_pool2d(component, 3, 1, 1) * allowed)
    return component[0, 0]
