"""Model files for tests: small random models in the formats of the reference libraries and of other tools.

The keys of the original code (LDM) are derived here by walking through the networks, in the opposite
direction to the rules in `weights/keys.py` and independently of them.
"""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.references import TEXTS, UNETS, VAES, without_labels
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from minidrag.model import Model
from minidrag.weights.configs import read_text_encoder, read_unet, read_vae

Tensors = dict[str, Tensor]

UNET, VAE = UNETS["SD 1.5"], VAES["three halvings"]
TEXT = TEXTS["quick_gelu"] | {"vocab_size": 514, "hidden_size": 20, "num_attention_heads": 4}
SMALL = {  # sizes to assume for a single file, in place of SD 1.5's
    "unet": read_unet(UNET),
    "vae": read_vae(VAE),
    "text_encoder": read_text_encoder(TEXT),
}
FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
BUFFERS = [
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
]


def write_folder(folder: Path) -> Path:
    """Write a complete small model as today's diffusers and transformers save it."""
    torch.manual_seed(0)
    models = {
        "unet": UNet2DConditionModel(**without_labels(UNET)),
        "vae": AutoencoderKL(**without_labels(VAE)),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT)),
    }
    for name, model in models.items():
        randomize(model).save_pretrained(folder / name)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = PNDMScheduler(**betas, steps_offset=1)
    scheduler.save_pretrained(folder / "scheduler")
    write_tokenizer(folder / "tokenizer")
    return folder


def randomize(model: Any) -> Any:
    """Give norms and biases values other than one and zero, so that a missing one shows."""
    for weight in model.parameters():
        if weight.ndim == 1:
            nn.init.normal_(weight, weight.mean().item(), 0.3)
    return model


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def read(folder: Path) -> dict[str, Tensors]:
    """The tensors in a folder's three files, the text encoder's with text_model., without position_ids."""
    tensors = {name: load_file(folder / file) for name, file in FILES.items()}
    text = {key: value for key, value in tensors["text_encoder"].items() if "position_ids" not in key}
    tensors["text_encoder"] = {f"text_model.{key.removeprefix('text_model.')}": t for key, t in text.items()}
    return tensors


def outputs(model: Model) -> Tensors:
    """Outputs of the networks of a small model for fixed inputs."""
    with torch.no_grad():
        text = model.encode_text(["a cat", ""])
        latent = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(text)
        image = model.vae.decode(latent)
        mean, std = model.vae.encode(image)
        noise = model.unet(latent, 681, text).noise
    return {"text": text, "noise": noise, "image": image, "mean": mean, "std": std}


def same(first: Tensors, second: Tensors) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# --- other keys ---


