"""The command line, options for fast runs, and a small untrained model to run it with."""

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from minidrag.app import command_line as demo  # noqa: F401, for other tests
from minidrag.networks.clip import CLIPConfig, CLIPTextEncoder
from minidrag.networks.unet import UNet, UNetConfig
from minidrag.networks.vae import VAE, VAEConfig
from minidrag.tiny import folder, vocabulary

ROOT = Path(__file__).parents[2]
FAST = ["--steps", "4", "--inversion-steps", "3", "--lora-steps", "2", "--lora-batch", "1"]
FAST += [
    "--no-warp-start",
    "--drag-levels",
    "1",
    "--no-scale-radii",
    "--drag-steps",
    "2",
    "--size",
    "64",
    "--device",
    "cpu",
]
PHOTO = ["photo.png", "--drag", "30,40:48,42"]
WRITTEN = ["comparison.png", "edited.png", "lora.safetensors", "process.gif", "run.json"]


def write_untrained(place: Path) -> Path:
    """Write a model of the layout of the one that ships, smaller and untrained; return its folder."""
    torch.manual_seed(0)
    words = vocabulary.train(["a red ball on snow", "a ball"], 520, place / "tokenizer")
    text = CLIPConfig(
        vocab_size=words.eos + 1,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    unet = UNetConfig(
        block_out_channels=(16, 16, 24, 24),
        heads=(1, 1, 2, 2),
        layers_per_block=1,
        cross_attention_dim=16,
        norm_num_groups=4,
    )
    vae = VAEConfig(block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4)
    networks = UNet(unet), VAE(vae), CLIPTextEncoder(text)
    folder.write(place / "model", *networks, place / "tokenizer", {})
    return place / "model"


def listing(place: Path) -> set[Path]:
    """Every file and folder below a folder, by its path from there."""
    return {path.relative_to(place) for path in place.rglob("*")}


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence with which a run ended."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    last = error.splitlines()[-1]
    assert last.startswith("minidrag: ") and len(last) < 400
    return last


def raising(error: BaseException) -> Callable[..., NoReturn]:
    """A function that raises an error, whatever it is called with."""

    def stop(*arguments: object, **options: object) -> NoReturn:
        raise error

    return stop
