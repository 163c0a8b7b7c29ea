"""The small files of a model folder, read and written: config.json of each network, schedule, tokenizer.

Readers turn the values of a JSON file into the dataclass that a network or the schedule is built from; a key
that the file lacks has its SD 1.5 value. Writers return values that diffusers and transformers load.
"""

import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken

from minidrag.method.ddim import Schedule
from minidrag.networks.clip import ACTIVATIONS, CLIPConfig
from minidrag.networks.tokenizer import BOS, EOS, Tokenizer
from minidrag.networks.unet import UNetConfig
from minidrag.networks.vae import VAEConfig
from minidrag.system.files import MAX_JSON, check_regular
from minidrag.weights.files import Json, read_json

SHORT = reprlib.Repr()  # of a value in a message, however long or deep the file has it
SHORT.maxlist = SHORT.maxtuple = SHORT.maxdict = 8
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 60
SHORT.maxlevel = 3


class Number(NamedTuple):
    """The numbers from `low` to `high`, whole ones if `low` is."""

    low: float
    high: float

    def has(self, value: Any) -> bool:
        kinds = (int,) if isinstance(self.low, int) else (int, float)
        return type(value) in kinds and self.low <= value <= self.high

    def __repr__(self) -> str:
        return f"a {'whole ' if isinstance(self.low, int) else ''}number from {self.low} to {self.high}"


class Numbers(NamedTuple):
    """Lists of at most 64 numbers."""

    each: Number

    def has(self, value: Any) -> bool:
        return isinstance(value, (list, tuple)) and 0 < len(value) <= 64 and all(map(self.each.has, value))

    def __repr__(self) -> str:
        return f"a list, each {self.each}"


