"""Check the quality of the small model on held-out scenes.

    python -m minidrag.bench tiny [MODEL] [--out DIR]

Prints each measurement with its aim. Exits with 0 only if all aims are met. Deterministic on one machine.
"""

import argparse
import importlib
import importlib.util
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from PIL import Image
from torch import Tensor

from minidrag import images
from minidrag.bench.harness import MAX_CASES, check_new, count, write_new
from minidrag.bench.identify import Contents, identify
from minidrag.config import EditConfig
from minidrag.images import psnr
from minidrag.method.ddim import denoise, invert
from minidrag.method.sampling import guided
from minidrag.model import Model
from minidrag.tiny.scenes import Scene, caption, random_scene, render
from minidrag.weights.load import load_model

CONFIG, GUIDANCE = EditConfig.official(), 5.0
BATCH = 20
SHEET = 6  # rows and columns of the sample sheet


@dataclass(frozen=True)
class Line:
    """One measurement."""

    name: str
    value: str
    aim: str = ""
    met: bool | None = None  # None without an aim or if not measured

    def __str__(self) -> str:
        verdict = {True: "ok", False: "FAILED", None: "not measured" if self.aim else ""}[self.met]
        return f"{self.name:58} {self.value:>16}   {self.aim:14} {verdict}".rstrip()


def held_out(count: int, seed: int = 0) -> list[Scene]:
    """Draw scenes with negative numbers, which training does not use."""
    return [random_scene(random.Random(f"{seed} {-1 - i}")) for i in range(count)]


def batches(count: int, name: str) -> Iterator[slice]:
    for start in tqdm(range(0, count, BATCH), desc=name, mininterval=5):
        yield slice(start, min(start + BATCH, count))


def encode(model: Model, rendered: list[Image.Image]) -> Tensor:
    batch = torch.cat([images.to_tensor(image) for image in rendered])
    return model.vae.encode(batch.to(model.device, model.dtype))[0]


def decode(model: Model, latents: Tensor) -> list[Image.Image]:
    return [images.to_image(pixels[None]) for pixels in model.vae.decode(latents)]


def mean_psnr(some: list[Image.Image], others: list[Image.Image]) -> float:
    return float(np.mean([psnr(one, other) for one, other in zip(some, others, strict=True)]))


@torch.no_grad()
def check_vae(model: Model, scenes: list[Scene]) -> list[Line]:
    """Measure the VAE's reconstruction error and the spread of its latent channels."""
    rendered, latents, decoded = [render(scene) for scene in scenes], [], []
    for batch in batches(len(scenes), "VAE"):
        latents.append(encode(model, rendered[batch]))
        decoded += decode(model, latents[-1])
    found = mean_psnr(rendered, decoded)
    std = torch.cat(latents).float().std(dim=(0, 2, 3))
    ratios = (std / std.mean()).tolist()
    name = f"VAE reconstruction, mean PSNR of {len(scenes)} scenes"
    return [
        Line(name, f"{found:.2f} dB", ">= 32 dB", found >= 32),
        Line("latent channels, std", " ".join(f"{value:.2f}" for value in std.tolist())),
        Line(
            "latent channels, std relative to their mean",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
            "1/3 to 3",
            min(ratios) >= 1 / 3 and max(ratios) <= 3,
        ),
    ]


@torch.no_grad()
def check_inversion(model: Model, scenes: list[Scene]) -> list[Line]:
    """Measure the error of DDIM inversion and denoising without LoRA, against the VAE reconstruction."""
    values = []
    for batch in batches(len(scenes), "inversion"):
        clean = encode(model, [render(scene) for scene in scenes[batch]])
        text = model.encode_text([caption(scene) for scene in scenes[batch]])
        *_, noisy = invert(model.unet, model.schedule, clean, text, CONFIG)
        *_, (back,) = denoise(model.unet, model.schedule, [noisy], text, CONFIG.inversion_steps, CONFIG)
        values += [
            psnr(one, other) for one, other in zip(decode(model, clean), decode(model, back), strict=True)
        ]
    found = float(np.mean(values))
    name = f"inversion, {CONFIG.inversion_steps} of {CONFIG.steps} steps, mean PSNR of {len(scenes)} scenes"
    return [Line(name, f"{found:.2f} dB", ">= 28 dB", found >= 28)]


@torch.no_grad()
def sample_images(model: Model, captions: list[str], seed: int = 0) -> list[Image.Image]:
    """Generate an image for each caption from seeded noise."""
    generator, generated = torch.Generator().manual_seed(seed), []
    side = model.unet.config.sample_size
    for batch in batches(len(captions), "sampling"):
        text = model.encode_text(captions[batch])
        negative = model.encode_text("").expand_as(text)
        latent = torch.randn(len(text), 4, side, side, generator=generator).to(text)
        unet = guided(model.unet, negative, GUIDANCE)
        *_, (latent,) = denoise(unet, model.schedule, [latent], text, CONFIG.steps, CONFIG)
        generated += decode(model, latent)
    return generated


