"""Check the quality of the small model on held-out scenes.

    python -m minidrag.bench tiny [MODEL]

Prints each measurement with its aim. Exits with 0 only if all aims are met. Deterministic on one machine.
"""

import argparse
import random
from collections.abc import Iterator

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from PIL import Image
from torch import Tensor

from minidrag import images
from minidrag.config import EditConfig
from minidrag.images import psnr
from minidrag.method.ddim import Denoiser, denoise, invert
from minidrag.model import Model
from minidrag.tiny.scenes import Scene, caption, random_scene, render
from minidrag.weights.load import load_model

CONFIG = EditConfig.official()
BATCH = 20
RECONSTRUCTIONS = 200
INVERSIONS = 60


def held_out(count: int) -> list[Scene]:
    """Draw scenes with negative numbers, which training does not use."""
    return [random_scene(random.Random(f"0 {-1 - i}")) for i in range(count)]


def batches(count: int, name: str) -> Iterator[slice]:
    for start in tqdm(range(0, count, BATCH), desc=name, mininterval=5):
        yield slice(start, min(start + BATCH, count))


def encode(model: Model, rendered: list[Image.Image]) -> Tensor:
    batch = torch.cat([images.to_tensor(image) for image in rendered])
    return model.vae.encode(batch.to(model.device, model.dtype))[0]


def decode(model: Model, latents: Tensor) -> list[Image.Image]:
    return [images.to_image(pixels[None]) for pixels in model.vae.decode(latents)]


def mean_psnr(ones: list[Image.Image], others: list[Image.Image]) -> float:
    return float(np.mean([psnr(one, other) for one, other in zip(ones, others, strict=True)]))


@torch.no_grad()
def autoencode(model: Model, scenes: list[Scene]) -> float:
    """Mean PSNR of scenes after the VAE, in dB."""
    rendered = [render(scene) for scene in scenes]
    decoded = []
    for batch in batches(len(scenes), "VAE"):
        decoded += decode(model, encode(model, rendered[batch]))
    return mean_psnr(rendered, decoded)


@torch.no_grad()
def reconstruct(model: Model, scenes: list[Scene]) -> float:
    """Mean PSNR of scenes inverted and denoised without a LoRA, against the VAE's reconstruction, in dB."""
    autoencoded = []
    inverted = []
    for batch in batches(len(scenes), "inversion"):
        clean = encode(model, [render(scene) for scene in scenes[batch]])
        text = model.encode_text([caption(scene) for scene in scenes[batch]])
        denoiser = Denoiser(model.unet, model.schedule, text, CONFIG.steps)
        *_, noisy = invert(denoiser, clean, CONFIG.levels)
        *_, (back,) = denoise(denoiser, [noisy], CONFIG.levels, CONFIG)
        autoencoded += decode(model, clean)
        inverted += decode(model, back)
    return mean_psnr(autoencoded, inverted)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="tiny", help="as in demo.py (default: tiny)")


def run(args: argparse.Namespace) -> int:
    model = load_model(args.model)
    scenes = held_out(RECONSTRUCTIONS)
    met = True
    for name, measure, some, aim in (
        ("VAE reconstruction", autoencode, scenes, 32),
        (f"inversion, {CONFIG.levels} of {CONFIG.steps} steps", reconstruct, scenes[:INVERSIONS], 28),
    ):
        value = measure(model, some)
        met = met and value >= aim
        label = f"{name}, mean PSNR of {len(some)} scenes"
        verdict = "ok" if value >= aim else "FAILED"
        print(f"{label:58} {value:.2f} dB   >= {aim} dB   {verdict}", flush=True)
    return int(not met)
