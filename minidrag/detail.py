"""Detail of the original in an edit that was made at the working size.

An edit that is enlarged is a blur, even where nothing changed, and the autoencoder loses detail at any size.
But most of an edit is the original, still or moved along with an object, so the original's pixels can take
its place.
"""

from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d, pad

from minidrag import images
from minidrag.method.drag import Cell, rescale, sample, snap
from minidrag.method.warp import connected
from minidrag.points import Pixel

TOLERANCE = 10 / 127.5  # by which an edit may differ from what explains it: 10 levels of 255
# Tolerance more, times the difference of neighboring pixels: an edge off by half a pixel differs most.
EDGE_TOLERANCE = 2
AREA = 5  # pixels at the working size: side of the smallest square that is explained as moved
STILL_AREA = 9  # and as still: the edges of an object that is gone, which are thinner, are not
MOVED = 0.5  # of the still original's misfit, at most, where the moved original is the explanation
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
    Where neither the moved nor the still original explains the edit, it is enlarged.
    """
    scale = torch.tensor(original.size) / torch.tensor(edit.size)
    result = images.resize(edit, original.size).copy()
    for move, weight in parts(reconstruction, edit, handles, targets, original.size):
        share = Image.fromarray((255 * weight).round().byte().numpy())
        share = share.resize(original.size, Image.Resampling.BILINEAR)
        if box := share.getbbox():
            right, down = (move.flip(0) * scale).tolist()
            result.paste(shift(original, right, down, box), box, share.crop(box))
    return result


def parts(
    reconstruction: Image.Image,
    edit: Image.Image,
    handles: Sequence[Pixel],
    targets: Sequence[Pixel],
    size: tuple[int, int],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of an edit that the original explains, as by `explain`.

    reconstruction, edit: of one size. handles, targets: in pixels of an image of `size`, (width, height).
    """
    small, source = (images.to_tensor(image)[0] for image in (edit, reconstruction))
    starts, ends = (torch.tensor(rescale(points, size, edit.size)).flip(1) for points in (handles, targets))
    return explain(small, source, starts, ends)


def shift(image: Image.Image, right: float, down: float, box: tuple[int, int, int, int]) -> Image.Image:
    """Shift an image by pixels and fractions of them, and crop it; black comes in."""
    left, top, *_ = box
    if right == down == 0:
        return image.crop(box)
    size = box[2] - left, box[3] - top
    affine = 1, 0, left - right, 0, 1, top - down
    return image.transform(size, Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)


def explain(edit: Tensor, original: Tensor, starts: Tensor, ends: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Explain an edit by the original, moved along each drag, and still elsewhere.

    edit, original: (3, H, W), -1 to 1. starts, ends: (N, 2), row and column. Yields moves, (2,), down and
    right, with their weight, (H, W), 0 to 1, the still original last; no pixel has a weight of two. What
    arrived up to a pixel from its target counts as moved, so that it comes to lie on the very target.
    """
    source = torch.cat([original, gradient(original)])  # (3, H, W) -> (6, H, W)
    still = misfit(edit, source, torch.zeros(2))
    moved = torch.zeros_like(still, dtype=torch.bool)
    uncovered = moved.clone()  # alike or not, it is not still: the shadow of an object that is gone
    for start, end in zip(starts, ends, strict=True):
        misfits = misfit(edit, source, end - start)
        region = moved_region(misfits, still, end)
        if region.any():
            misfits = misfit(edit, source, refine(edit, source, end - start, region.nonzero()))
            region = moved_region(misfits, still, end) & ~moved
        yield end - start, region * likelihood(misfits)
        moved |= region
        uncovered |= grow(shifted(region, start - end), AREA)
    yield torch.zeros(2), open_up((still < 1) & ~moved & ~uncovered, STILL_AREA) * likelihood(still)


def likelihood(misfits: Tensor) -> Tensor:
    """1 up to half of the tolerance, 0 above it."""
    return (2 - 2 * misfits).clamp(0, 1)


def moved_region(misfits: Tensor, still: Tensor, target: Tensor) -> Tensor:
    """Pixels that the moved original explains better than the still one, as far as they connect to a target.

    misfits, still: (H, W). target: (2,), row and column. Returns (H, W), bool.
    """
    region = open_up((misfits < 1) & (misfits < MOVED * still), AREA)
    height, width = misfits.shape
    row, column = map(int, snap(Cell(*target.tolist()), (height, width)))
    start = torch.zeros_like(region)
    start[row, column] = True
    return region & (connected(region | grow(start, AREA), row, column) > 0)


def misfit(edit: Tensor, source: Tensor, move: Tensor) -> Tensor:
    """Mean difference of an edit from the moved original around every pixel: (H, W), in tolerances."""
    shape = edit.shape[1:]
    pixels = torch.cartesian_prod(*map(torch.arange, shape))
    each = differences(edit, source, move, pixels).view(1, *shape)
    return avg_pool2d(each, AREA, 1, AREA // 2, count_include_pad=False)[0]


def differences(edit: Tensor, source: Tensor, move: Tensor, pixels: Tensor) -> Tensor:
    """Difference of an edit, (3, H, W), from the moved original at pixels (P, 2): (P,), in tolerances.

    source: (6, H, W), the original and its gradient. move: (2,), pixels down and right.
    """
    origins = pixels - move
    moved, slope = sample(source, origins).split(3)
    row, column = pixels.T
    beyond = ((origins < 0) | (origins > torch.tensor(edit.shape[1:]) - 1)).any(1)
    tolerances = TOLERANCE + EDGE_TOLERANCE * slope
    return ((edit[:, row, column] - moved).abs() / tolerances).mean(0) + NEVER * beyond


def refine(edit: Tensor, source: Tensor, move: Tensor, pixels: Tensor) -> Tensor:
    """Search near a move for the one that the edit made at some pixels, (P, 2)."""
    around = torch.cartesian_prod(torch.arange(-1.0, 2), torch.arange(-1.0, 2))
    for step in STEPS:
        nearby = move + step * around
        move = min(nearby, key=lambda near: differences(edit, source, near, pixels).mean().item())
    return move


def shifted(region: Tensor, move: Tensor) -> Tensor:
    """Shift a region, (H, W), bool, by pixels down and right, to whole ones; what leaves it is lost."""
    pixels = region.nonzero() + move.round().long()
    pixels = pixels[((pixels >= 0) & (pixels < torch.tensor(region.shape))).all(1)]
    result = torch.zeros_like(region)
    result[tuple(pixels.T)] = True
    return result


def grow(region: Tensor, side: int) -> Tensor:
    """All squares with a side in pixels, odd, around the pixels of a region, (H, W), bool."""
    return max_pool2d(region.float()[None], side, 1, side // 2)[0] > 0


def open_up(region: Tensor, side: int) -> Tensor:
    """All squares with a side in pixels inside a region, (H, W), bool (morphological opening)."""
    return grow(~grow(~region, side), side)


def gradient(image: Tensor) -> Tensor:
    """Central differences of an image (C, H, W), the larger of both axes."""
    wide = pad(image[None], (1, 1, 1, 1), "replicate")[0]
    across = wide[:, 1:-1, 2:] - wide[:, 1:-1, :-2]
    along = wide[:, 2:, 1:-1] - wide[:, :-2, 1:-1]
    return torch.maximum(across.abs(), along.abs()) / 2
