"""Both sides of a parity test: our network and the reference library's, with the same random weights.

Functions named `*_pairs` run both and return pairs of tensors by name. The parity tests assert that the two
of a pair are equal, and test_mistakes.py that they differ after a deliberate mistake.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from minidrag.networks.clip import CLIPTextEncoder
from minidrag.networks.unet import UNet, UNetOutput
from minidrag.networks.vae import VAE
from minidrag.weights.configs import read_text_encoder, read_unet, read_vae

Pairs = dict[str, tuple[Tensor, Tensor]]

# The official SD 1.5 files, with exactly their keys.
SD15_UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SD15_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SD15_TEXT: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "vocab_size": 49408,
}
SD21_UNET = SD15_UNET | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
SD21_TEXT = SD15_TEXT | {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}

# The same structures, small. Head counts differ from head widths, and text widths from all others, so that no
# mix-up goes unnoticed; groups have several channels, or GroupNorm would cancel every bias before it.
UNETS = {
    "SD 1.5": SD15_UNET
    | {"block_out_channels": [32, 80, 96, 96], "norm_num_groups": 8, "cross_attention_dim": 20},
    "SD 2.1": SD21_UNET
    | {
        "block_out_channels": [32, 64, 96, 96],
        "attention_head_dim": [2, 4, 6, 6],
        "norm_num_groups": 8,
        "cross_attention_dim": 24,
    },
    "shipped": SD15_UNET
    | {
        "block_out_channels": [64, 96, 128, 160],
        "attention_head_dim": [1, 2, 4, 4],
        "layers_per_block": 1,
        "norm_num_groups": 16,
        "cross_attention_dim": 28,
    },
}
VAES = {
    "three halvings": SD15_VAE | {"block_out_channels": [16, 32, 48, 48], "norm_num_groups": 8},
    "two halvings": SD15_VAE
    | {
        "block_out_channels": [24, 32, 40],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "scaling_factor": 0.7,
    },
}
TEXTS = {
    "quick_gelu": SD15_TEXT
    | {
        "hidden_size": 48,
        "intermediate_size": 100,
        "num_attention_heads": 6,
        "num_hidden_layers": 3,
        "vocab_size": 120,
    },
    "gelu": SD21_TEXT
    | {
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "vocab_size": 120,
    },
}


def on_meta(build: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        return build().eval()


def our_unet(config: dict[str, Any]) -> UNet:
    return on_meta(lambda: UNet(read_unet(config)))


def our_vae(config: dict[str, Any]) -> VAE:
    return on_meta(lambda: VAE(read_vae(config)))


def our_text(config: dict[str, Any]) -> CLIPTextEncoder:
    return on_meta(lambda: CLIPTextEncoder(read_text_encoder(config)))


def reference_unet(config: dict[str, Any]) -> Any:
    return on_meta(lambda: UNet2DConditionModel(**without_labels(config)))


def reference_vae(config: dict[str, Any]) -> Any:
    return on_meta(lambda: AutoencoderKL(**without_labels(config)))


def reference_text(config: dict[str, Any], attention: str = "sdpa") -> Any:
    config = config | {"attn_implementation": attention}
    return on_meta(lambda: CLIPTextModel(CLIPTextConfig(**config)))


def without_labels(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def official_names(reference: nn.Module) -> dict[str, Tensor]:
    """A reference's state dict with the names in the official files, whatever the installed release."""
    tensors = {name: tensor for name, tensor in reference.state_dict().items() if "position_ids" not in name}
    if isinstance(reference, CLIPTextModel):  # transformers 5.6 dropped the prefix
        tensors = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in tensors.items()}
    return tensors


def shapes(tensors: dict[str, Tensor]) -> list[str]:
    """Sorted lines such as `conv_in.weight 320x4x3x3`, as in tests/data."""
    return sorted(f"{name} {'x'.join(map(str, tensor.shape))}" for name, tensor in tensors.items())


def fill(reference: nn.Module, dtype: torch.dtype, seed: int = 0) -> None:
    """Fill a module built on the meta device with seeded random weights.

    No parameter gets a trivial value: a weight of one or a bias of zero would hide that it is not used.
    Convolutions shrink their input, so that the eps of the norms after them matters.
    """
    nn.Module.to(reference, dtype).to_empty(device="cpu")  # nn.Module's: the `to` of diffusers warns
    generator = torch.Generator().manual_seed(seed)
    for name, weight in reference.named_parameters():
        middle = 1.0 if weight.ndim == 1 and name.endswith("weight") else 0.0
        spread = 0.3 if weight.ndim == 1 else (0.4 if weight.ndim == 4 else 1) * weight[0].numel() ** -0.5
        weight.requires_grad_(False).normal_(middle, spread, generator=generator)
    for name, buffer in reference.named_buffers():
        assert name.endswith("position_ids"), name
        buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))


