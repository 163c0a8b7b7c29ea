"""The small files of a model folder, as diffusers and transformers want them."""

from dataclasses import asdict
from typing import Any

from minidrag.networks.clip import CLIPConfig
from minidrag.networks.unet import UNetConfig
from minidrag.networks.vae import VAEConfig

MODEL_INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.6.0",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
TOKENIZER: dict[str, Any] = {
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": 77,
    "do_lower_case": True,
    "add_prefix_space": False,
    "errors": "replace",
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
}


def unet_json(config: UNetConfig) -> dict[str, Any]:
    values = asdict(config)
    attention, heads = values.pop("attention"), values.pop("heads")
    return values | {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.6.0",
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,
        "down_block_types": ["CrossAttnDownBlock2D" if there else "DownBlock2D" for there in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if there else "UpBlock2D" for there in reversed(attention)],
        "sample_size": 64,
    }


def vae_json(config: VAEConfig) -> dict[str, Any]:
    levels = len(config.block_out_channels)
    return asdict(config) | {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.6.0",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "sample_size": 512,
    }


def text_json(config: CLIPConfig) -> dict[str, Any]:
    return asdict(config) | {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "projection_dim": config.hidden_size,
        # Not the tokenizer's ids: the official file has these, and transformers knows what to make of them.
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


JSON = {"unet": unet_json, "vae": vae_json, "text_encoder": text_json}
