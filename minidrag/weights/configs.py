"""The small files of a model folder, read and written: config.json of each network, schedule, tokenizer.

Readers turn the values of a JSON file into the dataclass that a network or the schedule is built from; a key
that the file lacks has its SD 1.5 value. Writers return values that diffusers and transformers load.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from minidrag.method.ddim import Schedule
from minidrag.networks.clip import ACTIVATIONS, CLIPConfig
from minidrag.networks.tokenizer import BOS, EOS, Tokenizer
from minidrag.networks.unet import UNetConfig
from minidrag.networks.vae import VAEConfig

Json = dict[str, Any]

# Keys that are not sizes, each with the values that are implemented.
SUPPORTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "config.json of the UNet": {
        "act_fn": ("silu",),
        "addition_embed_type": (None,),
        "center_input_sample": (False,),
        "class_embed_type": (None,),
        "downsample_padding": (1,),
        "dual_cross_attention": (False,),
        "encoder_hid_dim": (None,),
        "flip_sin_to_cos": (True,),
        "freq_shift": (0,),
        "mid_block_scale_factor": (1,),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "num_class_embeds": (None,),
        "only_cross_attention": (False,),
        "resnet_time_scale_shift": ("default",),
        "time_embedding_type": ("positional",),
        "transformer_layers_per_block": (1,),
    },
    "config.json of the VAE": {
        "act_fn": ("silu",),
        "in_channels": (3,),
        "latents_mean": (None,),
        "latents_std": (None,),
        "mid_block_add_attention": (True,),
        "out_channels": (3,),
        "shift_factor": (None,),
        "use_post_quant_conv": (True,),
        "use_quant_conv": (True,),
    },
    "config.json of the text encoder": {"hidden_act": tuple(ACTIVATIONS)},
    "scheduler_config.json": {
        "beta_schedule": ("scaled_linear", "linear"),
        "rescale_betas_zero_snr": (False,),
        "trained_betas": (None,),
    },
}
TOKENIZER: Json = {  # tokenizer_config.json of a CLIP vocabulary
    "add_prefix_space": False,
    "bos_token": BOS,
    "do_lower_case": True,
    "eos_token": EOS,
    "errors": "replace",
    "model_max_length": 77,
    "pad_token": EOS,
    "tokenizer_class": "CLIPTokenizer",
    "unk_token": EOS,
}


def read_unet(values: Json) -> UNetConfig:
    """Read the sizes of a UNet; raises ValueError for a structure other than that of SD 1.x and 2.x."""
    file = "config.json of the UNet"
    check(file, values, SUPPORTED[file])
    values = unet_json(UNetConfig()) | values
    heads = values.get("num_attention_heads") or values["attention_head_dim"]  # a count, whatever its name
    heads = (heads,) * 4 if isinstance(heads, int) else tuple(heads)
    channels, down = values["block_out_channels"], values["down_block_types"]
    levels = {"block_out_channels": channels, "attention_head_dim": heads, "down_block_types": down}
    for key, value in levels.items():
        if len(value) != 4:
            raise unsupported(file, key, value, "one value for each of four levels")
    attention = tuple(kind == "CrossAttnDownBlock2D" for kind in down)
    check(file, values, {key: (kinds,) for key, kinds in block_types(attention).items()})
    return UNetConfig(**sizes(UNetConfig, values) | {"attention": attention, "heads": heads})


def read_vae(values: Json) -> VAEConfig:
    """Read the sizes of a VAE; raises ValueError for a structure other than that of SD 1.x and 2.x."""
    file = "config.json of the VAE"
    check(file, values, SUPPORTED[file])
    return VAEConfig(**sizes(VAEConfig, values))


def read_text_encoder(values: Json) -> CLIPConfig:
    """Read the sizes of a text encoder; raises ValueError for an unsupported activation."""
    file = "config.json of the text encoder"
    check(file, values, SUPPORTED[file])
    return CLIPConfig(**sizes(CLIPConfig, values))


def read_schedule(values: Json) -> Schedule:
    """Read the noise schedule, whatever the sampler; raises ValueError for an unsupported schedule."""
    file = "scheduler_config.json"
    check(file, values, SUPPORTED[file])
    return Schedule(**sizes(Schedule, values))


READERS = {"unet": read_unet, "vae": read_vae, "text_encoder": read_text_encoder}


def check(file: str, values: Json, supported: dict[str, tuple[Any, ...]]) -> None:
    for key, known in supported.items():
        if key in values and values[key] not in known:
            raise unsupported(file, key, values[key], " or ".join(map(repr, known)))


def unsupported(file: str, key: str, value: Any, supported: str) -> ValueError:
    return ValueError(f"{file} has {key} = {value!r}: only {supported} is supported")


def sizes(kind: Any, values: Json) -> Json:
    """The values that are fields of the dataclass `kind`, lists converted to tuples."""
    found = {field.name: field.default for field in fields(kind) if field.name in values}
    return {key: tuple(values[key]) if isinstance(found[key], tuple) else values[key] for key in found}


def block_types(attention: Iterable[bool]) -> dict[str, list[str]]:
    """Names of the UNet's blocks in diffusers; attention: which levels have transformers, finest first."""
    prefixes = ["CrossAttn" if has else "" for has in attention]
    return {
        "down_block_types": [f"{prefix}DownBlock2D" for prefix in prefixes],
        "up_block_types": [f"{prefix}UpBlock2D" for prefix in reversed(prefixes)],
    }


