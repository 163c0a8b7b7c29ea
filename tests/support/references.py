"""Both sides of a parity test: a network of ours and the reference library's, with the same random weights.

`*_pairs` functions run both and return what is to be equal, by name; the parity tests ask that the two
of each pair are, and the mistakes test that they are not once a slip is made on purpose.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from minidrag.networks.clip import CLIPConfig, CLIPTextEncoder
from minidrag.networks.unet import UNet, UNetConfig, UNetOutput
from minidrag.networks.vae import VAE, VAEConfig

Pairs = dict[str, tuple[Tensor, Tensor]]

# The official SD 1.5 files, by their own keys alone: what they leave out is left out here too.
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

# The same structures, small. Head counts never equal head widths, nor text widths any other, so that none can
# stand in for another; several channels share a group, or GroupNorm would hide every bias ahead of it.
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


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build().eval()


def our_unet(config: dict[str, Any]) -> nn.Module:
    return on_meta(lambda: UNet(UNetConfig.from_json(config)))


def our_vae(config: dict[str, Any]) -> nn.Module:
    return on_meta(lambda: VAE(VAEConfig.from_json(config)))


def our_text(config: dict[str, Any]) -> nn.Module:
    return on_meta(lambda: CLIPTextEncoder(CLIPConfig.from_json(config)))


def reference_unet(config: dict[str, Any]) -> nn.Module:
    return on_meta(lambda: UNet2DConditionModel(**without_labels(config)))


def reference_vae(config: dict[str, Any]) -> nn.Module:
    return on_meta(lambda: AutoencoderKL(**without_labels(config)))


def reference_text(config: dict[str, Any], attention: str = "sdpa") -> nn.Module:
    return on_meta(lambda: CLIPTextModel(CLIPTextConfig(**config, attn_implementation=attention)))


def without_labels(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def official_names(reference: nn.Module) -> dict[str, Tensor]:
    """A reference's state dict by the official files' names, however the installed release spells them."""
    tensors = {name: tensor for name, tensor in reference.state_dict().items() if "position_ids" not in name}
    if isinstance(reference, CLIPTextModel):  # transformers dropped the prefix in 5.6
        tensors = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in tensors.items()}
    return tensors


def shapes(tensors: dict[str, Tensor]) -> list[str]:
    """Lines such as `conv_in.weight 320x4x3x3`, sorted: the form of the lists in tests/data."""
    return sorted(f"{name} {'x'.join(map(str, tensor.shape))}" for name, tensor in tensors.items())


def fill(reference: nn.Module, dtype: torch.dtype, seed: int = 0) -> None:
    """Gives a module built on the meta device seeded random weights.

    No parameter keeps a trivial value: a norm's weight of one or a bias of zero would hide that it is unread.
    Convolutions shrink what they are given, so that the eps of the norms behind them counts.
    """
    nn.Module.to(reference, dtype).to_empty(device="cpu")  # the plain one: diffusers' own `to` warns
    generator = torch.Generator().manual_seed(seed)
    for name, weight in reference.named_parameters():
        middle = 1.0 if weight.ndim == 1 and name.endswith("weight") else 0.0
        spread = 0.3 if weight.ndim == 1 else (0.4 if weight.ndim == 4 else 1) * weight[0].numel() ** -0.5
        weight.requires_grad_(False).normal_(middle, spread, generator=generator)
    for name, buffer in reference.named_buffers():
        assert name.endswith("position_ids"), name
        buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))


def share_weights(reference: nn.Module, ours: nn.Module) -> None:
    """Lets ours, built on the meta device, use the reference's tensors themselves: one copy in memory."""
    ours.load_state_dict(official_names(reference), strict=True, assign=True)
    ours.requires_grad_(False)


def same_weights(reference: nn.Module, ours: nn.Module, dtype: torch.dtype) -> None:
    fill(reference, dtype)
    share_weights(reference, ours)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def up_self_attentions(unet: nn.Module) -> list[list[Any]]:
    """Those of each up block, in order; the same attribute names on both sides."""
    layers = [getattr(block, "attentions", []) for block in unet.up_blocks]
    return [[layer.transformer_blocks[0].attn1 for layer in block] for block in layers]


def run_reference_unet(
    reference: nn.Module, latent: Tensor, timestep: int | Tensor, text: Tensor
) -> UNetOutput:
    """diffusers' UNet in the form of ours: features, keys and values are overheard by hooks."""
    features: list[Tensor] = []
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def overhear(module: nn.Module, into: list[Tensor]) -> Any:
        return module.register_forward_hook(lambda *args: into.append(args[2]))

    hooks = [overhear(block, features) for block in reference.up_blocks]
    blocks = up_self_attentions(reference)
    for attention in itertools.chain(*blocks):
        hooks += [overhear(attention.to_k, keys), overhear(attention.to_v, values)]
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
    """Noise, every feature, every K and V. A list too short or too long on one side is an error."""
    pairs = {"noise": (ours.noise, reference.noise)}
    for i, pair in enumerate(zip(ours.features, reference.features, strict=True)):
        pairs[f"feature {i}"] = pair
    for block, others in enumerate(zip(ours.keys_values, reference.keys_values, strict=True)):
        for i, (a, b) in enumerate(zip(*others, strict=True)):
            pairs |= {f"key {block}.{i}": (a[0], b[0]), f"value {block}.{i}": (a[1], b[1])}
    return pairs


def vae_pairs(ours: nn.Module, reference: nn.Module, picture: Tensor, latent: Tensor) -> Pairs:
    """Mean and deviation of the encoding, and the decoding, all of them of scaled latents."""
    scale, moments = reference.config.scaling_factor, reference.encode(picture).latent_dist
    mean, deviation = ours.encode(picture)
    return {
        "mean": (mean, moments.mean * scale),
        "deviation": (deviation, moments.std * scale),
        "picture": (ours.decode(latent), reference.decode(latent / scale).sample),
    }


def text_pairs(ours: nn.Module, reference: nn.Module, tokens: Tensor) -> Pairs:
    return {"text": (ours(tokens), reference(tokens).last_hidden_state)}


def prompt_tokens(vocabulary: int, pad: int | None = None) -> Tensor:
    """Three prompts of 77 ids, as the tokenizer shapes them: empty, of six words, and cut off for length.

    The last two ids of the vocabulary begin and end a prompt; SD 1.x pads with the latter, SD 2.x with id 0.
    """
    begin, end = vocabulary - 2, vocabulary - 1
    words = torch.randint(0, begin, (75,), generator=torch.Generator().manual_seed(5)).tolist()
    prompts = [[begin, *words[:count], end] for count in (0, 6, 75)]
    filler = end if pad is None else pad
    return torch.tensor([prompt + [filler] * (77 - len(prompt)) for prompt in prompts])
