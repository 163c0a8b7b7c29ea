"""Measures whether the small model is good enough, on scenes that its training never saw.

    python -m minidrag.bench tiny [MODEL] [--out DIR]

Prints one line per aim: what was measured, what is wanted, and whether that is met; exits with 0 only if all
of them are. The same command on the same machine prints the same numbers.
"""

import argparse
import importlib
import importlib.util
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from PIL import Image
from torch import Tensor

from minidrag import images
from minidrag.bench.harness import work
from minidrag.bench.identify import Seen, identify
from minidrag.bench.metrics import psnr
from minidrag.method.ddim import denoise, guided, invert, sample
from minidrag.tiny.scenes import Scene, caption, random_scene, render
from minidrag.weights.model import Model, load_model

STEPS, TAKEN, GUIDANCE = 50, 35, 5.0
BATCH = 20
SHEET = 6  # pictures on each side of the sheet


@dataclass(frozen=True)
class Line:
    """One thing measured. aim: what is wanted, in words. met: None without an aim or a measurement."""

    name: str
    value: str
    aim: str = ""
    met: bool | None = None

    def __str__(self) -> str:
        verdict = {True: "ok", False: "SHORT", None: "not measured" if self.aim else ""}[self.met]
        return f"{self.name:58} {self.value:>16}   {self.aim:14} {verdict}".rstrip()


def unseen(count: int, seed: int = 0) -> list[Scene]:
    """Scenes with numbers below zero; training takes those from zero on."""
    return [random_scene(random.Random(f"{seed} {-1 - i}")) for i in range(count)]


def batches(count: int, what: str) -> Iterator[slice]:
    for start in tqdm(range(0, count, BATCH), desc=what, mininterval=5):
        yield slice(start, min(start + BATCH, count))


def encode(model: Model, pictures: list[Image.Image]) -> Tensor:
    batch = torch.cat([images.to_tensor(picture) for picture in pictures])
    return model.vae.encode(batch.to(model.device, model.dtype))[0]


def decode(model: Model, latents: Tensor) -> list[Image.Image]:
    return [images.to_picture(picture[None]) for picture in model.vae.decode(latents)]


def mean_psnr(some: list[Image.Image], others: list[Image.Image]) -> float:
    return float(np.mean([psnr(one, other) for one, other in zip(some, others, strict=True)]))


@torch.no_grad()
def check_vae(model: Model, scenes: list[Scene]) -> list[Line]:
    """The autoencoder alone: how much its round trip loses, and whether all channels carry something."""
    pictures, latents, back = [render(scene) for scene in scenes], [], []
    for some in batches(len(scenes), "VAE"):
        latents.append(encode(model, pictures[some]))
        back += decode(model, latents[-1])
    found = mean_psnr(pictures, back)
    spread = torch.cat(latents).float().std(dim=(0, 2, 3))
    ratios = (spread / spread.mean()).tolist()
    name = f"VAE round trip, mean PSNR of {len(scenes)} scenes"
    return [
        Line(name, f"{found:.2f} dB", ">= 32 dB", found >= 32),
        Line("latent channels, standard deviation", " ".join(f"{value:.2f}" for value in spread.tolist())),
        Line(
            "the same over their mean",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
            "1/3 to 3",
            min(ratios) >= 1 / 3 and max(ratios) <= 3,
        ),
    ]


@torch.no_grad()
def check_inversion(model: Model, scenes: list[Scene]) -> list[Line]:
    """DDIM up into the noise and back, under the caption and without LoRA, beside the VAE's round trip."""
    values = []
    for some in batches(len(scenes), "inversion"):
        clean = encode(model, [render(scene) for scene in scenes[some]])
        text = model.encode_text([caption(scene) for scene in scenes[some]])
        noisy = invert(model.unet, model.schedule, clean, text, STEPS, TAKEN)[-1]
        (back,) = denoise(model.unet, model.schedule, [noisy], text, STEPS, TAKEN)
        values += [
            psnr(one, other) for one, other in zip(decode(model, clean), decode(model, back), strict=True)
        ]
    found = float(np.mean(values))
    name = f"inversion, {TAKEN} of {STEPS} steps in and out, mean PSNR of {len(scenes)}"
    return [Line(name, f"{found:.2f} dB", ">= 28 dB", found >= 28)]