WIDTH, COUNT, EPS, ALPHA = Number(1, 16384), Number(1, 64), Number(1e-12, 1.0), Number(-1e6, 1e6)
NO, YES_OR_NO = (False,), (True, False)
# Every key that is read, with the values that are implemented: sizes, far beyond those of any SD 1.x or 2.x
# model but small enough to build, and everything else.
SUPPORTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "config.json of the UNet": {
        "act_fn": ("silu",),
        "addition_embed_type": (None,),
        "attention_head_dim": (COUNT, Numbers(COUNT)),
        "block_out_channels": (Numbers(WIDTH),),
        "center_input_sample": NO,
        "class_embed_type": (None,),
        "cross_attention_dim": (WIDTH,),
        "downsample_padding": (1,),
        "dual_cross_attention": NO,
        "encoder_hid_dim": (None,),
        "flip_sin_to_cos": (True,),
        "freq_shift": (0,),
        "in_channels": (COUNT,),
        "layers_per_block": (Number(1, 8),),
        "mid_block_scale_factor": (1,),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "norm_eps": (EPS,),
        "norm_num_groups": (WIDTH,),
        "num_attention_heads": (None, COUNT, Numbers(COUNT)),
        "num_class_embeds": (None,),
        "only_cross_attention": NO,
        "out_channels": (COUNT,),
        "resnet_time_scale_shift": ("default",),
        "sample_size": (Number(1, 256),),
        "time_embedding_type": ("positional",),
        "transformer_layers_per_block": (1,),
        "use_linear_projection": YES_OR_NO,
    },
    "config.json of the VAE": {
        "act_fn": ("silu",),
        "block_out_channels": (Numbers(WIDTH),),
        "in_channels": (3,),
        "latent_channels": (COUNT,),
        "latents_mean": (None,),
        "latents_std": (None,),
        "layers_per_block": (Number(1, 8),),
        "mid_block_add_attention": (True,),
        "norm_num_groups": (WIDTH,),
        "out_channels": (3,),
        "scaling_factor": (Number(1e-3, 1e3),),
        "shift_factor": (None,),
        "use_post_quant_conv": (True,),
        "use_quant_conv": (True,),
    },
    "config.json of the text encoder": {
        "hidden_act": tuple(ACTIVATIONS),
        "hidden_size": (WIDTH,),
        "intermediate_size": (Number(1, 65536),),
        "layer_norm_eps": (EPS,),
        "max_position_embeddings": (Number(1, 4096),),
        "num_attention_heads": (COUNT,),
        "num_hidden_layers": (COUNT,),
        "vocab_size": (Number(1, 2**20),),
    },
    "scheduler_config.json": {
        "beta_end": (Number(1e-8, 0.9999),),
        "beta_schedule": ("scaled_linear", "linear"),
        "beta_start": (Number(1e-8, 0.9999),),
        "num_train_timesteps": (Number(1, 10000),),
        "prediction_type": ("epsilon", "v_prediction", "sample"),
        "rescale_betas_zero_snr": NO,
        "set_alpha_to_one": YES_OR_NO,
        "steps_offset": (Number(0, 9999),),
        "trained_betas": (None,),
        "use_flow_sigmas": NO,
    },
    "tokenizer_config.json": {"model_max_length": (None, Number(2.0, float("inf")))},
    "the adapter's configuration": {  # peft's adapter_config.json
        "bias": ("none", None),
        "fan_in_fan_out": (False, None),
        "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # others change the model
        "layer_replication": (None,),
        "lora_alpha": (ALPHA,),
        "lora_bias": (False, None),
        "modules_to_save": (None, []),
        "peft_type": ("LORA", None),
        "trainable_token_indices": (None,),
        "use_dora": (False, None),
        "use_qalora": (False, None),
        "use_rslora": (True, False, None),
    },
}
Added = dict[str, tuple[AddedToken, int]]  # an added token and its id, by its text
ID = Number(0, 2**24)  # of a token
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")  # of an added token
SDXL_SCALE = 0.13025  # of the latents of SDXL's VAE, whose tensors have the shapes of SD 1.5's
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
    check(file, values)
    values = unet_json(UNetConfig()) | values
    heads = values.get("num_attention_heads") or values["attention_head_dim"]  # a count, whatever its name
    heads = (heads,) * 4 if isinstance(heads, int) else tuple(heads)
    channels, down = values["block_out_channels"], values["down_block_types"]
    levels = {"block_out_channels": channels, "attention_head_dim": heads, "down_block_types": down}
    for key, value in levels.items():
        if not isinstance(value, (list, tuple)) or len(value) != 4:
            raise unsupported(file, key, value, "one value for each of four levels")
    attention = tuple(kind == "CrossAttnDownBlock2D" for kind in down)
    compare(file, values, {key: (kinds,) for key, kinds in block_types(attention).items()})
    config = UNetConfig(**sizes(UNetConfig, file, values) | {"attention": attention, "heads": heads})
    check_multiples(file, "block_out_channels", channels, "attention_head_dim", heads)
    check_multiples(file, "block_out_channels", channels, "norm_num_groups", [config.norm_num_groups] * 4)
    check_multiples(file, "block_out_channels", channels[:1], "the number of waves of the timestep", [2])
    return config


def read_vae(values: Json) -> VAEConfig:
    """Read the sizes of a VAE; raises ValueError for a structure other than that of SD 1.x and 2.x."""
    file = "config.json of the VAE"
    check(file, values)
    config = VAEConfig(**sizes(VAEConfig, file, values))
    if len(config.block_out_channels) > 8:
        raise unsupported(file, "block_out_channels", values["block_out_channels"], "a list of up to 8")
    if config.scaling_factor == SDXL_SCALE:
        raise ValueError(f"{file} has scaling_factor = {SDXL_SCALE}: that is SDXL's VAE, not one for SD 1.x")
    groups = [config.norm_num_groups] * len(config.block_out_channels)
    check_multiples(file, "block_out_channels", config.block_out_channels, "norm_num_groups", groups)
    return config


def read_text_encoder(values: Json) -> CLIPConfig:
    """Read the sizes of a text encoder; raises ValueError for unsupported ones."""
    file = "config.json of the text encoder"
    check(file, values)
    config = CLIPConfig(**sizes(CLIPConfig, file, values))
    heads = [config.num_attention_heads]
    check_multiples(file, "hidden_size", [config.hidden_size], "num_attention_heads", heads)
    return config


