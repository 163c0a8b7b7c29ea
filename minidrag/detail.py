"""Detail of the original in an edit that was made at the working size.

An edit that is enlarged is a blur, even where nothing changed, and the autoencoder loses detail at any size.
But most of an edit is the original, still or moved along with an object, so the original's pixels can take
its place.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from minidrag import images
from minidrag.method.drag import sample
from minidrag.points import Pixel

TOLERANCE = 10  # levels of 255 by which an edit may differ from what explains it
# Levels more for each level of difference between neighboring pixels: an edge that is off by half a pixel
# differs most.
EDGE_TOLERANCE = 2
AREA = 5  # pixels at the working size, the side of a square that is explained as a whole
STILL = 0.9  # of its misfit: where nothing moved is the likelier explanation
STEPS = (0.5, 0.25, 0.125)  # pixels at the working size, of the search for the shift that the edit made
NEVER = 1e6  # misfit of content from beyond the border


def carry_detail(
    original: Image.Image,
    reconstruction: Image.Image,
    edit: Image.Image,
    handles: Sequence[Pixel],
    targets: Sequence[Pixel],
) -> Image.Image:
    """Bring an edit to the original's size, by the original's own pixels where they explain it.

    reconstruction, edit: at the working size. handles, targets: in pixels of the original.
    Where neither the still nor the moved original explains the edit, it is enlarged.
    """
    scale = torch.tensor(original.size) / torch.tensor(edit.size)
    moves = (torch.tensor(targets) - torch.tensor(handles)) / scale  # (N, 2), right and down
    moves, weights = explain(levels(edit), levels(reconstruction), moves.flip(1))
    enlarged = np.asarray(images.resize(edit, original.size))
    result = enlarged.astype(np.float32)
    for move, weight in zip(moves, weights, strict=True):
        moved = shift(original, *(move.flip(0) * scale).tolist())
        difference = np.asarray(moved).astype(np.float32) - enlarged
        share = Image.fromarray(weight.numpy()).resize(original.size, Image.Resampling.BILINEAR)
        difference *= np.asarray(share)[..., None]
        result += difference
    return Image.fromarray(result.round().clip(0, 255).astype(np.uint8))


def shift(image: Image.Image, right: float, down: float) -> Image.Image:
    """Shift an image by pixels and fractions of them; black comes in."""
    if right == down == 0:
        return image
    affine = 1, 0, -right, 0, 1, -down
    return image.transform(image.size, Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)


def explain(edit: Tensor, original: Tensor, moves: Tensor) -> tuple[list[Tensor], Tensor]:
    """Explain an edit, (3, H, W), by the original as it was and moved; both at the working size.

    moves: (N, 2), pixels down and right. What arrived up to a pixel from its target counts as moved, so that
    it comes to lie on the very target. Returns the distinct moves, each (2,), none first, and the weight
    of each at every pixel, (M, H, W): 0 to 1, of one move at most.
    """
    source = torch.cat([original, gradient(original)])  # (3, H, W) -> (6, H, W)
    distinct = [torch.zeros(2)]
    for move in moves:
        if all((move - other).abs().max() >= 1 for other in distinct):
            distinct.append(move)
    costs = torch.stack([cost(edit, source, move) for move in distinct])
    costs[0] *= STILL
    numbers = torch.arange(len(distinct))[:, None, None]
    for index, best in enumerate(costs.argmin(0) == numbers):
        if index and best.any():
            costs[index] = cost(edit, source, refine(edit, source, distinct[index], best.nonzero()))
    lowest, label = costs.min(0)
    return distinct, torch.where(label == numbers, (2 - 2 * lowest).clamp(0, 1), 0)


def cost(edit: Tensor, source: Tensor, move: Tensor) -> Tensor:
    """Mean misfit around every pixel of an edit, (3, H, W): (H, W)."""
    shape = edit.shape[1:]
    pixels = torch.cartesian_prod(*map(torch.arange, shape))
    misfits = misfit(edit, source, move, pixels).view(1, *shape)
    return avg_pool2d(misfits, AREA, 1, AREA // 2, count_include_pad=False)[0]


def misfit(edit: Tensor, source: Tensor, move: Tensor, pixels: Tensor) -> Tensor:
    """Difference of an edit at pixels (P, 2), row and column, from the moved original, in tolerances: (P,).

    source: (6, H, W), the original's levels and their gradient.
    """
    origins = pixels - move
    moved, slope = sample(source, origins).split(3)
    row, column = pixels.T
    differences = (edit[:, row, column] - moved).abs() / (TOLERANCE + EDGE_TOLERANCE * slope)
    beyond = (origins < 0) | (origins > torch.tensor(edit.shape[1:]) - 1)
    return differences.mean(0) + NEVER * beyond.any(1)


def refine(edit: Tensor, source: Tensor, move: Tensor, pixels: Tensor) -> Tensor:
    """Search near a move for the one that the edit made at some pixels, (P, 2)."""
    around = torch.cartesian_prod(torch.arange(-1.0, 2), torch.arange(-1.0, 2))
    for step in STEPS:
        move = min(move + step * around, key=lambda near: misfit(edit, source, near, pixels).mean().item())
    return move


def gradient(image: Tensor) -> Tensor:
    """Central differences of an image (C, H, W), the larger of both axes."""
    wide = pad(image[None], (1, 1, 1, 1), "replicate")[0]
    across = wide[:, 1:-1, 2:] - wide[:, 1:-1, :-2]
    along = wide[:, 2:, 1:-1] - wide[:, :-2, 1:-1]
    return torch.maximum(across.abs(), along.abs()) / 2


def levels(image: Image.Image) -> Tensor:
    """RGB image to (3, H, W), 0 to 255."""
    return torch.from_numpy(np.array(image)).float().permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)