@torch.no_grad()
def sampled(model: Model, captions: list[str], seed: int = 0) -> list[Image.Image]:
    """A picture for each caption, from noise by a seed."""
    noise, pictures = torch.Generator().manual_seed(seed), []
    side = model.unet.config.sample_size
    for some in batches(len(captions), "sampling"):
        text = model.encode_text(captions[some])
        negative = model.encode_text("").expand_as(text)
        shape = (len(text), 4, side, side)
        latents = sample(model.unet, model.schedule, text, negative, shape, STEPS, GUIDANCE, noise)
        pictures += decode(model, latents)
    return pictures


def check_captions(scenes: list[Scene], pictures: list[Image.Image]) -> list[Line]:
    """Whether the pictures show what their captions say, nothing missing and nothing else."""
    seen = [identify(picture) for picture in tqdm(pictures, desc="looking", mininterval=5)]
    pairs = list(zip(scenes, seen, strict=True))

    def share(agrees) -> float:
        return float(np.mean([agrees(scene, found) for scene, found in pairs]))

    def same(*names: str):
        def listed(shown: Scene | Seen) -> Counter:
            return Counter(tuple(getattr(thing, name) for name in names) for thing in shown.objects)

        return lambda scene, found: listed(scene) == listed(found)

    both = share(same("kind", "color"))
    around = share(lambda scene, found: (scene.time, scene.ground) == (found.time, found.ground))
    return [
        Line(f"kind and colour as the caption says, of {len(pairs)}", f"{both:.0%}", ">= 90 %", both >= 0.9),
        Line("- kind alone", f"{share(same('kind')):.0%}"),
        Line("- colour alone", f"{share(same('color')):.0%}"),
        Line("- time of day and ground", f"{around:.0%}"),
    ]


@torch.no_grad()
def check_parity(model: Model, text: str) -> Line:
    """The same picture from diffusers, for the same starting latent and caption."""
    name, aim = "diffusers' picture from the same latent, largest difference", "<= 1 of 255"
    if importlib.util.find_spec("diffusers") is None:
        return Line(name, "no diffusers", aim)
    diffusers: Any = importlib.import_module("diffusers")
    side = model.unet.config.sample_size
    latent = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))
    predict = guided(model.unet, model.encode_text(""), GUIDANCE)
    given = latent.to(model.device, model.dtype)
    (ours,) = denoise(predict, model.schedule, [given], model.encode_text(text), STEPS, STEPS)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(model.source)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "np"}
    # The dtype too: else transformers keeps the file's half precision while diffusers widens it.
    theirs = pipeline.to(model.device, model.dtype)(text, latents=given, **options).images[0]
    mine = (model.vae.decode(ours)[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).float().cpu().numpy()
    found = float(np.abs(mine - theirs).max() * 255)
    return Line(name, f"{found:.4f}", aim, found <= 1)


def sheet(pictures: list[Image.Image]) -> Image.Image:
    """The first pictures as a square."""
    side, gap = pictures[0].width, 4
    whole = (side + gap) * SHEET + gap
    page = Image.new("RGB", (whole, whole), images.WHITE)
    for i, picture in enumerate(pictures[: SHEET * SHEET]):
        row, column = divmod(i, SHEET)
        page.paste(picture, (gap + (side + gap) * column, gap + (side + gap) * row))
    return page


def check(model: Model, args: argparse.Namespace) -> list[Line]:
    """All lines, each printed when it is known; writes the sheet and the lines to args.out."""
    scenes = unseen(max(args.scenes, args.inverted, args.sampled, 1))
    lines: list[Line] = []

    def tell(*more: Line) -> None:
        lines.extend(more)
        for line in more:
            print(line, flush=True)

    tell(*check_vae(model, scenes[: args.scenes]))
    tell(*check_inversion(model, scenes[: args.inverted]))
    pictures = sampled(model, [caption(scene) for scene in scenes[: args.sampled]])
    tell(*check_captions(scenes[: args.sampled], pictures))
    tell(check_parity(model, caption(scenes[0])))
    args.out.mkdir(parents=True, exist_ok=True)
    sheet(pictures).save(args.out / "samples.png")
    tell(Line("sheet of samples", str(args.out / "samples.png")))
    rows = [asdict(line) for line in lines]
    (args.out / "check.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="tiny", help="as for demo.py (default: tiny)")
    parser.add_argument("--out", type=Path, default=Path("runs/check"), help="default: %(default)s")
    for name, count, what in (
        ("scenes", 200, "round trips through the VAE"),
        ("inverted", 60, "inversions"),
        ("sampled", 100, "samples"),
    ):
        parser.add_argument(f"--{name}", type=int, default=count, help=f"{what} (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    def job() -> int:
        lines = check(load_model(args.model), args)
        return int(any(line.aim and not line.met for line in lines))

    return work(job)