def legacy_vae(vae: Tensors) -> Tensors:
    """The VAE with the attention keys of diffusers before May 2023, which the official fp32 file has."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    starts = [f"{half}.mid_block.attentions.0." for half in ("encoder", "decoder")]
    renamed = {}
    for key, tensor in vae.items():
        start = next((start for start in starts if key.startswith(start)), None)
        layer, _, end = key.removeprefix(start or "").rpartition(".")
        renamed[f"{start}{old.get(layer, layer)}.{end}" if start else key] = tensor
    assert renamed.keys() != vae.keys() and len(renamed) == len(vae)
    return renamed


def ldm_unet_modules() -> dict[str, str]:
    """{module of the UNet in diffusers: module in LDM}, in the order of LDM's numbering."""
    modules = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    number = 1
    for level in range(4):
        for layer in range(2):
            modules[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{number}.0"
            modules[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        modules[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
        number += 1
    for level in range(4):
        for layer in range(3):
            number = 3 * level + layer
            modules[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{number}.0"
            modules[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{number}.1"
    modules["up_blocks.0.upsamplers.0.conv"] = "output_blocks.2.1.conv"
    modules["up_blocks.1.upsamplers.0.conv"] = "output_blocks.5.2.conv"
    modules["up_blocks.2.upsamplers.0.conv"] = "output_blocks.8.2.conv"
    return modules


UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def ldm_vae_modules() -> dict[str, str]:
    modules = {}
    for half in ("encoder", "decoder"):
        modules[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        modules[f"{half}.mid_block.resnets.0"] = f"{half}.mid.block_1"
        modules[f"{half}.mid_block.attentions.0"] = f"{half}.mid.attn_1"
        modules[f"{half}.mid_block.resnets.1"] = f"{half}.mid.block_2"
    for level in range(4):
        modules[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        modules[f"decoder.up_blocks.{level}.upsamplers.0.conv"] = f"decoder.up.{3 - level}.upsample.conv"
        for layer in range(2):
            modules[f"encoder.down_blocks.{level}.resnets.{layer}"] = f"encoder.down.{level}.block.{layer}"
        for layer in range(3):
            modules[f"decoder.up_blocks.{level}.resnets.{layer}"] = f"decoder.up.{3 - level}.block.{layer}"
    return modules


VAE_LAYERS = {
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def to_ldm(name: str, modules: dict[str, str], layers: dict[str, str]) -> str:
    start = max((m for m in modules if name.startswith(m + ".")), key=len, default=None)
    if start is None:
        return name
    layer, _, end = name.removeprefix(start + ".").rpartition(".")
    return ".".join(filter(None, (modules[start], layers.get(layer, layer), end)))


def ldm_unet(unet: Tensors) -> Tensors:
    modules = ldm_unet_modules()
    return {"model.diffusion_model." + to_ldm(key, modules, UNET_RESNET): t for key, t in unet.items()}


def ldm_vae(vae: Tensors, prefix: str = "first_stage_model.") -> Tensors:
    """The VAE with LDM's keys; in LDM, the four linear layers of an attention are 1x1 convolutions."""
    modules, renamed = ldm_vae_modules(), {}
    for key, tensor in vae.items():
        linear = ".attentions.0." in key and tensor.ndim == 2
        renamed[prefix + to_ldm(key, modules, VAE_LAYERS)] = tensor[:, :, None, None] if linear else tensor
    return renamed


def ldm_text(text: Tensors, prefix: str = "cond_stage_model.transformer.text_model.") -> Tensors:
    return {prefix + key.removeprefix("text_model."): tensor for key, tensor in text.items()}


def position_ids() -> Tensor:
    return torch.arange(77)[None]


def emaonly(tensors: dict[str, Tensors]) -> Tensors:
    """A single file like v1-5-pruned-emaonly: schedule buffers, position_ids, two scalars of the EMA."""
    checkpoint = ldm_unet(tensors["unet"]) | ldm_vae(tensors["vae"]) | ldm_text(tensors["text_encoder"])
    checkpoint["cond_stage_model.transformer.text_model.embeddings.position_ids"] = position_ids()
    checkpoint |= {name: torch.zeros(1000) for name in BUFFERS}
    return checkpoint | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(1)}


def pruned(tensors: dict[str, Tensors]) -> Tensors:
    """A single file like v1-5-pruned: a UNet with plain keys that is not the EMA, and the EMA beside it."""
    checkpoint = emaonly(tensors)
    plain = {key: tensor for key, tensor in checkpoint.items() if key.startswith("model.diffusion_model.")}
    average = {"model_ema." + key[len("model.") :].replace(".", ""): tensor for key, tensor in plain.items()}
    assert len(average) == len(plain)
    return checkpoint | {key: tensor + 1 for key, tensor in plain.items()} | average


def half_mixed(tensors: Tensors) -> Tensors:
    """Every second tensor in fp16, as in files by merging tools."""
    return {key: tensor.half() if i % 2 else tensor for i, (key, tensor) in enumerate(tensors.items())}


def write(file: Path, tensors: Tensors) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    return file


def split(file: Path, infix: str = "", suffix: str = ".safetensors") -> Path:
    """Replace a weight file by three shards and an index; return the index."""
    with safe_open(file, "pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    stem = file.stem if suffix == ".safetensors" or file.stem != "model" else "pytorch_model"
    names = [f"{stem}{infix}-{i:05}-of-00003{suffix}" for i in (1, 2, 3)]
    keys = sorted(tensors)
    for i, name in enumerate(names):
        part = {key: tensors[key] for key in keys[i::3]}
        if suffix == ".safetensors":
            save_file(part, file.with_name(name), {"format": "pt"})
        else:
            torch.save(part, file.with_name(name))
    index = file.with_name(f"{stem}{suffix}.index{infix}.json")
    weight_map = {key: names[i % 3] for i, key in enumerate(keys)}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    file.unlink()
    return index


def write_zeros(file: Path, shapes: dict[str, list[int]], dtype: str = "F32", aligned: bool = True) -> Path:
    """Write a sparse file of any size, which takes no disk space: a safetensors header, then a hole.

    aligned: pad the header to a multiple of 8, as safetensors does since 2023.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at, width = 0, {"F32": 4, "F16": 2, "I64": 8}
    for name in sorted(shapes, key=lambda name: (not name.endswith("position_ids"), name)):
        kind = "I64" if name.endswith("position_ids") else dtype
        size = width[kind] * torch.Size(shapes[name]).numel()
        header[name] = {"dtype": kind, "shape": list(shapes[name]), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8 if aligned else 0)
    with open(file, "wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + at)
    return file


def listed(name: str) -> dict[str, list[int]]:
    """Shapes by key in an official file: unet, vae or text_encoder."""
    lines = (Path(__file__).parents[1] / "data" / f"sd15_{name}.txt").read_text().splitlines()
    pairs = (line.split() for line in lines if line and not line.startswith("#"))
    return {key: [int(side) for side in shape.split("x")] for key, shape in pairs}


def on_meta(shapes: dict[str, list[int]]) -> Tensors:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def shapes_of(tensors: Tensors) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in tensors.items()}