def read_schedule(values: Json) -> Schedule:
    """Read the noise schedule, whatever the sampler; raises ValueError for an unsupported schedule."""
    file = "scheduler_config.json"
    check(file, values)
    if isinstance(sampler := values.get("_class_name"), str) and "FlowMatch" in sampler:
        raise unsupported(file, "_class_name", sampler, "a sampler of a diffusion model")
    schedule = Schedule(**sizes(Schedule, file, values))
    if schedule.steps_offset >= schedule.num_train_timesteps:
        raise unsupported(file, "steps_offset", schedule.steps_offset, "one of num_train_timesteps")
    return schedule


READERS = {"unet": read_unet, "vae": read_vae, "text_encoder": read_text_encoder}


def check(file: str, values: Json) -> None:
    """Raise ValueError for a value that the table of `file` does not have."""
    compare(file, values, SUPPORTED[file])


def compare(file: str, values: Json, supported: Mapping[str, tuple[Any, ...]]) -> None:
    for key, known in supported.items():
        if key in values and not any(equal(values[key], one) for one in known):
            raise unsupported(file, key, values[key], " or ".join(map(repr, known)))


def equal(value: Any, known: Any) -> bool:
    """Equality, or membership, in which True is not 1; `value` may be nested deeply."""
    if isinstance(known, (Number, Numbers)):
        return known.has(value)
    if isinstance(known, list):
        same = isinstance(value, (list, tuple)) and len(value) == len(known)
        return same and all(map(equal, value, known))
    return isinstance(value, (int, float, str, bool, type(None))) and (
        value == known and isinstance(value, bool) == isinstance(known, bool)
    )


def check_multiples(file: str, key: str, widths: Sequence[int], name: str, divisors: Sequence[int]) -> None:
    """Raise ValueError unless each of the widths under `key` is a multiple of its divisor under `name`."""
    if any(width % divisor for width, divisor in zip(widths, divisors, strict=True)):
        shown = [SHORT.repr(list(x) if len(set(x)) > 1 else x[0]) for x in (widths, divisors)]
        raise ValueError(f"{file} has {key} = {shown[0]}, which {name} = {shown[1]} does not divide")


def unsupported(file: str, key: str, value: Any, supported: str) -> ValueError:
    return ValueError(f"{file} has {key} = {SHORT.repr(value)}: only {supported} is supported")


def sizes(kind: Any, file: str, values: Json) -> Json:
    """The values in the table of `file` that are fields of the dataclass `kind`, lists as tuples."""
    names = SUPPORTED[file].keys() & values.keys()
    found = {field.name: field.default for field in fields(kind) if field.name in names}
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
    """Load a tokenizer from vocab.json and merges.txt or, as transformers saves it today, tokenizer.json.

    special_tokens_map.json and tokenizer_config.json may set the pad token and the length; those two,
    tokenizer.json and added_tokens.json may add tokens, of textual inversion for example.
    Raises FileNotFoundError for a missing file, ValueError for a broken one.
    """
    settings = read_json(folder / "tokenizer_config.json", {})
    specials = read_json(folder / "special_tokens_map.json", {})
    whole = read_json(folder / "tokenizer.json", {})
    names, vocabulary, merges = read_vocabulary(folder, whole)
    pad = specials.get("pad_token") or settings.get("pad_token") or EOS
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if not isinstance(pad, str):
        raise ValueError(f"the pad_token of {folder} is not a text: replace its special_tokens_map.json")
    try:
        check("tokenizer_config.json", settings)
        check_vocabulary(vocabulary, merges)
        added = added_tokens(folder, settings, specials, whole)
        for token, number in added.values():
            if vocabulary.setdefault(token.content, number) != number:
                raise ValueError(f"{token.content!r} has the ids {vocabulary[token.content]} and {number}")
        if len(set(vocabulary.values())) < len(vocabulary):
            raise ValueError("two tokens have the same id")
        # At most 77, the positions of the text encoder: a config without a limit has an absurdly large one.
        context = int(min(settings.get("model_max_length") or 77, 77))
        return Tokenizer(vocabulary, merges, pad, context, [token for token, _ in added.values()])
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ValueError(f"{names} in {folder} do not fit together: {error}") from error


