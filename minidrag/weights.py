"""Checkpoint to model: a folder, a single file or a hub id in, networks ready to run out.

The networks bear the official files' names, so that a file is read straight into them: strictly, tensor by
tensor, with nothing computed at random first. `names.py` has the rules for files that spell names otherwise.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minidrag.clip import CLIPConfig, CLIPTextEncoder
from minidrag.ddim import Schedule
from minidrag.names import text_names, vae_names
from minidrag.tokenizer import Tokenizer, read_json
from minidrag.unet import UNet, UNetConfig
from minidrag.vae import VAE, VAEConfig

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@dataclass
class Model:
    """Everything that an edit needs of Stable Diffusion. prediction: what the UNet was trained to tell."""

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

    @torch.no_grad()
    def encode_text(self, prompts: str | list[str]) -> Tensor:
        """Returns (B, 77, C), one row for each prompt, overlong prompts cut."""
        return self.text_encoder(self.tokenizer(prompts).to(self.device))


class Part(NamedTuple):
    """A network without values yet, the file that has them, and {name in the network: name in the file}."""

    network: nn.Module
    file: Path
    names: dict[str, str]


def load_model(
    source: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Model:
    device, dtype = torch.device(device or default_device()), dtype or torch.float32
    folder = Path(source or "")
    parts = {name: folder_part(folder / name, name, dtype) for name in STEMS}
    networks: dict[str, Any] = {name: fill(part, device, dtype) for name, part in parts.items()}
    values = read_json(folder / "scheduler" / "scheduler_config.json", {})
    prediction = values.pop("prediction_type", "epsilon")
    return Model(
        **networks,
        tokenizer=Tokenizer.load(folder / "tokenizer"),
        schedule=Schedule.from_json(values),
        source=str(source),
        prediction=prediction,
    )


def default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def folder_part(folder: Path, name: str, dtype: torch.dtype) -> Part:
    values = read_json(folder / "config.json")
    file = weights_file(folder, STEMS[name], dtype)
    with safe_open(file, "pt") as opened:
        keys = list(opened.keys())
    with torch.device("meta"):
        if name == "unet":
            return Part(UNet(UNetConfig.from_json(values)), file, {key: key for key in keys})
        if name == "vae":
            return Part(VAE(VAEConfig.from_json(values)), file, vae_names(keys))
        config = CLIPConfig.from_json(values)
        return Part(CLIPTextEncoder(config), file, text_names(keys, config.num_hidden_layers))


def weights_file(folder: Path, stem: str, dtype: torch.dtype) -> Path:
    """The file of a network in its folder: the half-size variant where that is enough, else whichever is there."""
    infixes = (".fp16", "") if dtype.itemsize == 2 else ("", ".fp16")
    for infix in infixes:
        if (path := folder / f"{stem}{infix}.safetensors").is_file():
            return path
    raise FileNotFoundError(f"{folder / stem}.safetensors is missing")


def fill(part: Part, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Reads a network's tensors from its file onto a device, in a dtype; never more than one of them twice."""
    tensors, file = {}, safe_open(part.file, "pt")
    for name, empty in part.network.state_dict().items():
        tensor = file.get_tensor(part.names[name]).reshape(empty.shape)
        misaligned = tensor.data_ptr() % tensor.element_size() != 0
        if device.type != "cpu" or tensor.dtype != dtype or misaligned:
            tensor = tensor.to(device, dtype, copy=True)
            # Opened anew, since a file that stays mapped keeps in memory each page that was read through it.
            file = safe_open(part.file, "pt")
        tensors[name] = tensor
    part.network.load_state_dict(tensors, strict=True, assign=True)
    return part.network.requires_grad_(False)
