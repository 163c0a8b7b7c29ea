"""Keys of tensors in files of every kind, mapped to the names in the networks.

Official folders need only two of these rules: older VAE files name their attention differently (`query` for
`to_q`), and text encoders come with and without the prefix `text_model.`. Single-file checkpoints have the
keys of the original code, latent diffusion (LDM). No rule changes a name that is already a network's.

Functions named `*_keys` return {name in the network: key in the file}.
"""

import re
from collections.abc import Callable, Collection

Rules = list[tuple[str, str | Callable[[re.Match[str]], str]]]
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
PREFIXES = {"unet": UNET, "vae": VAE, "text_encoder": TEXT}
BLOCKS = {"input": "down_blocks", "output": "up_blocks"}


def unet_layer(match: re.Match[str]) -> str:
    """input_blocks.5.1. -> down_blocks.1.attentions.1.: LDM numbers layers across levels, three per level."""
    # input_blocks.0 is conv_in, hence the shift by one; module 0 of a layer is its ResNet block.
    level, layer = divmod(int(match[2]) - (match[1] == "input"), 3)
    return f"{BLOCKS[match[1]]}.{level}.{'attentions' if match[3] == '1' else 'resnets'}.{layer}."


UNET_RULES: Rules = [
    (r"^time_embed\.0\.", "time_embedding.linear_1."),
    (r"^time_embed\.2\.", "time_embedding.linear_2."),
    (r"^input_blocks\.0\.0\.", "conv_in."),
    (r"^out\.0\.", "conv_norm_out."),
    (r"^out\.2\.", "conv_out."),
    (r"^middle_block\.0\.", "mid_block.resnets.0."),
    (r"^middle_block\.1\.", "mid_block.attentions.0."),
    (r"^middle_block\.2\.", "mid_block.resnets.1."),
    (r"^input_blocks\.(\d+)\.0\.op\.", lambda m: f"down_blocks.{int(m[1]) // 3 - 1}.downsamplers.0.conv."),
    # The upsampler comes after the attention, or in its place on a level without attention.
    (r"^output_blocks\.(\d+)\.[12]\.conv\.", lambda m: f"up_blocks.{int(m[1]) // 3}.upsamplers.0.conv."),
    (r"^(input|output)_blocks\.(\d+)\.([01])\.", unet_layer),
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.emb_layers\.1\.", ".time_emb_proj."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.skip_connection\.", ".conv_shortcut."),
]
VAE_RULES: Rules = [
    (r"^encoder\.down\.(\d)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    # LDM numbers the decoder's levels finest first, although coarsest first is the order of execution.
    (r"^decoder\.up\.(\d)\.block\.", lambda m: f"decoder.up_blocks.{3 - int(m[1])}.resnets."),
    (r"^decoder\.up\.(\d)\.upsample\.", lambda m: f"decoder.up_blocks.{3 - int(m[1])}.upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"^(en|de)coder\.norm_out\.", r"\1coder.conv_norm_out."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.mid_block\.attentions\.0\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid_block\.attentions\.0\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid_block\.attentions\.0\.(q)uery\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid_block\.attentions\.0\.(k)ey\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid_block\.attentions\.0\.(v)alue\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid_block\.attentions\.0\.proj_(out|attn)\.", ".mid_block.attentions.0.to_out.0."),
]


def rename(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def unet_keys(keys: Collection[str]) -> dict[str, str]:
    """Keys of a UNet; of the moving average (EMA) in a single-file checkpoint with two copies.

    The EMA samples better. Its keys have no dots.
    """
    plain = {rename(key.removeprefix(UNET), UNET_RULES): key for key in network_keys(keys, UNET)}
    average = {name: average_key(key) for name, key in plain.items()}
    return average if set(average.values()) <= set(keys) else plain


def average_key(key: str) -> str:
    """model.diffusion_model.out.0.weight -> model_ema.diffusion_modelout0weight; not invertible."""
    return "model_ema." + key.removeprefix("model.").replace(".", "")


def vae_keys(keys: Collection[str]) -> dict[str, str]:
    """Keys of a VAE in a single-file checkpoint, a folder, or a VAE's file, bare or with `vae.`."""
    own = [key for key in network_keys(keys, VAE) if not key.startswith(("model_ema.", "loss."))]
    return {rename(key.removeprefix(VAE).removeprefix("vae."), VAE_RULES): key for key in own}


def text_keys(keys: Collection[str]) -> dict[str, str]:
    """Keys of a text encoder in a single-file checkpoint or a folder, with or without `text_model.`.

    Omits the rest of CLIP, its image encoder and projections, and position_ids, which are 0 to 76 or wrong.
    """
    other = re.compile(r"position_ids$|logit_scale$|text_projection\.|vision_model\.|visual_projection\.")
    own = [key for key in network_keys(keys, TEXT) if not other.search(key)]
    return {"text_model." + key.removeprefix(TEXT).removeprefix("text_model."): key for key in own}


def network_keys(keys: Collection[str], prefix: str) -> list[str]:
    """The keys with a prefix in a single-file checkpoint; every key in a file of one network."""
    single_file = any(key.startswith((UNET, VAE, TEXT)) for key in keys)
    return [key for key in keys if key.startswith(prefix) or not single_file]
