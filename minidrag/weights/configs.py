"""The JSON files of a model folder, read and written: config.json of each network, and the noise schedule.

Readers make the dataclass that a network or the schedule is built from; a key that the file lacks has its
SD 1.5 value. Most keys decide names or shapes of tensors, so a wrong one shows when the weights are matched.
`SWITCHES` has the others: with another value the network would load and compute something else.
Writers return values that diffusers and transformers load.
"""

import reprlib
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from minidrag.method.ddim import Schedule
from minidrag.networks.clip import ACTIVATIONS, CLIPConfig
from minidrag.networks.unet import UNetConfig
from minidrag.networks.vae import VAEConfig
from minidrag.weights.files import Json

SHORT = reprlib.Repr()  # of a value in a message, however long or deep the file has it
SHORT.maxlist = SHORT.maxtuple = SHORT.maxdict = 8
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 60
SHORT.maxlevel = 3
UNET = "config.json of the UNet"
VAE = "config.json of the VAE"
TEXT_ENCODER = "config.json of the text encoder"
SCHEDULER = "scheduler_config.json"
ADAPTER = "the adapter's configuration"  # of peft
SWITCHES: dict[str, dict[str, tuple[Any, ...]]] = {  # values that are implemented, by file and key
    UNET: {
        "act_fn": ("silu",),
        "center_input_sample": (False,),
        "class_embed_type": (None,),
        "downsample_padding": (1,),
        "flip_sin_to_cos": (True,),
        "freq_shift": (0,),
        "mid_block_scale_factor": (1,),
        "resnet_out_scale_factor": (1,),
        "resnet_skip_time_act": (False,),
        "time_embedding_act_fn": (None,),
        "timestep_post_act": (None,),
    },
    VAE: {
        "act_fn": ("silu",),
        "latents_mean": (None,),
        "latents_std": (None,),
        "shift_factor": (None,),
    },
    TEXT_ENCODER: {"hidden_act": tuple(ACTIVATIONS)},
    SCHEDULER: {
        "beta_schedule": ("scaled_linear", "linear"),
        "prediction_type": ("epsilon", "v_prediction", "sample"),
        "rescale_betas_zero_snr": (False,),
        "trained_betas": (None,),
        "use_flow_sigmas": (False,),
    },
    ADAPTER: {
        "fan_in_fan_out": (False, None),
        "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # others change the model
        "peft_type": ("LORA", None),
        "use_rslora": (False, True, None),
    },
}
MOST = 2**20  # of any number; SD 1.5's largest are the 49,408 tokens
SDXL_SCALE = 0.13025  # of the latents of SDXL's VAE, whose tensors have the shapes of SD 1.5's


def read_unet(values: Json) -> UNetConfig:
    """Read the sizes of a UNet; raises ValueError for one unlike those of SD 1.x and 2.x."""
    check_switches(UNET, values)
    values = unet_json(UNetConfig()) | values
    heads = values.get("num_attention_heads") or values["attention_head_dim"]  # a count, whatever its name
    heads = [heads] * 4 if isinstance(heads, int) else heads
    blocks = values["down_block_types"]
    channels = values["block_out_channels"]
    levels = {"attention_head_dim": heads, "block_out_channels": channels, "down_block_types": blocks}
    for key, value in levels.items():
        if not isinstance(value, (list, tuple)) or len(value) != 4:
            raise unsupported(UNET, key, value, "one value for each of four levels")
    attention = tuple(block == "CrossAttnDownBlock2D" for block in blocks)
    config = UNetConfig(**sizes(UNetConfig, UNET, values | {"heads": heads, "attention": attention}))
    check_multiples(UNET, config.block_out_channels, "attention_head_dim", config.heads)
    check_multiples(UNET, config.block_out_channels, "norm_num_groups", [config.norm_num_groups] * 4)
    return config


def read_vae(values: Json) -> VAEConfig:
    """Read the sizes of a VAE; raises ValueError for one unlike that of SD 1.x and 2.x."""
    check_switches(VAE, values)
    config = VAEConfig(**sizes(VAEConfig, VAE, values))
    if config.scaling_factor == SDXL_SCALE:
        raise ValueError(f"{VAE} has scaling_factor = {SDXL_SCALE}: that is SDXL's VAE, not one for SD 1.x")
    groups = [config.norm_num_groups] * len(config.block_out_channels)
    check_multiples(VAE, config.block_out_channels, "norm_num_groups", groups)
    return config


