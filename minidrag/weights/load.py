"""load_model: from a folder, a single file or a hub id to networks that are ready to run."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minidrag.model import Model
from minidrag.networks.clip import CLIPConfig
from minidrag.networks.tokenizer import Tokenizer
from minidrag.networks.unet import UNetConfig
from minidrag.networks.vae import VAEConfig
from minidrag.system.files import LINK, check_regular
from minidrag.weights.checkpoint import (
    NETWORKS,
    NetworkFile,
    check_absent,
    check_complete,
    load_weights,
    match,
)
from minidrag.weights.configs import READERS, read_schedule
from minidrag.weights.device import default_device
from minidrag.weights.files import (
    FORMATS,
    INDEX,
    LAYOUT,
    PICKLES,
    Header,
    Json,
    read_header,
    read_object,
    weight_file,
)
from minidrag.weights.hub import VOCABULARY, fetch
from minidrag.weights.vocabulary import load_tokenizer

DEFAULT = "stable-diffusion-v1-5/stable-diffusion-v1-5"
REMOVED = "runwayml/stable-diffusion-v1-5"  # the original repository
TINY = Path(__file__).parents[1] / "tiny/model"
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
# A single file has no configuration: assume the sizes of SD 1.5.
SINGLE_FILE: dict[str, Any] = {"unet": UNetConfig(), "vae": VAEConfig(), "text_encoder": CLIPConfig()}
FILES = {*PICKLES, *FORMATS, ".safetensors", ".json"}  # suffixes, which no hub id has


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
    tokenizer: folder with vocab.json and merges.txt, or tokenizer.json, to use instead of the model's.
    A local path needs no network, except for the tokenizer of a single file that has none beside it.
    Raises FileNotFoundError or ValueError, with the remedy, before reading any weights.
    """
    device = torch.device(device or default_device())
    dtype = dtype or torch.float32
    source = DEFAULT if source is None else TINY if source == "tiny" else source
    names = [name for name in NETWORKS if name != "vae" or vae is None]
    path = local_path(source)
    if path is None:
        needed = [f"{name}/config.json" for name in names] + VOCABULARY
        stems = [f"{name}/{STEMS[name]}" for name in names]
        path = fetch(DEFAULT if source == "sd15" else str(source), needed, stems, infixes(dtype))
    files, scheduler = open_model(path, vae, dtype)
    vocabulary = open_tokenizer(path, tokenizer, files)
    networks: dict[str, Any] = {name: load_weights(file, device, dtype) for name, file in files.items()}
    return Model(
        **networks,
        tokenizer=vocabulary,
        schedule=read_schedule(scheduler),
        source=str(source),
        prediction=scheduler.get("prediction_type", "epsilon"),
    )


def open_model(path: Path, vae: str | Path | None, dtype: torch.dtype) -> tuple[dict[str, NetworkFile], Json]:
    """Open the networks of a model and its scheduler_config.json, and check that all fit together.

    path: a folder or a single file. vae: as in `load_model`. Reads no weights.
    Raises FileNotFoundError or ValueError, with the remedy.
    """
    names = [name for name in NETWORKS if name != "vae" or vae is None]
    file = path / "scheduler/scheduler_config.json" if path.is_dir() else path
    scheduler = read_object(file, {}) if path.is_dir() else single_file_schedule(read_header(path))
    try:
        read_schedule(scheduler)
    except ValueError as error:
        raise ValueError(f"{file} is not usable: {error}") from error
    files = open_folder(path, names, dtype) if path.is_dir() else open_single_file(path, names)
    if vae is not None:
        files["vae"] = open_vae(vae, dtype)
    check_widths(path, files)
    return files, scheduler


def check_widths(path: Path, files: dict[str, NetworkFile]) -> None:
    """Raise ValueError for networks that cannot work with each other."""
    unet, vae, text = (files[name].network.config for name in ("unet", "vae", "text_encoder"))
    pairs = {
        "the text encoder's vectors": (text.hidden_size, unet.cross_attention_dim),
        "the VAE's latents": (vae.latent_channels, unet.in_channels),
    }
    for name, (width, expected) in pairs.items():
        if width != expected:
            raise ValueError(
                f"{path}: {name} have {width} channels and the UNet takes {expected}: they are of two models"
            )


def local_path(source: str | Path) -> Path | None:
    """Return the file or folder that a source names, None for a hub id; FileNotFoundError for neither."""
    if not str(source):
        raise ValueError("the name of the model is empty: give a folder, a .safetensors file or a hub id")
    if re.match(LINK, str(source)):
        hub_id = re.match(r"(?i)https?:/+huggingface\.co/([\w.-]+/[\w.-]+)", str(source))
        remedy = "download it first, and give the file, or a hub id OWNER/NAME"
        raise ValueError(f"{source} is a link: {f'give {hub_id[1]}' if hub_id else remedy}")
    path = Path(os.path.expanduser(source))
    if path.exists():
        return path
    if source == REMOVED:
        raise ValueError(f"{REMOVED} was taken down in 2024: give {DEFAULT}, which has the same files")
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and path.suffix not in FILES
    if source == "sd15" or (isinstance(source, str) and is_id and not path.parent.exists()):
        return None
    raise FileNotFoundError(
        f"{source} does not exist: give a folder, a .safetensors file or a hub id OWNER/NAME"
    )


def infixes(dtype: torch.dtype) -> tuple[str, ...]:
    """Parts of a weight file's name by variant, preferred first."""
    return (".fp16", "") if dtype.itemsize == 2 else ("", ".fp16")


