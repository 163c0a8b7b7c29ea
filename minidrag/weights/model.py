"""load_model: from a folder, a single file or a hub id to networks that are ready to run."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minidrag import images
from minidrag.config import EditConfig
from minidrag.method.ddim import Schedule
from minidrag.method.lora import Moments
from minidrag.networks.clip import CLIPConfig, CLIPTextEncoder
from minidrag.networks.tokenizer import Tokenizer
from minidrag.networks.unet import UNet, UNetConfig
from minidrag.networks.vae import VAE, VAEConfig
from minidrag.watch import watch
from minidrag.weights.checkpoint import NETWORKS, PICKLES, Part, fill, find_part, read_shapes, refuse_foreign
from minidrag.weights.configs import READERS, load_tokenizer, read_json, read_schedule
from minidrag.weights.hub import fetch

DEFAULT = "stable-diffusion-v1-5/stable-diffusion-v1-5"
REMOVED = "runwayml/stable-diffusion-v1-5"  # the original repository
TINY = Path(__file__).parents[1] / "tiny/model"
VOCABULARY = ["tokenizer/vocab.json", "tokenizer/merges.txt"]
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
# A single file has no configuration: assume the sizes of SD 1.5.
SINGLE_FILE: dict[str, Any] = {"unet": UNetConfig(), "vae": VAEConfig(), "text_encoder": CLIPConfig()}


@dataclass
class Model:
    """Everything that an edit needs of Stable Diffusion; no parameter requires gradients."""

    unet: UNet
    vae: VAE
    text_encoder: CLIPTextEncoder
    tokenizer: Tokenizer
    schedule: Schedule
    source: str  # path or hub id
    prediction: str = "epsilon"  # target of the UNet's training; epsilon is the noise

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @property
    def is_sd1(self) -> bool:
        """True for a UNet of the sizes of SD 1.x, for which the paper's settings are meant."""
        return self.unet.config == UNetConfig()

    @torch.no_grad()
    def encode_text(self, prompts: str | list[str]) -> Tensor:
        """Encode prompts, truncated if need be, to (B, 77, C)."""
        return self.text_encoder(self.tokenizer(prompts).to(self.device))


def load_model(
    source: str | Path | None = None,
    *,
    vae: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
) -> Model:
    """Load a model from a folder, a single file or the Hugging Face hub.

    source: a folder in the official layout, a .safetensors file in the original layout (SD 1.x only) or a hub
    id; None and "sd15" are Stable Diffusion 1.5, "tiny" is the small model that ships with minidrag.
    vae: folder, file or hub id of a VAE to use instead of the model's. device: by default a GPU, CUDA or
    Apple's, if there is one. dtype: by default float32; a 16-bit one prefers the .fp16 files.
    tokenizer: folder with vocab.json and merges.txt to use instead of the model's.
    A local path needs no network, except for the tokenizer of a single file that has none beside it.
    Raises FileNotFoundError or ValueError, with the remedy, before reading any weights.
    """
    device, dtype = torch.device(device or default_device()), dtype or torch.float32
    source = DEFAULT if source is None else TINY if source == "tiny" else source
    names = [name for name in NETWORKS if name != "vae" or vae is None]
    path = local_path(source) or fetch_model(str(source), names, dtype)
    parts = folder_parts(path, names, dtype) if path.is_dir() else single_file_parts(path, names)
    if vae is not None:
        parts["vae"] = vae_part(vae, dtype)
    vocabulary = load_tokenizer(tokenizer_folder(path, tokenizer))
    scheduler = read_json(path / "scheduler/scheduler_config.json", {}) if path.is_dir() else {}
    schedule, prediction = read_schedule(scheduler), scheduler.get("prediction_type", "epsilon")
    networks: dict[str, Any] = {name: fill(part, device, dtype) for name, part in parts.items()}
    return Model(
        **networks, tokenizer=vocabulary, schedule=schedule, source=str(source), prediction=prediction
    )


def working_size(model: Model, size: tuple[int, int], config: EditConfig) -> tuple[int, int]:
    """(width, height) at which the model works on an image of `size`: multiples of 8 for SD 1.5."""
    factor = model.vae.config.factor
    return images.working_size(*size, config.size or model.unet.config.sample_size * factor, factor)


@torch.no_grad()
def encode(model: Model, image: Image.Image, config: EditConfig) -> Moments:
    """Mean and standard deviation of an image's latent, (1, 4, H, W), float32 or wider."""
    resized = images.resize(image, working_size(model, image.size, config))
    moments = model.vae.encode(images.to_tensor(resized).to(model.device, model.dtype))
    mean, std = (x.to(torch.promote_types(model.dtype, torch.float32)) for x in moments)
    return next(watch("encoding", [(mean, std)], 1))


@torch.no_grad()
def decode(model: Model, latent: Tensor) -> Image.Image:
    """Image, at working size, of a latent (1, 4, H, W)."""
    return images.to_image(next(watch("decoding", [model.vae.decode(latent.to(model.dtype))], 1)))