def unet_json(config: UNetConfig) -> Json:
    values = asdict(config)
    heads = values.pop("heads")
    return {
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,
        **block_types(values.pop("attention")),
        **values,
    }


def vae_json(config: VAEConfig, sample_size: int) -> Json:
    """sample_size: side of the training images in pixels."""
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "sample_size": sample_size,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        **asdict(config),
    }


def text_encoder_json(config: CLIPConfig) -> Json:
    last = config.vocab_size - 1  # CLIP vocabularies end with the start and the end token
    tokens = {"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
    labels = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
    return labels | tokens | {"projection_dim": config.hidden_size} | asdict(config)


def scheduler_json(schedule: Schedule, sampler: str) -> Json:
    """sampler: the diffusers class to sample with by default, such as DDIMScheduler or PNDMScheduler."""
    return {
        "_class_name": sampler,
        "clip_sample": False,
        "prediction_type": "epsilon",
        "skip_prk_steps": True,
        "timestep_spacing": "leading",
        **asdict(schedule),
    }


def model_files(unet: UNetConfig, vae: VAEConfig, text_encoder: CLIPConfig, sampler: str) -> dict[str, Json]:
    """Every JSON file of a model folder but the tokenizer's, by path; sampler as in `scheduler_json`."""
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", sampler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    return {
        "model_index.json": index,
        "scheduler/scheduler_config.json": scheduler_json(Schedule(), sampler),
        "text_encoder/config.json": text_encoder_json(text_encoder),
        "unet/config.json": unet_json(unet),
        "vae/config.json": vae_json(vae, unet.sample_size * vae.factor),
    }


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load a tokenizer from vocab.json and merges.txt.

    special_tokens_map.json and tokenizer_config.json may set the pad token and the length.
    Raises FileNotFoundError for a missing file, ValueError for a broken one.
    """
    for path in (folder / "vocab.json", folder / "merges.txt"):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: copy it from the model's tokenizer folder")
    pad = read_json(folder / "special_tokens_map.json", {}).get("pad_token", EOS)
    limit = read_json(folder / "tokenizer_config.json", {}).get("model_max_length", 77)
    vocabulary, merges = read_json(folder / "vocab.json"), read_merges(folder / "merges.txt")
    try:
        # At most 77, the positions of the text encoder: a config without a limit has an absurdly large one.
        return Tokenizer(vocabulary, merges, pad["content"] if isinstance(pad, dict) else pad, min(limit, 77))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ValueError(f"vocab.json and merges.txt in {folder} do not fit together: {error}") from error


def read_merges(path: Path) -> list[tuple[str, str]]:
    """Read pairs of tokens to merge, one per line, after a line with the version."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        return [(left, right) for left, right in pairs]
    except ValueError as error:
        raise ValueError(f"{path} is not a list of pairs of tokens: download it again ({error})") from error


def read_json(path: Path, default: Json | None = None) -> Json:
    """Read a JSON object; default: returned for a missing file."""
    if default is not None and not path.exists():
        return default
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: download it again ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object: download it again")
    return values


def write_json(path: Path, values: Json) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
