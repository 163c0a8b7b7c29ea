"""LoRAs kept between runs: the same image, prompt, model, and settings need no second training."""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from minidrag import images
from minidrag.config import EditConfig
from minidrag.method.lora import LoRA
from minidrag.model import Model, working_size
from minidrag.system.files import check_regular, sha256, unfinished
from minidrag.weights import lora_file

DIGITS = 16  # of the digest of the contents in a file's name
MAX_BYTES = 2_000_000_000
PACKAGES = ("minidrag", "safetensors", "numpy", "pillow", "tokenizers", "huggingface-hub")


def find_lora(
    model: Model, image: Image.Image, prompt: str, config: EditConfig, seed: int, train: Callable[[], LoRA]
) -> tuple[LoRA, str]:
    """Return the cached LoRA of an image, or train and cache it; and its origin, in words."""
    if config.lora_steps == 0:
        return LoRA({}, {}), "none (--lora-steps)"
    folder = cache_folder()
    key = cache_key(model, image, prompt, config, seed)
    cached = sorted(folder.glob(f"{key}-*.safetensors"))
    for file in cached:
        with suppress(Exception):  # damaged, in whatever way
            return read(file, model), f"reused from {file}"
    lora = train()
    try:
        file = write(lora, folder, key, notes(model, prompt, config, seed), cached)
    except OSError as error:
        return lora, f"trained, but not cached: {folder / key} cannot be written ({error.strerror})"
    return lora, f"trained and cached in {file}"


def read(file: Path, model: Model) -> LoRA:
    """Read a cached LoRA; raises an exception of any kind for one that is not as it was written."""
    if not file.stem.endswith(f"-{sha256(check_regular(file, MAX_BYTES))[:DIGITS]}"):
        raise ValueError(f"{file} has changed since it was written")
    return lora_file.read(file, model.unet, model.text_encoder)


def write(lora: LoRA, folder: Path, key: str, about: dict[str, str], damaged: Sequence[Path]) -> Path:
    """Cache a LoRA in a file whose name ends with a digest of its contents; remove the damaged files.

    Two processes that write the same LoRA do not meet: each completes it in a file of its process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with unfinished(folder) as part:
        lora_file.write(lora, part / "lora.safetensors", about)
        file = folder / f"{key}-{sha256(part / 'lora.safetensors')[:DIGITS]}.safetensors"
        for path in damaged:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        os.replace(part / "lora.safetensors", file)
    return file


def cache_folder() -> Path:
    """Folder of the cached LoRAs; raises ValueError for one in a home that does not exist."""
    place = os.path.expanduser(os.environ.get("MINIDRAG_CACHE") or "~/.cache/minidrag")
    if place.startswith("~"):
        raise ValueError(f"there is no home folder for {place}: set MINIDRAG_CACHE to a folder")
    return Path(place) / "lora"


def cache_key(model: Model, image: Image.Image, prompt: str, config: EditConfig, seed: int) -> str:
    """Digest of everything that decides the LoRA of an image."""
    small = images.resize(image, working_size(model, image.size, config))
    computation = [str(model.device), str(model.dtype), repr(model.schedule), versions()]
    tokens = model.tokenizer(prompt).tolist()
    values = [small.size, tokens, settings(config, seed), computation, fingerprint(model)]
    digest = hashlib.sha256(json.dumps(values).encode())
    digest.update(small.tobytes())
    return digest.hexdigest()[:32]


def fingerprint(model: Model) -> str:
    """Digest of a few numbers of each weight: training changes them all, so these tell two models apart."""
    digest = hashlib.sha256()
    for network in (model.unet, model.vae, model.text_encoder):
        for name, tensor in network.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten()[:16].cpu().double().numpy().tobytes())
    return digest.hexdigest()


def settings(config: EditConfig, seed: int) -> dict[str, Any]:
    """Settings of the training."""
    values = {name: value for name, value in asdict(config).items() if name.startswith("lora_")}
    return {**values, "seed": seed}


def notes(model: Model, prompt: str, config: EditConfig, seed: int) -> dict[str, str]:
    """Metadata for the LoRA's file."""
    values = {name: str(value) for name, value in settings(config, seed).items()}
    return {"prompt": prompt, "model": model.source, **values}


def versions() -> dict[str, str]:
    """Versions of the packages that decide an edit's numbers."""
    numbers = {"python": platform.python_version(), "torch": str(torch.__version__)}  # CPU or CUDA build too
    for package in PACKAGES:
        with suppress(PackageNotFoundError):  # a checkout that is not installed
            numbers[package] = version(package)
    return numbers