def check_captions(scenes: list[Scene], generated: list[Image.Image]) -> list[Line]:
    """Measure the fraction of images that show exactly the objects and surroundings of their scene."""
    found = [identify(image) for image in tqdm(generated, desc="identifying", mininterval=5)]
    pairs = list(zip(scenes, found, strict=True))

    def objects(shown: Scene | Contents, *names: str) -> Counter:
        return Counter(tuple(getattr(thing, name) for name in names) for thing in shown.objects)

    def accuracy(*names: str) -> float:
        return float(np.mean([objects(scene, *names) == objects(shown, *names) for scene, shown in pairs]))

    both = accuracy("kind", "color")
    surroundings = np.mean([(one.time, one.ground) == (other.time, other.ground) for one, other in pairs])
    return [
        Line(f"kind and color match the caption, of {len(pairs)}", f"{both:.0%}", ">= 90 %", both >= 0.9),
        Line("- kind alone", f"{accuracy('kind'):.0%}"),
        Line("- color alone", f"{accuracy('color'):.0%}"),
        Line("- time of day and ground", f"{surroundings:.0%}"),
    ]


@torch.no_grad()
def check_parity(model: Model, text: str) -> Line:
    """Compare an image with the one that diffusers generates from the same latent and caption."""
    name, aim = "largest difference from diffusers, same latent", "<= 1 of 255"
    if importlib.util.find_spec("diffusers") is None:
        return Line(name, "no diffusers", aim)
    diffusers: Any = importlib.import_module("diffusers")
    side = model.unet.config.sample_size
    latent = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))
    unet = guided(model.unet, model.encode_text(""), GUIDANCE)
    latent = latent.to(model.device, model.dtype)
    *_, (ours,) = denoise(unet, model.schedule, [latent], model.encode_text(text), CONFIG.steps, CONFIG)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(model.source)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": CONFIG.steps, "guidance_scale": GUIDANCE, "output_type": "np"}
    # With the dtype: otherwise transformers keeps the file's half precision and diffusers widens it.
    theirs = pipeline.to(model.device, model.dtype)(text, latents=latent, **options).images[0]
    mine = (model.vae.decode(ours)[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).float().cpu().numpy()
    found = float(np.abs(mine - theirs).max() * 255)
    return Line(name, f"{found:.4f}", aim, found <= 1)


def sample_sheet(generated: list[Image.Image]) -> Image.Image:
    """Tile the first images in a square."""
    side, gap = generated[0].width, 4
    width = (side + gap) * SHEET + gap
    page = Image.new("RGB", (width, width), images.WHITE)
    for i, image in enumerate(generated[: SHEET * SHEET]):
        row, column = divmod(i, SHEET)
        page.paste(image, (gap + (side + gap) * column, gap + (side + gap) * row))
    return page


def check(model: Model, args: argparse.Namespace) -> list[Line]:
    """Run all checks, print each result, and write samples.png and check.json to args.out."""
    scenes = held_out(max(args.scenes, args.inverted, args.sampled, 1))
    lines: list[Line] = []

    def report(*more: Line) -> None:
        lines.extend(more)
        for line in more:
            print(line, flush=True)

    report(*check_vae(model, scenes[: args.scenes]))
    report(*check_inversion(model, scenes[: args.inverted]))
    generated = sample_images(model, [caption(scene) for scene in scenes[: args.sampled]])
    report(*check_captions(scenes[: args.sampled], generated))
    report(check_parity(model, caption(scenes[0])))
    out = claim_new(args.out)
    write_new(out / "samples.png", "", sample_sheet(generated).save)
    report(Line("sample sheet", str(out / "samples.png")))
    text = json.dumps([asdict(line) for line in lines], indent=1) + "\n"
    write_new(out / "check.json", "", lambda file: file.write_text(text, encoding="utf-8"))
    return lines


def claim_new(out: Path | None) -> Path:
    """Make the folder; None: the first of runs/check-1, runs/check-2, ... that no other process took."""
    for path in (Path("runs") / f"check-{number}" for number in itertools.count(1)) if out is None else [out]:
        with suppress(FileExistsError):
            path.mkdir(parents=True, exist_ok=out is not None)
            return path
    raise AssertionError("numbers have no end")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="tiny", help="as in demo.py (default: tiny)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the results (default: a new one in runs)"
    )
    whole = partial(count, most=MAX_CASES)
    for name, number, counted in (
        ("scenes", 200, "VAE reconstructions"),
        ("inverted", 60, "inversions"),
        ("sampled", 100, "samples"),
    ):
        parser.add_argument(f"--{name}", type=whole, default=number, help=f"{counted} (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    check_new(args.out)
    return int(any(line.aim and not line.met for line in check(load_model(args.model), args)))
