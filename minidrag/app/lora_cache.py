"""LoRAs kept between runs: the same image, prompt, model, and settings need no second training."""

import hashlib
import json
import os
import platform
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from minidrag import images
from minidrag.config import EditConfig
from minidrag.edit import train_lora
from minidrag.method.lora import LoRA
from minidrag.watch import Progress, watch
from minidrag.weights import lora_file
from minidrag.weights.model import Model, working_size

PACKAGES = ("minidrag", "safetensors", "numpy", "pillow", "tokenizers", "huggingface-hub")


def find_lora(
    model: Model,
    image: Image.Image,
    prompt: str,
    config: EditConfig,
    seed: int,
    progress: Progress = watch,
) -> tuple[LoRA, str]:
    """Return the cached LoRA of an image, or train and cache it, and a sentence on where it came from."""
    if config.lora_steps == 0:
        return LoRA({}, {}), "none (--lora-steps)"
    file = cache_folder() / f"{cache_key(model, image, prompt, config, seed)}.safetensors"
    with suppress(OSError, ValueError):  # not there, or damaged
        return lora_file.read(file, model.unet, model.text_encoder), f"reused from {file}"
    lora = train_lora(model, image, prompt, config, seed, progress)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lora_file.write(lora, file, notes(model, prompt, config, seed))
    except OSError as error:
        return lora, f"trained, but not cached: {file} cannot be written ({error.strerror})"
    return lora, f"trained and cached in {file}"


def cache_folder() -> Path:
    return Path(os.environ.get("MINIDRAG_CACHE") or "~/.cache/minidrag").expanduser() / "lora"


def cache_key(model: Model, image: Image.Image, prompt: str, config: EditConfig, seed: int) -> str:
    """Digest of everything that decides how a LoRA comes out."""
    small = images.resize(image, working_size(model, image.size, config))
    tokens = model.tokenizer(prompt).tolist()
    computed_with = [str(model.device), str(model.dtype), repr(model.schedule), versions()]
    values = [small.size, tokens, settings(config, seed), computed_with]
    digest = hashlib.sha256(json.dumps(values).encode())
    digest.update(small.tobytes())
    for network in (model.unet, model.vae, model.text_encoder):
        for name, tensor in network.state_dict().items():
            # Training changes every number, so a few of each tensor tell two models apart.
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten()[:16].cpu().double().numpy().tobytes())
    return digest.hexdigest()[:32]


def settings(config: EditConfig, seed: int) -> dict[str, Any]:
    values = {name: value for name, value in asdict(config).items() if name.startswith("lora_")}
    return {**values, "seed": seed}


def notes(model: Model, prompt: str, config: EditConfig, seed: int) -> dict[str, str]:
    """Metadata for the LoRA's file."""
    values = {name: str(value) for name, value in settings(config, seed).items()}
    return {"prompt": prompt, "model": model.source, **values}


def versions() -> dict[str, str]:
    """Versions of the packages that decide an edit's numbers."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}  # CPU or CUDA build too
    for package in PACKAGES:
        with suppress(PackageNotFoundError):  # a checkout that is not installed
            found[package] = version(package)
    return found
