"""A warped start: as in FastDrag (arXiv 2405.15769) the noisy latent is moved, but each object as a whole."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d, normalize

from minidrag.method.drag import Cell, Cells, patch, sample, snap
from minidrag.method.dragdiffusion import Task

SIMILAR = 0.45  # least cosine of an object's features with its handle's where no mask tells more
RIVAL = 0.2  # how much more a cell in the mask may look like one outside than like the handle
UNLIKE = 0.4  # a cell in the mask that resembles all outside less is part of an object: an eye, a wheel
SPREAD = 16  # near cells that fill in turn: a latent that repeats one cell is not noise, and grows phantoms
CUT = 0.1  # an object of which the mask cuts off more than this fraction is stretched, not moved


def warp(latent: Tensor, task: Task, features: Tensor) -> tuple[Tensor, Cells]:
    """Move the objects that lie within the mask; return the latent and where its handles are then.

    latent: (1, 4, H, W). features: (C, R, S), of the original. Each cell of an object follows the nearest
    handle. What an object uncovers is filled from nearby cells that stay.
    """
    shape = list(latent.shape[2:])
    scale = torch.tensor(shape, device=latent.device) / torch.tensor(task.grid, device=latent.device)
    handles, targets = ((scale.new_tensor(at) + 0.5) * scale - 0.5 for at in (task.handles, task.targets))
    editable = torch.ones(shape, device=latent.device) if task.mask is None else task.mask
    objects = torch.stack([object_cells(features, handle, editable) for handle in task.handles])  # (N, H, W)
    free = (objects * (1 - editable)).sum((1, 2)) <= CUT * objects.sum((1, 2))  # (N,)
    moving = (objects[free].sum(0) * editable).flatten() > 0  # (H W,)
    if not 0 < moving.sum() < len(moving):  # nothing moves, or all of the image
        return latent, task.handles
    cells = torch.cartesian_prod(*(torch.arange(size) for size in shape)).to(scale)  # (H W, 2)
    drag = (targets - handles)[torch.cdist(cells, handles).argmin(1)]
    movers, others = moving.nonzero().flatten(), (~moving).nonzero().flatten()
    source = torch.arange(len(cells), device=latent.device)
    near = torch.cdist(cells[movers], cells[others]).argsort(stable=True)[:, :SPREAD]
    source[movers] = others[near[range(len(movers)), 7 * torch.arange(len(movers)) % near.shape[1]]]
    distance, nearest = torch.cdist(cells, (cells + drag)[movers]).min(1)
    source = torch.where((distance < 0.75) & (editable.flatten() > 0), movers[nearest], source)
    warped = latent.flatten(2)[:, :, source].unflatten(2, shape)
    pairs = zip(task.handles, task.targets, free.tolist(), strict=True)
    return warped, [snap(target, task.grid) if moved else handle for handle, target, moved in pairs]


def object_cells(features: Tensor, handle: Cell, editable: Tensor) -> Tensor:
    """Cells that connect to the handle and look more like it than like the rest: (H, W), 1 or 0."""
    shape, features = editable.shape, normalize(features - features.mean((1, 2), keepdim=True), dim=0)
    own = normalize(sample(features, patch(handle, 1, features)).mean(1), dim=0)
    cells = interpolate(features[None], size=shape, mode="area")[0].flatten(1)  # (C, H W)
    inside, unit, belongs = editable.flatten() > 0, normalize(cells, dim=0), own @ cells > SIMILAR
    if not inside.all():
        rival = (unit.T @ unit)[:, ~inside].amax(1)  # (H W,), largest cosine with a cell outside
        belongs = torch.where(inside, (own @ cells > rival - RIVAL) | (rival < UNLIKE), belongs)
    region = belongs.float().reshape(1, 1, *shape)
    found = torch.zeros_like(region)
    row, column = (int(at * n / m) for at, n, m in zip(handle, shape, features.shape[1:], strict=True))
    found[..., row, column] = 1
    while not torch.equal(found, grown := torch.maximum(found, max_pool2d(found, 3, 1, 1) * region)):
        found = grown
    return found[0, 0]