@contextmanager
def only_unet_on_device(model: Model, checkpointing: bool) -> Iterator[None]:
    """Save memory within a context: the other networks wait on the CPU, and the UNet may recompute."""
    others, device, before = (model.vae, model.text_encoder), model.device, model.unet.checkpointing
    model.unet.checkpointing = checkpointing
    try:
        for network in others:
            network.to("cpu")
        yield
    finally:
        for network in others:
            network.to(device)
        model.unet.checkpointing = before


def default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(name: str) -> torch.device:
    """The device of a name; raises ValueError for one that does not exist."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(f"unknown device {name!r}: use cpu, cuda, or mps") from None
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= count.get(device.type, 0):
        raise ValueError(f"device {name!r} is not available: use {default_device()}")
    return device


def local_path(source: str | Path) -> Path | None:
    """The file or folder that a source names, None for a hub id; raises FileNotFoundError for neither."""
    if not str(source):
        raise ValueError("the name of the model is empty: give a folder, a .safetensors file or a hub id")
    if re.match(r"https?:/", str(source)):
        known = re.match(r"https?:/+huggingface\.co/([\w.-]+/[\w.-]+)", str(source))
        what = f"give {known[1]}" if known else "download it first, and give the file, or a hub id OWNER/NAME"
        raise ValueError(f"{source} is a link: {what}")
    path = Path(os.path.expanduser(source))
    if path.exists():
        return path
    if source == REMOVED:
        raise ValueError(f"{REMOVED} was taken down in 2024: give {DEFAULT}, which has the same files")
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and path.suffix not in {*PICKLES, ".safetensors"}
    if source == "sd15" or (isinstance(source, str) and is_id and not path.parent.exists()):
        return None
    raise FileNotFoundError(
        f"{source} does not exist: give a folder, a .safetensors file or a hub id OWNER/NAME"
    )


def infixes(dtype: torch.dtype) -> tuple[str, ...]:
    """Variants of a weight file, preferred first."""
    return (".fp16", "") if dtype.itemsize == 2 else ("", ".fp16")


def fetch_model(source: str, names: list[str], dtype: torch.dtype) -> Path:
    needed = [f"{name}/config.json" for name in names] + VOCABULARY
    stems = [f"{name}/{STEMS[name]}" for name in names]
    return fetch(DEFAULT if source == "sd15" else source, needed, stems, infixes(dtype))


def single_file_parts(file: Path, names: list[str]) -> dict[str, Part]:
    refuse_foreign(read_shapes(file), file)
    return {name: find_part(name, file, SINGLE_FILE[name]) for name in names}


def folder_parts(folder: Path, names: list[str], dtype: torch.dtype) -> dict[str, Part]:
    return {name: folder_part(folder / name, name, dtype) for name in names}


def folder_part(folder: Path, name: str, dtype: torch.dtype) -> Part:
    """Find a network in its own folder, which has config.json and a weight file."""
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: the folder is not a model or is incomplete")
    values = read_json(file)
    try:
        config = READERS[name](values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is not usable: {error}") from error
    for infix in infixes(dtype):
        if (file := folder / f"{STEMS[name]}{infix}.safetensors").is_file():
            return find_part(name, file, config)
    file = folder / f"{STEMS[name]}.safetensors"
    if any(other.suffix in PICKLES for other in folder.iterdir()):
        raise FileNotFoundError(
            f"{file} is missing and {folder} has only pickles: convert the model folder with "
            "`python -m weights_convert safetensors FOLDER OUT` and give OUT"
        )
    raise FileNotFoundError(f"{file} is missing: download it again")


def vae_part(source: str | Path, dtype: torch.dtype) -> Part:
    """Find a VAE in a file, in a folder of its own or in a model folder."""
    path = local_path(source) or fetch(str(source), ["config.json"], [STEMS["vae"]], infixes(dtype))
    if path.is_file():
        return find_part("vae", path, SINGLE_FILE["vae"])
    return folder_part(path / "vae" if (path / "vae").is_dir() else path, "vae", dtype)


def tokenizer_folder(path: Path, given: str | Path | None) -> Path:
    """The folder with vocab.json: in the folder given or the model's, beside a single file, or on the hub."""
    place = Path(os.path.expanduser(given)) if given is not None else path if path.is_dir() else path.parent
    if folder := find_vocabulary(place):
        return folder
    if given is not None or path.is_dir():
        raise FileNotFoundError(
            f"neither {place} nor {place / 'tokenizer'} has a vocab.json: copy a tokenizer there"
        )
    return fetch(DEFAULT, VOCABULARY, [], ("",)) / "tokenizer"


def find_vocabulary(place: Path) -> Path | None:
    """The folder `tokenizer` in `place` or `place` itself, whichever has a vocab.json."""
    folders = (place / "tokenizer", place)
    return next((folder for folder in folders if (folder / "vocab.json").is_file()), None)