def read_text_encoder(values: Json) -> CLIPConfig:
    """Read the sizes of a text encoder; raises ValueError for one unlike those of SD 1.x and 2.x."""
    check_switches(TEXT_ENCODER, values)
    config = CLIPConfig(**sizes(CLIPConfig, TEXT_ENCODER, values))
    check_multiples(TEXT_ENCODER, [config.hidden_size], "num_attention_heads", [config.num_attention_heads])
    return config


def read_schedule(values: Json) -> Schedule:
    """Read the noise schedule, whatever the sampler; raises ValueError for an unsupported schedule."""
    check_switches(SCHEDULER, values)
    sampler = values.get("_class_name")
    if isinstance(sampler, str) and "FlowMatch" in sampler:
        raise unsupported(SCHEDULER, "_class_name", sampler, "a sampler of a diffusion model")
    schedule = Schedule(**sizes(Schedule, SCHEDULER, values))
    if max(schedule.beta_start, schedule.beta_end) >= 1:
        raise unsupported(SCHEDULER, "beta_end", schedule.beta_end, "a variance below 1")
    if schedule.steps_offset >= schedule.num_train_timesteps:
        raise unsupported(SCHEDULER, "steps_offset", schedule.steps_offset, "one of num_train_timesteps")
    return schedule


READERS = {"unet": read_unet, "vae": read_vae, "text_encoder": read_text_encoder}


def check_switches(file: str, values: Json) -> None:
    """Raise ValueError for a switch with a value that is not implemented."""
    for key, known in SWITCHES[file].items():
        if key in values and values[key] not in known:
            raise unsupported(file, key, values[key], " or ".join(map(repr, known)))


def sizes(kind: Any, file: str, values: Json) -> Json:
    """The values that are fields of the dataclass `kind`, lists as tuples; raises ValueError for odd ones."""
    defaults = {field.name: field.default for field in fields(kind) if field.name in values}
    for name, default in defaults.items():
        if not is_like(values[name], default) and (name, values[name]) != ("steps_offset", 0):
            raise unsupported(file, name, values[name], f"a value like {default}")
    return {
        name: tuple(values[name]) if isinstance(default, tuple) else values[name]
        for name, default in defaults.items()
    }


def is_like(value: Any, default: Any) -> bool:
    """True for a value of the same type, if it is a number, a positive one of a sensible size."""
    if isinstance(default, tuple):
        lists = isinstance(value, (list, tuple)) and bool(value)
        return lists and all(is_like(entry, default[0]) for entry in value)
    if isinstance(default, (bool, str)):
        return isinstance(value, type(default))
    kinds = (int, float) if isinstance(default, float) else (int,)
    return type(value) in kinds and 0 < value <= MOST


def check_multiples(file: str, widths: Sequence[int], name: str, divisors: Sequence[int]) -> None:
    """Raise ValueError unless each width is a multiple of its divisor, which the file has under `name`."""
    for width, divisor in zip(widths, divisors, strict=True):
        if width % divisor:
            raise ValueError(f"{file} has {width} channels, which {name} = {divisor} does not divide")


def unsupported(file: str, key: str, value: Any, supported: str) -> ValueError:
    return ValueError(f"{file} has {key} = {SHORT.repr(value)}: only {supported} is supported")


def unet_json(config: UNetConfig) -> Json:
    values = asdict(config)
    heads = values.pop("heads")
    prefixes = ["CrossAttn" if has else "" for has in values.pop("attention")]
    return {
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,
        "down_block_types": [f"{prefix}DownBlock2D" for prefix in prefixes],
        "up_block_types": [f"{prefix}UpBlock2D" for prefix in reversed(prefixes)],
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


def model_files(unet: UNetConfig, vae: VAEConfig, text_encoder: CLIPConfig, sampler: str) -> dict[str, Json]:
    """Every JSON file of a model folder but the tokenizer's, by path.

    sampler: the diffusers class to sample with by default, such as DDIMScheduler or PNDMScheduler.
    """
    scheduler = {
        "_class_name": sampler,
        "clip_sample": False,
        "prediction_type": "epsilon",
        "skip_prk_steps": True,
        "timestep_spacing": "leading",
        **asdict(Schedule()),
    }
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
        "scheduler/scheduler_config.json": scheduler,
        "text_encoder/config.json": text_encoder_json(text_encoder),
        "unet/config.json": unet_json(unet),
        "vae/config.json": vae_json(vae, unet.sample_size * vae.factor),
    }
