"""Writes a model as the folder that Stable Diffusion's official files come in."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from minidrag.method.ddim import Schedule
from minidrag.networks.clip import CLIPTextEncoder
from minidrag.networks.unet import UNet
from minidrag.networks.vae import VAE

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def must_be_free(out: Path) -> None:
    """Raises ValueError for a path with something else than a model, which `write` would replace."""
    if out.exists() and not (out / "model_index.json").is_file() and not (out.is_dir() and empty(out)):
        raise ValueError(f"{out} exists and is no model: give another folder, or delete it")


def empty(folder: Path) -> bool:
    return next(folder.iterdir(), None) is None


def write(
    out: Path, unet: UNet, vae: VAE, text_encoder: CLIPTextEncoder, tokenizer: Path, made: dict
) -> None:
    """Writes the three networks in float16 with configs, the tokenizer's files, and how all was made.

    The folder appears under its name when it is complete; a model that was there before is replaced.
    Raises ValueError where there is anything else.
    """
    must_be_free(out)
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write_json(part / "model_index.json", INDEX)
    write_json(part / "training.json", made)
    write_network(part / "unet", "diffusion_pytorch_model", unet, unet_json(unet))
    write_network(part / "vae", "diffusion_pytorch_model", vae, vae_json(vae))
    write_network(part / "text_encoder", "model", text_encoder, text_json(text_encoder))
    shutil.copytree(tokenizer, part / "tokenizer")
    (part / "scheduler").mkdir()
    write_json(part / "scheduler" / "scheduler_config.json", scheduler_json(Schedule()))
    if out.exists():
        shutil.rmtree(out)
    part.rename(out)


def write_network(folder: Path, name: str, network: nn.Module, config: dict[str, Any]) -> None:
    folder.mkdir()
    write_json(folder / "config.json", config)
    weights = {
        key: value.detach().to("cpu", torch.float16).contiguous()
        for key, value in network.state_dict().items()
    }
    save_file(weights, folder / f"{name}.safetensors", metadata={"format": "pt"})


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def unet_json(unet: UNet) -> dict[str, Any]:
    config = unet.config
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": list(config.heads),  # the number of heads, whatever its name says
        "block_out_channels": list(config.block_out_channels),
        "cross_attention_dim": config.cross_attention_dim,
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in config.attention],
        "in_channels": config.in_channels,
        "layers_per_block": config.layers_per_block,
        "norm_eps": config.norm_eps,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": config.out_channels,
        "sample_size": 32,
        "up_block_types": [
            "CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(config.attention)
        ],
        "use_linear_projection": config.use_linear_projection,
    }


def vae_json(vae: VAE) -> dict[str, Any]:
    config, levels = vae.config, len(vae.config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": 3,
        "sample_size": 128,
        "scaling_factor": config.scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def text_json(text_encoder: CLIPTextEncoder) -> dict[str, Any]:
    config = text_encoder.config
    sizes = {name: getattr(config, name) for name in config.__dataclass_fields__}
    last = config.vocab_size - 1
    tokens = {"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
    return {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **sizes, **tokens}


def scheduler_json(schedule: Schedule) -> dict[str, Any]:
    return {
        "_class_name": "DDIMScheduler",
        "beta_end": schedule.beta_end,
        "beta_schedule": schedule.beta_schedule,
        "beta_start": schedule.beta_start,
        "clip_sample": False,
        "num_train_timesteps": schedule.num_train_timesteps,
        "prediction_type": "epsilon",
        "set_alpha_to_one": schedule.set_alpha_to_one,
        "steps_offset": schedule.steps_offset,
        "timestep_spacing": "leading",
    }
