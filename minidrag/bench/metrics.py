"""How good an edited picture is: beside the truth where it is known, and as the paper measures it.

MD, the mean distance, asks the features of a diffusion model where the things went; IF, the image fidelity,
asks a network that was trained on people's judgement how much of the original is left (paper section 4).
"""

import importlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from minidrag.config import EditConfig
from minidrag.edit import encode
from minidrag.images import Point, to_tensor
from minidrag.weights.model import Model

SAME = 100.0  # dB that pictures without any difference get, in place of infinity
CHUNK = 64  # channels that are enlarged at a time: all of them at once fill gigabytes for a large picture


def psnr(one: Image.Image, other: Image.Image, where: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB, at most SAME. where: (H, W), bool, the pixels that count."""
    squares = (np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)) ** 2
    error = squares.mean() if where is None else squares[where].mean()
    return SAME if error == 0 else min(SAME, float(10 * np.log10(255**2 / error)))


def ssim(one: Image.Image, other: Image.Image, where: np.ndarray | None = None) -> float:
    """Structural similarity (Wang et al. 2004), 1 for the same picture, the mean over colours and pixels.

        SSIM = (2 m_x m_y + c_1) (2 s_xy + c_2) / ((m_x^2 + m_y^2 + c_1) (s_x^2 + s_y^2 + c_2))

    where: (H, W), bool, the pixels that count.
    """
    x, y = (np.asarray(picture, dtype=np.float64) for picture in (one, other))
    mean_x, mean_y = smooth(x), smooth(y)
    var_x, var_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    both = smooth(x * y) - mean_x * mean_y
    c_1, c_2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similar = (2 * mean_x * mean_y + c_1) * (2 * both + c_2)
    similar /= (mean_x**2 + mean_y**2 + c_1) * (var_x + var_y + c_2)
    return float(similar.mean() if where is None else similar[where].mean())


def smooth(values: np.ndarray) -> np.ndarray:
    """Means under a Gaussian of deviation 1.5, cut to 11 x 11: (H, W, C). The picture's border mirrors it."""
    weights = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        reach = [(5, 5) if i == axis else (0, 0) for i in range(values.ndim)]
        padded, length = np.pad(values, reach, mode="symmetric"), values.shape[axis]
        parts = [padded.take(range(i, i + length), axis) * weight for i, weight in enumerate(weights)]
        values = np.sum(parts, axis=0)
    return values


@torch.no_grad()
def picture_features(
    model: Model,
    picture: Image.Image,
    prompt: str,
    time: int = 261,
    block: int = 2,
    seed: int = 42,
    size: int | None = None,
) -> Tensor:
    """What a UNet makes of a picture under some noise, the mean over 8 draws of it (DIFT, arXiv 2306.03881).

    time: the level of the noise. block: which up block's output, 1 to 4. size: shorter side at which the
    model sees the picture, as in EditConfig. Returns (C, h, w), float64, on the CPU.
    Every picture gets the same noise, so that equal places have equal features.
    """
    clean, _ = encode(model, picture, EditConfig(size=size))
    noise = torch.randn(8, *clean.shape[1:], generator=torch.Generator().manual_seed(seed)).to(clean)
    timestep = torch.full((8,), time, device=clean.device)
    noisy = model.schedule.add_noise(clean.expand_as(noise), noise, timestep)
    text = model.encode_text(prompt).expand(8, -1, -1)
    return model.unet(noisy, timestep, text).features[block - 1].cpu().double().mean(dim=0)


def enlarged(features: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, h, w) -> (C, height, width). size: (width, height) of the picture."""
    return interpolate(features[None], size=size[::-1], mode="bilinear", align_corners=False)[0]


def matches(
    before: Tensor, after: Tensor, handles: Sequence[Point], size: tuple[int, int]
) -> list[tuple[int, int]]:
    """Where in the edited picture each handle's feature is found again: the largest cosine of all pixels.

    before, after: of `picture_features`. Handles and what is returned are (x, y), in pixels of `size`.
    """
    width, height = size
    spots = [(min(max(round(y), 0), height - 1), min(max(round(x), 0), width - 1)) for x, y in handles]
    rows, columns = zip(*spots, strict=True)
    chunks = list(zip(before.split(CHUNK), after.split(CHUNK), strict=True))
    sought = torch.cat([enlarged(chunk, size)[:, rows, columns] for chunk, _ in chunks])  # (C, handles)
    lengths = sum(enlarged(chunk, size).square().sum(dim=0) for _, chunk in chunks)  # (height, width)
    # Enlarging is linear, so the products may be enlarged in place of the features.
    products = enlarged(torch.einsum("cn,chw->nhw", sought, after), size)
    places = (products / torch.as_tensor(lengths).sqrt()).flatten(1).argmax(dim=1).tolist()
    return [(place % width, place // width) for place in places]


def distances(
    before: Tensor, after: Tensor, handles: Sequence[Point], targets: Sequence[Point], size: tuple[int, int]
) -> list[float]:
    """What MD is the mean of, a distance in pixels for each pair. before, after: of `picture_features`."""
    found = matches(before, after, handles, size)
    return [math.dist(place, target) for place, target in zip(found, targets, strict=True)]


class Missing(RuntimeError):
    """A measure that cannot be had here; its message says why."""


def fidelity_network() -> nn.Module:
    """LPIPS with AlexNet (arXiv 1801.03924); raises Missing where it or its weights cannot be had."""
    try:
        lpips = importlib.import_module("lpips")
    except ImportError:
        raise Missing("IF is left out: it needs the package lpips (pip install 'minidrag[bench]')") from None
    try:
        return lpips.LPIPS(net="alex", verbose=False).eval().requires_grad_(False)
    except (OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Missing(f"IF is left out: the weights of AlexNet cannot be fetched ({reason})") from error


@torch.no_grad()
def image_fidelity(network: nn.Module, before: Image.Image, after: Image.Image) -> float:
    """IF: 1 - LPIPS of the original and the edited picture, both at 224 x 224; 1 where nothing changed."""
    one, other = (
        interpolate(to_tensor(picture), size=(224, 224), mode="bilinear") for picture in (before, after)
    )
    return 1 - float(network(one, other))


def ranks(values: Sequence[float]) -> np.ndarray:
    """The place of each value in order, from 0; equal ones share the mean of their places."""
    _, group, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[group]


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's, from -1 to 1; None where it means nothing: under three pairs, or all values the same."""
    first, second = ranks(one), ranks(other)
    if len(first) < 3 or first.std() == 0 or second.std() == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def bootstrap(values: Sequence[float], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a mean: its percentiles over samples drawn from the values with replacement."""
    chosen = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.percentile(np.asarray(values, dtype=float)[chosen].mean(axis=1), (2.5, 97.5))
    return float(low), float(high)
