"""Metrics against independent code: slow loops, hand calculations, and statistics by sampling."""

import importlib
import math
import random
import types
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.dragbench import Distance
from torch import Tensor
from torch.nn.functional import interpolate

from minidrag.bench import metrics
from minidrag.images import MAX_PSNR, psnr
from minidrag.points import Pixel


def noise_image(seed: int, width: int = 13, height: int = 12) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_psnr_by_hand() -> None:
    one = np.full((4, 5, 3), 100, np.uint8)
    other = one.copy()
    other[0, 0] = 110
    region = np.zeros((4, 5), bool)
    region[0, :2] = True
    images = Image.fromarray(one), Image.fromarray(other)
    assert psnr(*images) == pytest.approx(10 * math.log10(255**2 / (100 / 20)))
    assert psnr(*images, region) == pytest.approx(10 * math.log10(255**2 / 50))
    assert psnr(*images, ~region) == MAX_PSNR


def test_sharpness_is_the_ratio_of_the_laplacians_variance() -> None:
    """Against a loop over the pixels of a region, and by what a blur and a scaling must do."""
    image, truth = noise_image(1, 40, 30), noise_image(2, 40, 30)
    region = np.zeros((30, 40), bool)
    region[5:20, 3:30] = True

    def variance(one: Image.Image) -> float:
        gray = np.asarray(one, float).mean(axis=-1)
        values = [
            gray[row - 1, column] + gray[row + 1, column] + gray[row, column - 1] + gray[row, column + 1]
            - 4 * gray[row, column]
            for row, column in np.argwhere(region)
        ]  # fmt: skip
        return float(np.var(values))

    assert metrics.sharpness(image, truth, region) == pytest.approx(variance(image) / variance(truth))
    assert metrics.sharpness(truth, truth, region) == 1
    half = truth.point([round(level / 2) for level in range(256)] * 3)
    assert metrics.sharpness(half, truth, region) == pytest.approx(0.25, abs=0.01)


def test_detail_is_the_correlation_of_what_a_small_image_lacks() -> None:
    truth = noise_image(3, 64, 48)
    region = np.zeros((48, 64), bool)
    region[8:40, 8:56] = True
    assert metrics.detail(truth, truth, region, (16, 12)) == pytest.approx(1)
    assert abs(metrics.detail(noise_image(4, 64, 48), truth, region, (16, 12))) < 0.06
    negative = truth.point([255 - level for level in range(256)] * 3)
    assert metrics.detail(negative, truth, region, (16, 12)) == pytest.approx(-1, abs=0.02)
    darker = truth.point([round(level / 2) for level in range(256)] * 3)  # a correlation sees no contrast
    assert metrics.detail(darker, truth, region, (16, 12)) > 0.99


def slow_ssim(one: Image.Image, other: Image.Image) -> np.ndarray:
    """SSIM at every pixel, as written by Wang et al., in loops."""
    x, y = np.asarray(one, float), np.asarray(other, float)
    height, width, _ = x.shape
    found = np.zeros(x.shape)
    for row in range(height):
        for column in range(width):
            total, sums = 0.0, np.zeros((5, 3))
            for down in range(-5, 6):
                for right in range(-5, 6):
                    r, c = row + down, column + right
                    r = -1 - r if r < 0 else 2 * height - 1 - r if r >= height else r
                    c = -1 - c if c < 0 else 2 * width - 1 - c if c >= width else c
                    weight = math.exp(-(down**2 + right**2) / (2 * 1.5**2))
                    a, b = x[r, c], y[r, c]
                    total += weight
                    sums += weight * np.array([a, b, a * a, b * b, a * b])
            mx, my, xx, yy, xy = sums / total
            c1, c2 = 2.55**2, 7.65**2
            top = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
            found[row, column] = top / ((mx**2 + my**2 + c1) * (xx - mx**2 + yy - my**2 + c2))
    return found


def test_ssim_against_loops() -> None:
    one, other = noise_image(0), noise_image(1)
    expected = slow_ssim(one, other)
    assert metrics.ssim(one, other) == pytest.approx(expected.mean(), abs=1e-12)
    assert metrics.ssim(one, other) == pytest.approx(metrics.ssim(other, one))
    assert metrics.ssim(one, one) == pytest.approx(1)


def test_bootstrap() -> None:
    rng = random.Random(0)
    values = [rng.gauss(5, 2) for _ in range(80)]
    means = sorted(sum(rng.choices(values, k=80)) / 80 for _ in range(4000))
    assert metrics.bootstrap(values) == pytest.approx((means[100], means[-101]), abs=0.08)
    assert metrics.bootstrap(values) == metrics.bootstrap(values)
    assert metrics.bootstrap([3.0, 3.0]) == (3.0, 3.0)
    assert metrics.bootstrap([7.0]) == (7.0, 7.0)


