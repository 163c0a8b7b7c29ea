"""Writing a model as a folder in the official layout."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from minidrag.networks.clip import CLIPTextEncoder
from minidrag.networks.unet import UNet
from minidrag.networks.vae import VAE
from minidrag.system.files import unfinished, write_json
from minidrag.tiny.renderer import SIDE
from minidrag.weights.configs import model_files
from minidrag.weights.files import Json, save_tensors
from minidrag.weights.load import STEMS


def must_be_free(out: Path) -> None:
    """Raise ValueError unless `out` is missing or an empty folder, OSError if it cannot be made."""
    if os.path.lexists(out) and not (out.is_dir() and next(out.iterdir(), None) is None):
        raise ValueError(f"{out} exists already: give another folder, or delete it")
    if not out.exists():  # tried before a long training
        out.parent.mkdir(parents=True, exist_ok=True)
        out.mkdir()
        out.rmdir()


def write(
    out: Path, unet: UNet, vae: VAE, text_encoder: CLIPTextEncoder, tokenizer: Path, made: Json
) -> None:
    """Write the three networks in float16, their configurations and the tokenizer's files.

    made: settings of the training, written to training.json. The folder appears when it is complete; raises
    ValueError if `out` is not free, and OSError if writing fails.
    """
    must_be_free(out)
    sizes = replace(unet.config, sample_size=SIDE // vae.config.factor)
    files = model_files(sizes, vae.config, text_encoder.config, "DDIMScheduler")
    with unfinished(out.parent) as part:
        folder = part / out.name
        shutil.copytree(tokenizer, folder / "tokenizer")
        for name, values in (files | {"training.json": made}).items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_json(folder / name, values)
        for name, network in {"unet": unet, "vae": vae, "text_encoder": text_encoder}.items():
            tensors = {
                key: value.detach().to("cpu", torch.float16).contiguous()
                for key, value in network.state_dict().items()
            }
            save_tensors(tensors, folder / name / f"{STEMS[name]}.safetensors", {"format": "pt"})
        folder.rename(out)  # fails if another process has written a model there
