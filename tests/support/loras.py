"""LoRAs with random factors, and networks of ours and the reference libraries' to attach them to."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors import safe_open
from support.references import (
    SD15_UNET,
    TEXTS,
    UNETS,
    our_text,
    our_unet,
    prompt_tokens,
    random,
    reference_text,
    reference_unet,
    same_weights,
)
from torch import Tensor, nn
from torch.func import functional_call
from transformers import CLIPTextModel

from minidrag.method.lora import Factors, LoRA, lora_attached, target_layers
from minidrag.networks.clip import CLIPTextEncoder
from minidrag.networks.unet import UNet
from minidrag.weights import lora_file

TINY_UNET: dict[str, Any] = SD15_UNET | {
    "attention_head_dim": 2,
    "block_out_channels": [16, 24, 32, 32],
    "cross_attention_dim": 12,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
# Ends of layer paths.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
KOHYA = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")  # kohya's default
LOCON = (*KOHYA, "conv1", "conv2", "conv_shortcut", "time_emb_proj", "samplers.0.conv")
TEXT_ENCODER = ("_proj", "fc1", "fc2")


class Models(NamedTuple):
    """Our networks, and the reference libraries' with the same weights."""

    unet: UNet
    text_encoder: CLIPTextEncoder
    pipeline: StableDiffusionPipeline


def build_models() -> Models:
    unet, reference = our_unet(UNETS["SD 1.5"]), reference_unet(UNETS["SD 1.5"])
    text_encoder, text_reference = our_text(TEXTS["quick_gelu"]), reference_text(TEXTS["quick_gelu"])
    assert isinstance(unet, UNet) and isinstance(reference, UNet2DConditionModel)
    assert isinstance(text_encoder, CLIPTextEncoder) and isinstance(text_reference, CLIPTextModel)
    same_weights(reference, unet, torch.float64)
    same_weights(text_reference, text_encoder, torch.float64)
    absent: dict[str, Any] = dict.fromkeys(
        ("vae", "tokenizer", "scheduler", "safety_checker", "feature_extractor")
    )
    pipeline = StableDiffusionPipeline(
        unet=reference, text_encoder=text_reference, requires_safety_checker=False, **absent
    )
    return Models(unet, text_encoder, pipeline)


def tiny_unet(dtype: torch.dtype = torch.float64) -> UNet:
    reference, unet = reference_unet(TINY_UNET), our_unet(TINY_UNET)
    assert isinstance(unet, UNet)
    same_weights(reference, unet, dtype)
    return unet


def random_factors(
    model: nn.Module, suffixes: tuple[str, ...], seed: int, alpha: float | None = 5.0
) -> dict[str, Factors]:
    """Random factors of ranks 3 and 4 for every layer whose path ends in one of `suffixes`.

    alpha: None: the rank of each layer.
    """
    generator, entries = torch.Generator().manual_seed(seed), {}
    for path, layer in target_layers(model).items():
        if path.endswith(suffixes):
            out, inside, *size = layer.weight.shape
            rank = 3 if path.endswith("to_k") else 4
            down = torch.randn(rank, inside, *size, generator=generator) / inside
            up = torch.randn(out, rank, *[1] * len(size), generator=generator)
            entries[path] = Factors(down, up, rank if alpha is None else alpha)
    return entries


def unet_inputs() -> tuple[Tensor, int, Tensor]:
    """Latent, timestep, and text for the UNet of `build_models`."""
    return random(2, 4, 8, 6, seed=1), 681, random(2, 7, UNETS["SD 1.5"]["cross_attention_dim"], seed=2)


@torch.no_grad()
def outputs(models: Models, lora: LoRA) -> tuple[Tensor, Tensor]:
    """Noise and encoded text by our networks with a LoRA attached."""
    with lora_attached(models.unet, models.text_encoder, lora):
        return models.unet(*unet_inputs()).noise, models.text_encoder(prompt_tokens(120))


@torch.no_grad()
def reference_outputs(models: Models) -> tuple[Tensor, Tensor]:
    """Noise and encoded text by the reference libraries, with the LoRA that the pipeline has, if any."""
    noise = models.pipeline.unet(*unet_inputs()).sample
    return noise, models.pipeline.text_encoder(prompt_tokens(120)).last_hidden_state


def merged_weights(model: nn.Module, entries: dict[str, Factors]) -> dict[str, Tensor]:
    """Weights of a model, in float64, with alpha / rank * up @ down added: arguments of `functional_call`."""
    weights = {}
    for path, (down, up, alpha) in entries.items():
        before = model.get_parameter(f"{path}.weight").detach().double()
        change = torch.einsum("or,ri->oi", up.flatten(1).double(), down.flatten(1).double())
        weights[f"{path}.weight"] = before + alpha / down.shape[0] * change.reshape(before.shape)
    return weights


@torch.no_grad()
def merged_reference_noise(models: Models, entries: dict[str, Factors]) -> Tensor:
    """Noise by diffusers' UNet, with the LoRA merged into its weights by hand."""
    unet = models.pipeline.unet
    return functional_call(unet, merged_weights(unet, entries), unet_inputs()).sample


def read_notes(file: str | Path) -> dict[str, str]:
    """Notes in the metadata of a LoRA file; none in a file by others."""
    with safe_open(file, "pt") as opened:
        return json.loads((opened.metadata() or {}).get(lora_file.NOTES, "{}"))