def share_weights(reference: nn.Module, ours: nn.Module) -> None:
    """Make ours, built on the meta device, use the reference's tensors: one copy in memory."""
    ours.load_state_dict(official_names(reference), strict=True, assign=True)
    ours.requires_grad_(False)


def same_weights(reference: nn.Module, ours: nn.Module, dtype: torch.dtype) -> None:
    fill(reference, dtype)
    share_weights(reference, ours)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def up_self_attentions(unet: Any) -> list[list[Any]]:
    """The self-attention modules of each up block; the attribute names are the same on both sides."""
    layers = [getattr(block, "attentions", []) for block in unet.up_blocks]
    return [[layer.transformer_blocks[0].attn1 for layer in block] for block in layers]


def run_reference_unet(reference: Any, latent: Tensor, timestep: int | Tensor, text: Tensor) -> UNetOutput:
    """Run diffusers' UNet with our output type: hooks collect features, keys and values."""
    features: list[Tensor] = []
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def record(module: nn.Module, into: list[Tensor]) -> Any:
        return module.register_forward_hook(lambda *args: into.append(args[2]))

    hooks = [record(block, features) for block in reference.up_blocks]
    blocks = up_self_attentions(reference)
    for attention in itertools.chain(*blocks):
        hooks += [record(attention.to_k, keys), record(attention.to_v, values)]
    try:
        noise = reference(latent, timestep, text).sample
    finally:
        for hook in hooks:
            hook.remove()
    pairs = iter(zip(keys, values, strict=True))
    return UNetOutput(noise, features, [[next(pairs) for _ in block] for block in blocks])


def difference(ours: Tensor, reference: Tensor) -> float:
    """The largest absolute difference; infinite where shapes or dtypes differ or a value is not finite."""
    same = ours.shape == reference.shape and ours.dtype == reference.dtype
    if not same or not (ours.isfinite().all() and reference.isfinite().all()):
        return float("inf")
    return (ours.detach() - reference.detach()).abs().max().item()


def unet_pairs(ours: UNetOutput, reference: UNetOutput) -> Pairs:
    """Pair noise, every feature, every K and V; lists of different lengths are an error."""
    pairs = {"noise": (ours.noise, reference.noise)}
    for i, pair in enumerate(zip(ours.features, reference.features, strict=True)):
        pairs[f"feature {i}"] = pair
    for block, others in enumerate(zip(ours.keys_values, reference.keys_values, strict=True)):
        for i, (a, b) in enumerate(zip(*others, strict=True)):
            pairs |= {f"key {block}.{i}": (a[0], b[0]), f"value {block}.{i}": (a[1], b[1])}
    return pairs


def vae_pairs(ours: VAE, reference: Any, image: Tensor, latent: Tensor) -> Pairs:
    """Pair mean and standard deviation of the scaled latent of an image, and the image of a scaled latent."""
    scale, moments = reference.config.scaling_factor, reference.encode(image).latent_dist
    mean, std = ours.encode(image)
    return {
        "mean": (mean, moments.mean * scale),
        "std": (std, moments.std * scale),
        "image": (ours.decode(latent), reference.decode(latent / scale).sample),
    }


def text_pairs(ours: CLIPTextEncoder, reference: Any, tokens: Tensor) -> Pairs:
    return {"text": (ours(tokens), reference(tokens).last_hidden_state)}


def prompt_tokens(vocabulary: int, pad: int | None = None) -> Tensor:
    """Three prompts of 77 ids, as the tokenizer returns them: empty, of six words, and truncated.

    The last two ids of the vocabulary start and end a prompt. SD 1.x pads with the latter, SD 2.x with id 0.
    """
    start, end = vocabulary - 2, vocabulary - 1
    words = torch.randint(0, start, (75,), generator=torch.Generator().manual_seed(5)).tolist()
    prompts = [[start, *words[:count], end] for count in (0, 6, 75)]
    filler = end if pad is None else pad
    return torch.tensor([prompt + [filler] * (77 - len(prompt)) for prompt in prompts])
