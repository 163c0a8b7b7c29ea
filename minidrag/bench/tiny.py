"""Check the quality of the small model on held-out scenes.

    python -m minidrag.bench tiny [MODEL]

Prints each measurement with its aim. Exits with 0 only if all aims are met. Deterministic on one machine.
"""

import argparse
import importlib
import importlib.util
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from PIL import Image
from torch import Tensor

from minidrag import images
from minidrag.config import EditConfig
from minidrag.images import psnr
from minidrag.method.ddim import Denoiser, denoise, guided, invert
from minidrag.model import Model
from minidrag.tiny.scenes import Scene, caption, random_scene, render
from minidrag.weights.load import load_model

CONFIG = EditConfig.official()
GUIDANCE = 5.0
BATCH = 20
RECONSTRUCTIONS = 200
INVERSIONS = 60


@dataclass(frozen=True)
class Measurement:
    """One number with its aim."""

    name: str
    value: str
    aim: str
    met: bool | None  # None if not measured

    def __str__(self) -> str:
        verdict = {True: "ok", False: "FAILED", None: "not measured"}[self.met]
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


@torch.no_grad()
def check_parity(model: Model, text: str) -> Measurement:
    """Compare an image with the one that diffusers generates from the same latent and caption."""
    name = "largest difference from diffusers, same latent"
    aim = "<= 1 of 255"
    if importlib.util.find_spec("diffusers") is None:
        return Measurement(name, "no diffusers", aim, None)
    diffusers: Any = importlib.import_module("diffusers")
    side = model.unet.config.sample_size
    latent = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))
    unet = guided(model.unet, model.encode_text(""), GUIDANCE)
    latent = latent.to(model.device, model.dtype)
    denoiser = Denoiser(unet, model.schedule, model.encode_text(text), CONFIG.steps)
    *_, (ours,) = denoise(denoiser, [latent], CONFIG.steps, CONFIG)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(model.source)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": CONFIG.steps, "guidance_scale": GUIDANCE, "output_type": "np"}
    # With the dtype: otherwise transformers keeps the file's half precision and diffusers widens it.
    theirs = pipeline.to(model.device, model.dtype)(text, latents=latent, **options).images[0]
    mine = (model.vae.decode(ours)[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).float().cpu().numpy()
    difference = float(np.abs(mine - theirs).max() * 255)
    return Measurement(name, f"{difference:.4f}", aim, difference <= 1)


def check(model: Model) -> Iterator[Measurement]:
    """Yield each measurement as soon as it is made."""
    scenes = held_out(RECONSTRUCTIONS)
    yield check_vae(model, scenes)
    yield check_inversion(model, scenes[:INVERSIONS])
    yield check_parity(model, caption(scenes[0]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="tiny", help="as in demo.py (default: tiny)")


def run(args: argparse.Namespace) -> int:
    met = True
    for measurement in check(load_model(args.model)):
        print(measurement, flush=True)
        met = met and bool(measurement.met)
    return int(not met)
