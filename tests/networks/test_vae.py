"""The autoencoder against diffusers: encoder moments, decoder, gradients."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.references import (
    SD15_VAE,
    VAES,
    official_names,
    our_vae,
    random,
    reference_vae,
    same_weights,
    shapes,
    vae_pairs,
)

from minidrag.networks.vae import VAE

SIZES = {"non-square": ((32, 48), (5, 6)), "odd": ((37, 43), (7, 3)), "odd twice": ((41, 26), (3, 1))}


@cache
def networks(kind: str) -> tuple[VAE, Any]:
    """Ours and diffusers' with the same weights; cached, since no test changes them."""
    ours, reference = our_vae(VAES[kind]), reference_vae(VAES[kind])
    same_weights(reference, ours, torch.float64)
    return ours, reference


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", VAES)
def test_encoding_and_decoding_equal_diffusers(kind: str, size: str, compare: Callable) -> None:
    (ours, reference), (image, latent) = networks(kind), SIZES[size]
    with torch.no_grad():
        pairs = vae_pairs(ours, reference, random(2, 3, *image, seed=1), random(2, 4, *latent, seed=2))
    for name, pair in pairs.items():
        compare(f"VAE {kind}, {name}", *pair)


def test_sides_are_rounded_down_to_whole_latents() -> None:
    ours, _ = networks("three halvings")
    with torch.no_grad():
        mean, _ = ours.encode(random(1, 3, 68, 47, seed=1))
        image = ours.decode(mean)
    assert tuple(mean.shape[2:]) == (8, 5) and tuple(image.shape[2:]) == (64, 40)


@pytest.mark.parametrize("kind", VAES)
def test_gradients_of_encoding_and_decoding_equal_diffusers(kind: str, compare: Callable) -> None:
    ours, reference = networks(kind)
    image, latent = (random(2, n, 25, 18, seed=n).requires_grad_(True) for n in (3, 4))
    pairs = vae_pairs(ours, reference, image, latent[..., :5, :3])
    for name, of in {"mean": image, "std": image, "image": latent}.items():
        losses = [100 * (x * random(*x.shape, seed=5)).sum() for x in pairs[name]]
        gradients = [torch.autograd.grad(loss, of, retain_graph=True)[0] for loss in losses]
        compare(f"VAE {kind}, gradient of the {name}", *gradients)


@pytest.mark.parametrize("shift", [-1e3, 1e3])
def test_the_log_variance_is_clamped_as_in_diffusers(shift: float) -> None:
    ours, reference = our_vae(VAES["two halvings"]), reference_vae(VAES["two halvings"])
    same_weights(reference, ours, torch.float64)
    with torch.no_grad():
        reference.quant_conv.bias += shift  # both networks share the tensor
        pairs = vae_pairs(ours, reference, random(2, 3, 16, 16, seed=1), random(2, 4, 4, 4, seed=2))
    found, expected = pairs["std"]
    limit = -15 if shift < 0 else 10
    assert torch.allclose(found, torch.full_like(found, 0.7 * torch.tensor(limit).exp().item()))
    assert torch.equal(found, expected)


def test_full_size_names_and_shapes_are_those_of_the_official_file() -> None:
    listed = (Path(__file__).parents[1] / "data" / "sd15_vae.txt").read_text().splitlines()
    ours = our_vae(SD15_VAE)
    assert shapes(ours.state_dict()) == listed == shapes(official_names(reference_vae(SD15_VAE)))
    assert len(listed) == 248
    assert sum(p.numel() for p in ours.parameters()) == 83_653_863


# Measured: 0.0. Float32 rounding (against float64) is 1e-6 for values up to 1.3.
FULL_SIZE_TOLERANCE = 2e-5


@pytest.mark.slow
def test_the_full_size_equals_diffusers_in_float32(compare: Callable) -> None:
    ours, reference = our_vae(SD15_VAE), reference_vae(SD15_VAE)
    same_weights(reference, ours, torch.float32)
    with torch.no_grad():
        image, latent = random(1, 3, 256, 192, seed=1).float(), random(1, 4, 32, 24, seed=2).float()
        pairs = vae_pairs(ours, reference, image, latent)
    for name, pair in pairs.items():
        compare(f"VAE full size, float32, {name}", *pair, atol=FULL_SIZE_TOLERANCE)
