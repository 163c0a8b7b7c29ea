"""Checkpoint to model: a folder, a single file or a hub id in, networks ready to run out."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidrag.method.ddim import Schedule
from minidrag.networks.clip import CLIPTextEncoder
from minidrag.networks.tokenizer import Tokenizer, read_json
from minidrag.networks.unet import UNet, UNetConfig
from minidrag.networks.vae import VAE
from minidrag.weights.checkpoint import CONFIGS, PICKLES, Part, fill, find_part, read_shapes, refuse_foreign
from minidrag.weights.hub import fetch

DEFAULT = "stable-diffusion-v1-5/stable-diffusion-v1-5"
TINY = Path(__file__).parents[1] / "tiny/model"  # comes along
GONE = "runwayml/stable-diffusion-v1-5"  # where the model first was
VOCABULARY = ["tokenizer/vocab.json", "tokenizer/merges.txt"]
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
# A single file tells no sizes; they are taken to be SD 1.5's.
SINGLE_FILE: dict[str, Any] = {name: config() for name, config in CONFIGS.items()}


@dataclass
class Model:
    """All that an edit needs of Stable Diffusion; no parameter of it wants gradients.

    source: the path or hub id. prediction: what the UNet was trained to tell; "epsilon" is the noise.
    """

    unet: UNet
    vae: VAE
    text_encoder: CLIPTextEncoder
    tokenizer: Tokenizer
    schedule: Schedule
    source: str
    prediction: str = "epsilon"

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @property
    def is_sd1(self) -> bool:
        """Whether the UNet is of the kind that the paper's constants are meant for."""
        return self.unet.config == UNetConfig()

    @torch.no_grad()
    def encode_text(self, prompts: str | list[str]) -> Tensor:
        """Returns (B, 77, C), one row for each prompt, overlong prompts cut."""
        return self.text_encoder(self.tokenizer(prompts).to(self.device))


def load_model(
    source: str | Path | None = None,
    *,
    vae: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
) -> Model:
    """Reads a model from a folder, a single file or the hub.

    source: a folder in the official layout, a single .safetensors file in the original one (SD 1.x only), or
    a hub id; None and "sd15" are Stable Diffusion 1.5, "tiny" is the small model that comes along.
    vae: folder, file or hub id of a VAE to use instead. device: by default CUDA's or Apple's GPU where there
    is one. dtype: by default float32; a half one fetches the files of half the size. tokenizer: a folder with
    vocab.json and merges.txt to use instead.
    A path never touches the network, but for the tokenizer of a single file that has none beside it.
    Raises FileNotFoundError or ValueError, saying what is wrong and what to do, before any weights are read.
    """
    device, dtype = torch.device(device or default_device()), dtype or torch.float32
    source = DEFAULT if source is None else TINY if source == "tiny" else source
    names = [name for name in CONFIGS if name != "vae" or vae is None]
    path = local_path(source) or fetch_model(str(source), names, dtype)
    parts = folder_parts(path, names, dtype) if path.is_dir() else single_file_parts(path, names)
    if vae is not None:
        parts["vae"] = vae_part(vae, dtype)
    words = Tokenizer.load(tokenizer_folder(path, tokenizer))
    values = read_json(path / "scheduler/scheduler_config.json", {}) if path.is_dir() else {}
    prediction = values.pop("prediction_type", "epsilon")
    schedule = Schedule.from_json(values)
    networks: dict[str, Any] = {name: fill(part, device, dtype) for name, part in parts.items()}
    return Model(**networks, tokenizer=words, schedule=schedule, source=str(source), prediction=prediction)


def default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def local_path(source: str | Path) -> Path | None:
    """The file or folder meant; None for a hub id. Raises FileNotFoundError for a path to nothing."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if source == GONE:
        raise ValueError(f"{GONE} was taken down in 2024: give {DEFAULT}, which has the same files")
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and path.suffix not in {*PICKLES, ".safetensors"}
    if source == "sd15" or (isinstance(source, str) and is_id and not path.parent.exists()):
        return None
    raise FileNotFoundError(
        f"{source} does not exist: give a folder, a .safetensors file or a hub id OWNER/NAME"
    )


def infixes(dtype: torch.dtype) -> tuple[str, ...]:
    """The variants of a weight file, best first."""
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
    """A network that has a folder of its own, with config.json and a weight file."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder / 'config.json'} is missing: the folder is no model or not all of one"
        )
    values = read_json(folder / "config.json")
    try:
        config = CONFIGS[name].from_json(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} is not for this: {error}") from error
    for infix in infixes(dtype):
        if (file := folder / f"{STEMS[name]}{infix}.safetensors").is_file():
            return find_part(name, file, config)
    file = folder / f"{STEMS[name]}.safetensors"
    if any(other.suffix in PICKLES for other in folder.iterdir()):
        raise FileNotFoundError(
            f"{file} is missing and {folder} has pickles only: convert the model's folder with "
            "`python -m weights_convert safetensors FOLDER OUT` and give OUT"
        )
    raise FileNotFoundError(f"{file} is missing: fetch it again")


def vae_part(source: str | Path, dtype: torch.dtype) -> Part:
    """A VAE of its own: a file, a folder with it, or a whole model of which only the VAE is taken."""
    path = local_path(source) or fetch(str(source), ["config.json"], [STEMS["vae"]], infixes(dtype))
    if path.is_file():
        return find_part("vae", path, SINGLE_FILE["vae"])
    return folder_part(path / "vae" if (path / "vae").is_dir() else path, "vae", dtype)


def tokenizer_folder(path: Path, given: str | Path | None) -> Path:
    """Where vocab.json lies: in the folder given, in the model's, beside a single file, or on the hub."""
    place = Path(given).expanduser() if given is not None else path if path.is_dir() else path.parent
    for folder in (place / "tokenizer", place):
        if (folder / "vocab.json").is_file():
            return folder
    if given is not None or path.is_dir():
        raise FileNotFoundError(
            f"{place} has no vocab.json, nor has {place / 'tokenizer'}: copy a tokenizer there"
        )
    return fetch(DEFAULT, VOCABULARY, [], ("",)) / "tokenizer"