def open_single_file(file: Path, names: list[str]) -> dict[str, NetworkFile]:
    header = read_header(file)
    check_complete(header, names)
    configs = dict(SINGLE_FILE)
    for key, shape in header.shapes.items():
        if key.endswith(".token_embedding.weight") and len(shape) == 2:  # longer with added tokens
            configs["text_encoder"] = replace(configs["text_encoder"], vocab_size=shape[0])
    return {name: match(name, header, configs[name]) for name in names}


def single_file_schedule(header: Header) -> Json:
    """Schedule keys that may differ from SD 1.5 in a single file.

    The header's metadata, an empty tensor, or a .yaml file beside it name them.
    """
    prediction = header.metadata.get("modelspec.prediction_type", "epsilon")
    if "v_pred" in header.shapes:
        prediction = "v"
    for file in (header.file.with_suffix(suffix) for suffix in (".yaml", ".yml")):
        if file.is_file():
            text = check_regular(file, 2**20).read_text(encoding="utf-8", errors="replace")
            if line := re.search(r"""(?m)^[^#\n]*\bparameterization\s*:\s*["']?(\w+)""", text):
                prediction = line[1]
    names = {"v": "v_prediction", "eps": "epsilon", "x0": "sample"}
    return {
        "prediction_type": names.get(prediction, prediction),
        "rescale_betas_zero_snr": "ztsnr" in header.shapes,
    }


def open_folder(folder: Path, names: list[str], dtype: torch.dtype) -> dict[str, NetworkFile]:
    absent = [name for name in names if not (folder / name).is_dir()]
    if absent != names:
        check_absent(str(folder), absent)
    headers = {name: read_folder(folder / name, name, dtype) for name in names}  # all, before one is built
    return {name: match(name, *pair) for name, pair in headers.items()}


def read_folder(folder: Path, name: str, dtype: torch.dtype) -> tuple[Header, Any]:
    """Read the header and the sizes of a network in a folder with config.json and weights or shards."""
    file = folder / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: the folder is not a model or is incomplete")
    config = read_config(file, name)
    for infix in infixes(dtype):
        if weights := weight_file(folder / STEMS[name], infix):
            return read_header(weights), config
    raise FileNotFoundError(missing_weights_message(folder, name))


def read_config(file: Path, name: str) -> Any:
    values = read_object(file)
    try:
        return READERS[name](values)
    except ValueError as error:
        raise ValueError(f"{file} is not usable: {error}") from error


def missing_weights_message(folder: Path, name: str) -> str:
    """Say which weight file is missing, and what to do with the file found instead."""
    file = folder / f"{STEMS[name]}.safetensors"
    others = sorted(folder.iterdir())
    if any(other.suffix in PICKLES for other in others):
        return (
            f"{file} is missing and {folder} has only pickles: convert the model folder with "
            "`python -m weights_convert safetensors FOLDER OUT` and give OUT"
        )
    tensors = [other for other in others if other.suffix == ".safetensors"]
    if any("-of-" in other.name for other in tensors):
        return f"{folder / (STEMS[name] + INDEX + '.json')} is missing, without which shards are of no use"
    if tensors:
        return f"{file} is missing, but {tensors[0]} is there: if it is the {name}, rename it"
    if foreign := [other for other in others if other.suffix in FORMATS]:
        return f"{file} is missing and {foreign[0]} is {FORMATS[foreign[0].suffix]}: {LAYOUT}"
    return f"{file} is missing: download it again"


def open_vae(source: str | Path, dtype: torch.dtype) -> NetworkFile:
    """Open a VAE in a file, in a VAE's folder, or in a model folder."""
    path = local_path(source) or fetch(str(source), ["config.json"], [STEMS["vae"]], infixes(dtype))
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        return match("vae", *read_folder(folder, "vae", dtype))
    return match("vae", read_header(path), SINGLE_FILE["vae"])


def open_tokenizer(path: Path, other: str | Path | None, files: dict[str, NetworkFile]) -> Tokenizer:
    """Load a model's tokenizer, or `other`; raises ValueError for one that does not fit its text encoder."""
    folder = tokenizer_folder(path, other)
    tokenizer = load_tokenizer(folder)
    config = files["text_encoder"].network.config
    if tokenizer.size != config.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {tokenizer.size} tokens, but the text encoder of {path} has "
            f"{config.vocab_size}: give the tokenizer that belongs to it, with its added_tokens.json"
        )
    return tokenizer


def tokenizer_folder(path: Path, other: str | Path | None) -> Path:
    """Return the folder with the vocabulary: `other`, the model's, beside a single file, or from the hub."""
    place = path if path.is_dir() else path.parent
    place = place if other is None else Path(os.path.expanduser(other))
    if folder := find_vocabulary(place):
        return folder
    if other is not None or path.is_dir():
        raise FileNotFoundError(
            f"neither {place} nor {place / 'tokenizer'} has a vocab.json: copy a tokenizer there"
        )
    try:
        return fetch(DEFAULT, VOCABULARY, [], ("",)) / "tokenizer"
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} has no tokenizer beside it: give a folder with one as --tokenizer ({error})"
        ) from error


def find_vocabulary(place: Path) -> Path | None:
    """Return the folder `tokenizer` in `place` or `place` itself, whichever has a vocabulary."""
    for folder in (place / "tokenizer", place):
        if (folder / "vocab.json").exists() or (folder / "tokenizer.json").exists():
            return folder
    return None