def read_vocabulary(folder: Path, whole: Json) -> tuple[str, dict[str, Any], list[tuple[str, str]]]:
    """Names of the files, numbers by token, and merges; whole: the content of tokenizer.json."""
    files = [folder / "vocab.json", folder / "merges.txt"]
    missing = [file for file in files if not file.exists()]
    if not missing:
        return "vocab.json and merges.txt", read_json(files[0]), read_merges(files[1])
    if not whole:
        raise FileNotFoundError(f"{missing[0]} is missing: copy it from the model's tokenizer folder")
    model = whole.get("model")
    model = model if isinstance(model, dict) else {}
    vocabulary, merges = model.get("vocab"), model.get("merges")
    suffix = model.get("end_of_word_suffix")
    if not isinstance(vocabulary, dict) or not isinstance(merges, list) or suffix != "</w>":
        raise ValueError(f"{folder / 'tokenizer.json'} is not a tokenizer of CLIP: copy the model's own")
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    if not all(isinstance(pair, list) and list(map(type, pair)) == [str, str] for pair in pairs):
        raise ValueError(f"{folder / 'tokenizer.json'} has merges that are not pairs of tokens: replace it")
    return "vocabulary and merges of tokenizer.json", vocabulary, [(left, right) for left, right in pairs]


def check_vocabulary(vocabulary: dict[str, Any], merges: list[tuple[str, str]]) -> None:
    """Raise ValueError for numbers that are not ids, and for merges that cannot make the vocabulary."""
    for token, number in vocabulary.items():
        if not ID.has(number):
            raise ValueError(f"the token {token!r} has {SHORT.repr(number)} instead of an id")
    long = {token for token in vocabulary if len(token.removesuffix("</w>")) > 1 and token not in (BOS, EOS)}
    for left, right in merges:
        if not {left, right, left + right} <= vocabulary.keys():
            raise ValueError(
                f"the merge {SHORT.repr(f'{left} {right}')} has tokens that the vocabulary lacks"
            )
    made = {left + right for left, right in merges}
    # A few tokens may have been added by hand.
    if len(long - made) > (len(vocabulary) // 10 if merges else 0):
        raise ValueError(f"the merges make only {len(long & made)} of {len(long)} tokens: some are missing")


def added_tokens(folder: Path, settings: Json, specials: Json, whole: Json) -> Added:
    """Tokens that no merge makes, with their ids, by content; ValueError for broken ones."""
    decoder, listed = settings.get("added_tokens_decoder") or {}, whole.get("added_tokens") or []
    if not isinstance(decoder, dict) or not isinstance(listed, list):
        raise ValueError("the added tokens are not a list")
    entries = [(int(n) if re.fullmatch(r"[0-9]{1,9}", n) else n, entry) for n, entry in decoder.items()]
    entries += [(entry.get("id"), entry) if isinstance(entry, dict) else (None, entry) for entry in listed]
    others = specials.get("additional_special_tokens")
    for content, number in read_json(folder / "added_tokens.json", {}).items():
        special = isinstance(others, list) and content in others
        entries.append((number, {"content": content, "normalized": not special}))
    found: Added = {}
    for number, entry in entries:
        content = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(content, str) or not content or not ID.has(number):
            raise ValueError(f"an added token is {SHORT.repr(content)} with the id {SHORT.repr(number)}")
        flags = {name: bool(entry[name]) for name in FLAGS if name in entry}
        if found.setdefault(content, (AddedToken(content, **flags), number))[1] != number:
            raise ValueError(f"{content!r} has the ids {found[content][1]} and {number}")
    return found


def read_merges(path: Path) -> list[tuple[str, str]]:
    """Read pairs of tokens to merge, one per line, after a line with the version."""
    check_regular(path, MAX_JSON)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        if not lines:
            raise ValueError("it is empty")
        pairs = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
        if wrong := [pair for pair in pairs if len(pair) != 2]:
            raise ValueError(f"a line is {SHORT.repr(' '.join(wrong[0]))}")
        return [(left, right) for left, right in pairs]
    except ValueError as error:
        why = "it is not text in UTF-8" if isinstance(error, UnicodeDecodeError) else error
        raise ValueError(f"{path} is not a list of pairs of tokens: download it again ({why})") from error
