"""Metrics of an edited image: against the true result, and MD and IF as in the paper.

MD, mean distance, finds the handles' content in the edited image by diffusion features. IF, image fidelity,
is the LPIPS similarity to the original (paper section 4).
"""

import importlib
import io
import math
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from minidrag.config import EditConfig
from minidrag.images import resize, to_tensor
from minidrag.model import Model, encode
from minidrag.points import Pixel

CHUNK = 64  # channels upsampled at a time: all of them would need gigabytes for a large image


def ssim(one: Image.Image, other: Image.Image) -> float:
    """Structural similarity (Wang et al. 2004), averaged over channels and pixels; 1 for equal images.

    SSIM = (2 m_x m_y + c_1) (2 s_xy + c_2) / ((m_x^2 + m_y^2 + c_1) (s_x^2 + s_y^2 + c_2))
    """
    x, y = (np.asarray(image, dtype=np.float64) for image in (one, other))
    mean_x = local_mean(x)
    mean_y = local_mean(y)
    var_x = local_mean(x * x) - mean_x**2
    var_y = local_mean(y * y) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    c_1 = (0.01 * 255) ** 2
    c_2 = (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c_1) * (2 * covariance + c_2)
    similarity /= (mean_x**2 + mean_y**2 + c_1) * (var_x + var_y + c_2)
    return float(similarity.mean())


def local_mean(values: np.ndarray) -> np.ndarray:
    """Mean under an 11x11 Gaussian window of std 1.5, with mirrored borders: (H, W, C)."""
    weights = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        width = [(5, 5) if i == axis else (0, 0) for i in range(values.ndim)]
        padded = np.pad(values, width, mode="symmetric")
        length = values.shape[axis]
        parts = [padded.take(range(i, i + length), axis) * weight for i, weight in enumerate(weights)]
        values = np.sum(parts, axis=0)
    return values


def sharpness(image: Image.Image, truth: Image.Image, region: np.ndarray) -> float:
    """Variance of the Laplacian in a region, (H, W), bool, over the truth's."""
    return float(laplacian(image)[region].var() / laplacian(truth)[region].var())


def laplacian(image: Image.Image) -> np.ndarray:
    """Sum of the differences from the four neighbors, mean over the channels: (H, W)."""
    gray = np.pad(np.asarray(image, dtype=np.float32).mean(axis=-1), 1, "edge")
    neighbors = gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:]
    return neighbors - 4 * gray[1:-1, 1:-1]


def detail(image: Image.Image, truth: Image.Image, region: np.ndarray, size: tuple[int, int]) -> float:
    """Correlation with the truth in a region, (H, W), bool, of what is finer than an image of `size`."""
    one, other = (
        (np.asarray(each, dtype=np.float32) - np.asarray(resize(resize(each, size), each.size)))[region]
        for each in (image, truth)
    )
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


@torch.no_grad()
def image_features(
    model: Model,
    image: Image.Image,
    prompt: str,
    time: int = 261,
    block: int = 2,
    seed: int = 42,
    size: int | None = None,
) -> Tensor:
    """UNet features of a noised image, averaged over 8 noise samples (DIFT, arXiv 2306.03881).

    time: timestep. block: up block, 1 to 4. size: working size, as in EditConfig. Returns (C, h, w), float64,
    on the CPU. All images get the same noise, so that equal content has equal features.
    """
    clean, _ = encode(model, image, EditConfig(size=size))
    noise = torch.randn(8, *clean.shape[1:], generator=torch.Generator().manual_seed(seed)).to(clean)
    timestep = torch.full((8,), time, device=clean.device)
    noisy = model.schedule.add_noise(clean.expand_as(noise), noise, timestep)
    text = model.encode_text(prompt).expand(8, -1, -1)
    return model.unet(noisy, timestep, text).features[block - 1].cpu().double().mean(dim=0)


def upsample(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Upsample (C, h, w) to (C, height, width). size: (width, height)."""
    return interpolate(features[None], size=size[::-1], mode="bilinear", align_corners=False)[0]


def matches(
    before: Tensor, after: Tensor, handles: Sequence[Pixel], size: tuple[int, int]
) -> list[tuple[int, int]]:
    """Pixel of the edited image whose feature has the largest cosine similarity to each handle's feature.

    before, after: from `image_features`. Handles and matches are (x, y) in pixels. size: (width, height).
    """
    width, height = size
    pixels = [(min(max(round(y), 0), height - 1), min(max(round(x), 0), width - 1)) for x, y in handles]
    rows, columns = zip(*pixels, strict=True)
    chunks = list(zip(before.split(CHUNK), after.split(CHUNK), strict=True))
    queries = torch.cat([upsample(chunk, size)[:, rows, columns] for chunk, _ in chunks])  # (C, handles)
    norms = sum(upsample(chunk, size).square().sum(dim=0) for _, chunk in chunks)  # (height, width)
    # Upsampling is linear, so the products can be upsampled instead of the features.
    products = upsample(torch.einsum("cn,chw->nhw", queries, after), size)
    best = (products / torch.as_tensor(norms).sqrt()).flatten(1).argmax(dim=1).tolist()
    return [(index % width, index // width) for index in best]


def distances(
    before: Tensor, after: Tensor, handles: Sequence[Pixel], targets: Sequence[Pixel], size: tuple[int, int]
) -> list[float]:
    """Distance in pixels from each match to its target; MD is their mean.

    before, after: from `image_features`.
    """
    matched = matches(before, after, handles, size)
    return [math.dist(match, target) for match, target in zip(matched, targets, strict=True)]


class Missing(RuntimeError):
    """A metric that is not available here."""


def fidelity_network() -> nn.Module:
    """LPIPS with AlexNet (arXiv 1801.03924). Raises Missing if the package or its weights are missing."""
    try:
        lpips = importlib.import_module("lpips")
    except ImportError:
        raise Missing("IF is skipped: it needs lpips (pip install 'minidrag[bench]')") from None
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's, about its own interface
            return lpips.LPIPS(net="alex", verbose=False).eval().requires_grad_(False)
    except (OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Missing(f"IF is skipped: cannot download the AlexNet weights ({reason})") from error


@torch.no_grad()
def image_fidelity(network: nn.Module, before: Image.Image, after: Image.Image) -> float:
    """IF: 1 - LPIPS of the original and the edited image at 224x224; 1 for equal images."""
    one, other = (
        interpolate(to_tensor(image), size=(224, 224), mode="bilinear") for image in (before, after)
    )
    return 1 - float(network(one, other))


def ranks(values: Sequence[float]) -> np.ndarray:
    """Rank of each value, from 0. Ties get their mean rank."""
    _, group, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[group]


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None for fewer than three pairs or constant values."""
    first = ranks(one)
    second = ranks(other)
    if len(first) < 3 or first.std() == 0 or second.std() == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def bootstrap(values: Sequence[float], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap confidence interval of the mean."""
    chosen = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.percentile(np.asarray(values, dtype=float)[chosen].mean(axis=1), (2.5, 97.5))
    return float(low), float(high)