def test_rank_correlation() -> None:
    one, other = [3.0, 1.0, 4.0, 1.5, 9.0], [2.0, 7.0, 1.0, 8.0, 2.5]
    squares = sum((a - b) ** 2 for a, b in zip((2, 0, 3, 1, 4), (1, 3, 0, 4, 2), strict=True))
    assert metrics.rank_correlation(one, other) == pytest.approx(1 - 6 * squares / (5 * 24))
    assert metrics.ranks([5, 1, 5, 5, 0]).tolist() == [3, 1, 3, 3, 0]
    assert metrics.rank_correlation([1, 2, 3, 4], [1, 8, 27, 1000]) == pytest.approx(1)
    assert metrics.rank_correlation([1, 2, 3], [5, 5, 5]) is None
    assert metrics.rank_correlation([1, 2], [2, 1]) is None


def slow_matches(
    before: Tensor, after: Tensor, handles: list[Pixel], size: tuple[int, int]
) -> list[tuple[int, int]]:
    """Upsample everything and compare pixel by pixel."""
    one, other = (
        interpolate(part[None], size=size[::-1], mode="bilinear", align_corners=False)[0]
        for part in (before, after)
    )
    found = []
    for x, y in handles:
        query = one[:, round(y), round(x)]
        best, match = -2.0, (0, 0)
        for row in range(size[1]):
            for column in range(size[0]):
                here = other[:, row, column]
                cosine = float(query @ here / (query.norm() * here.norm()))
                if cosine > best:
                    best, match = cosine, (column, row)
        found.append(match)
    return found


def test_matches_against_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "CHUNK", 3)
    rng = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 7, 4, 5, generator=rng, dtype=torch.float64)
    handles, size = [Pixel(0, 0), Pixel(17.4, 3.6), Pixel(9, 12)], (22, 15)
    assert metrics.matches(before, after, handles, size) == slow_matches(before, after, handles, size)


def test_mean_distance_without_an_edit_is_the_mean_length_of_the_drags() -> None:
    features = torch.randn(6, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    handles, targets = [Pixel(10, 20), Pixel(30.2, 5)], [Pixel(13, 24), Pixel(30, 5)]
    found = metrics.distances(features, features, handles, targets, (40, 40))
    assert np.mean(found) == pytest.approx((5 + 0) / 2)


def test_image_features_are_a_mean_over_eight_noise_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs: dict[str, Tensor] = {}

    def unet(noisy: Tensor, timestep: Tensor, text: Tensor) -> types.SimpleNamespace:
        inputs.update(noisy=noisy, timestep=timestep, text=text)
        return types.SimpleNamespace(features=[noisy * level for level in (1, 2, 3, 4)])

    def add_noise(clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        return clean + noise

    model: Any = types.SimpleNamespace(unet=unet, schedule=types.SimpleNamespace(add_noise=add_noise))
    model.encode_text = lambda prompt: torch.zeros(1, 77, 5)
    monkeypatch.setattr(metrics, "encode", lambda *_: (torch.ones(1, 4, 2, 3), None))
    found = metrics.image_features(model, noise_image(0), "a ball")
    noise = torch.randn(8, 4, 2, 3, generator=torch.Generator().manual_seed(42))
    assert torch.allclose(found, 2 * (1 + noise).double().mean(0))
    assert inputs["timestep"].tolist() == [261] * 8 and len(inputs["text"]) == 8


def test_image_fidelity() -> None:
    one, other = noise_image(0, 30, 20), noise_image(1, 30, 20)
    assert metrics.image_fidelity(Distance(), one, one) == 1
    changed = metrics.image_fidelity(Distance(), one, other)
    assert changed == pytest.approx(metrics.image_fidelity(Distance(), other, one)) and changed < 1


@pytest.mark.slow
def test_lpips_itself() -> None:
    try:
        network = metrics.fidelity_network()
    except metrics.Missing as reason:
        pytest.skip(str(reason))
    one, other = noise_image(0, 64, 64), noise_image(1, 64, 64)
    assert metrics.image_fidelity(network, one, one) == pytest.approx(1, abs=1e-6)
    both = [metrics.image_fidelity(network, *pair) for pair in ((one, other), (other, one))]
    assert both[0] == pytest.approx(both[1], abs=1e-5) and both[0] < 0.9


def offline(**_: object) -> None:
    raise OSError("no route to host\nat all")


@pytest.mark.parametrize(
    ("package", "message"),
    [
        (ImportError(), "it needs lpips (pip install 'minidrag[bench]')"),
        (types.SimpleNamespace(LPIPS=offline), "cannot download the AlexNet weights (no route to host)"),
    ],
)
def test_missing_lpips_is_explained_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, package: object, message: str
) -> None:
    def import_module(name: str) -> object:
        if isinstance(package, Exception):
            raise package
        return package

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(metrics.Missing) as error:
        metrics.fidelity_network()
    assert str(error.value) == f"IF is skipped: {message}"
