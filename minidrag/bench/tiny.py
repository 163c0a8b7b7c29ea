"""Check the quality of the small model on held-out scenes.

    python -m minidrag.bench tiny [MODEL]

Prints each measurement with its aim. Exits with 0 only if all aims are met. Deterministic on one machine.
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Measurement:
    """One number with its aim."""

    name: str
    value: str
    aim: str
    met: bool

    def __str__(self) -> str:
        verdict = "ok" if self.met else "FAILED"
        return f"{self.name:58} {self.value:>16}   {self.aim:14} {verdict}"


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
def check_vae(model: Model, scenes: list[Scene]) -> Measurement:
    """Measure the VAE's reconstruction error."""
    rendered = [render(scene) for scene in scenes]
    decoded = []
    for batch in batches(len(scenes), "VAE"):
        decoded += decode(model, encode(model, rendered[batch]))
    mean = mean_psnr(rendered, decoded)
    name = f"VAE reconstruction, mean PSNR of {len(scenes)} scenes"
    return Measurement(name, f"{mean:.2f} dB", ">= 32 dB", mean >= 32)


@torch.no_grad()
def check_inversion(model: Model, scenes: list[Scene]) -> Measurement:
    """Measure the error of DDIM inversion and denoising without LoRA, against the VAE reconstruction."""
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
    mean = mean_psnr(autoencoded, inverted)
    name = f"inversion, {CONFIG.levels} of {CONFIG.steps} steps, mean PSNR of {len(scenes)} scenes"
    return Measurement(name, f"{mean:.2f} dB", ">= 28 dB", mean >= 28)


def check(model: Model) -> Iterator[Measurement]:
    """Yield each measurement as soon as it is made."""
    scenes = held_out(RECONSTRUCTIONS)
    yield check_vae(model, scenes)
    yield check_inversion(model, scenes[:INVERSIONS])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="tiny", help="as in demo.py (default: tiny)")


def run(args: argparse.Namespace) -> int:
    met = True
    for measurement in check(load_model(args.model)):
        print(measurement, flush=True)
        met = met and measurement.met
    return int(not met)
