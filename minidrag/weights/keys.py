"""Names of tensors in other people's files, brought to the names that the networks here have.

The official folders need none of this, but for two things: older VAE files spell their attention otherwise
(`query` for `to_q`), and text encoders come with and without a leading `text_model.`. Single-file checkpoints
have the names of the original code, latent diffusion (LDM). Every rule leaves a name of ours as it is.

The functions that end in `_names` return {our name: name in the file}.
"""

import re
from collections.abc import Callable, Collection

Rules = list[tuple[str, str | Callable[[re.Match[str]], str]]]
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
BLOCKS = {"input": "down_blocks", "output": "up_blocks"}


def unet_layer(match: re.Match[str]) -> str:
    """input_blocks.5.1. -> down_blocks.1.attentions.1.: LDM counts layers through, three to a level."""
    # input_blocks.0 is conv_in, hence the shift by one; place 0 in a layer is its ResNet block.
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
    # The upsampler stands behind the attention, or in its place where the level has none.
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
    # LDM numbers the decoder's levels finest first, although they run coarsest first.
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
    """A UNet; of a single-file checkpoint the running average (EMA), which samples better, where it is there.

    Files with both weights of the training keep the average apart, under names that have lost their dots.
    """
    plain = {rename(key.removeprefix(UNET), UNET_RULES): key for key in within(keys, UNET)}
    average = {name: average_key(key) for name, key in plain.items()}
    return average if set(average.values()) <= set(keys) else plain


def average_key(key: str) -> str:
    """model.diffusion_model.out.0.weight -> model_ema.diffusion_modelout0weight; there is no way back."""
    return "model_ema." + key.removeprefix("model.").replace(".", "")


def vae_keys(keys: Collection[str]) -> dict[str, str]:
    """A VAE in any spelling: of a single-file checkpoint, of its own file, bare or as `vae.`, of a folder."""
    kept = [key for key in within(keys, VAE) if not key.startswith(("model_ema.", "loss."))]
    return {rename(key.removeprefix(VAE).removeprefix("vae."), VAE_RULES): key for key in kept}


def text_keys(keys: Collection[str]) -> dict[str, str]:
    """A text encoder of a single-file checkpoint or of a folder, with or without a leading `text_model.`.

    What else a CLIP file may hold is left out: CLIP's picture half, its projections, and position_ids, which
    say no more than 0 to 76 and in some merged files say it wrong.
    """
    other = re.compile(r"position_ids$|logit_scale$|text_projection\.|vision_model\.|visual_projection\.")
    kept = [key for key in within(keys, TEXT) if not other.search(key)]
    return {"text_model." + key.removeprefix(TEXT).removeprefix("text_model."): key for key in kept}


def within(keys: Collection[str], prefix: str) -> list[str]:
    """One network's names in a single-file checkpoint; all names of a file with that network alone."""
    whole = any(key.startswith((UNET, VAE, TEXT)) for key in keys)
    return [key for key in keys if key.startswith(prefix) or not whole]
