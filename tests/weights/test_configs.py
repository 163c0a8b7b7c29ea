"""The JSON files of a model folder: sizes and schedule, read and written."""

import inspect
import json
from dataclasses import fields
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from support import checkpoints
from support.references import SD15_TEXT, SD15_UNET, SD15_VAE, SD21_TEXT, SD21_UNET, reference_vae
from transformers import CLIPTextConfig

from minidrag.method.ddim import Schedule
from minidrag.networks.clip import CLIPConfig
from minidrag.networks.unet import UNetConfig
from minidrag.networks.vae import VAEConfig
from minidrag.weights import configs
from minidrag.weights.configs import (
    READERS,
    model_files,
    read_schedule,
    read_text_encoder,
    read_unet,
    read_vae,
)

SD15_SCHEDULER = {  # the official file
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SIZES: list[dict[str, Any]] = [  # networks to write and read back
    {"unet": UNetConfig(), "vae": VAEConfig(), "text_encoder": CLIPConfig()},
    checkpoints.SMALL,
    {
        "unet": read_unet(SD21_UNET),
        "vae": VAEConfig(block_out_channels=(32, 64, 96), norm_num_groups=16, scaling_factor=0.5),
        "text_encoder": read_text_encoder(SD21_TEXT),
    },
]


# --- networks ---


def test_official_files_and_empty_ones_have_the_default_sizes() -> None:
    assert read_unet(SD15_UNET) == read_unet({}) == UNetConfig()
    assert read_vae(SD15_VAE) == read_vae({}) == VAEConfig()
    assert read_text_encoder(SD15_TEXT) == read_text_encoder({}) == CLIPConfig()
    assert VAEConfig().scaling_factor == reference_vae(SD15_VAE).config.scaling_factor


def test_sizes_of_sd_2_1() -> None:
    unet = read_unet(SD21_UNET)
    assert unet.heads == (5, 10, 20, 20) and unet.use_linear_projection and unet.sample_size == 96
    assert read_unet(SD15_UNET | {"num_attention_heads": [5, 10, 20, 20]}).heads == unet.heads
    assert read_text_encoder(SD21_TEXT).hidden_act == "gelu"


UNSUPPORTED: list[tuple[str, str, Any, str]] = [  # network, key, value, what the error says is supported
    ("unet", "act_fn", "gelu", "'silu'"),
    ("unet", "flip_sin_to_cos", False, "True"),
    ("unet", "freq_shift", 1, "0"),
    ("unet", "center_input_sample", True, "False"),
    ("unet", "class_embed_type", "identity", "None"),
    ("unet", "downsample_padding", 0, "1"),
    ("unet", "mid_block_scale_factor", 1.41, "1"),
    ("unet", "resnet_out_scale_factor", 1.41, "1"),
    ("unet", "resnet_skip_time_act", True, "False"),
    ("unet", "time_embedding_act_fn", "silu", "None"),
    ("unet", "timestep_post_act", "silu", "None"),
    ("unet", "down_block_types", ["DownBlock2D"] * 3, "one value for each of four levels"),
    ("unet", "block_out_channels", [320, 640, 1280], "one value for each of four levels"),
    ("unet", "attention_head_dim", (5, 10, 20), "one value for each of four levels"),
    ("vae", "act_fn", "relu", "'silu'"),
    ("vae", "latents_mean", [0.1] * 4, "None"),
    ("vae", "latents_std", [0.9] * 4, "None"),
    ("vae", "shift_factor", 0.1159, "None"),
    ("text_encoder", "hidden_act", "relu", "'quick_gelu' or 'gelu'"),
]
OFFICIAL = {
    "unet": (SD15_UNET, "UNet"),
    "vae": (SD15_VAE, "VAE"),
    "text_encoder": (SD15_TEXT, "text encoder"),
}


@pytest.mark.parametrize(("name", "key", "value", "supported"), UNSUPPORTED)
def test_another_structure_is_refused(name: str, key: str, value: Any, supported: str) -> None:
    file, label = OFFICIAL[name]
    with pytest.raises(ValueError) as caught:
        READERS[name](file | {key: value})
    expected = f"config.json of the {label} has {key} = {value!r}: only {supported} is supported"
    assert str(caught.value) == expected


@pytest.mark.parametrize("reader", [AutoencoderKL, UNet2DConditionModel])
def test_every_key_of_diffusers_is_known(reader: Any) -> None:
    """A key of a later release fails here until it is known to show in a shape, or is made a switch."""
    keys = set(inspect.signature(reader.__init__).parameters) - {"self"}
    table = configs.UNET if reader is UNet2DConditionModel else configs.VAE
    sizes = fields(UNetConfig if reader is UNet2DConditionModel else VAEConfig)
    known = {*configs.SWITCHES[table], *(field.name for field in sizes), *IN_SHAPES}
    assert keys <= known


IN_SHAPES = {  # or without effect on numbers, or on the precision alone
    "addition_embed_type",
    "addition_embed_type_num_heads",
    "addition_time_embed_dim",
    "attention_head_dim",
    "attention_type",
    "class_embeddings_concat",
    "conv_in_kernel",
    "conv_out_kernel",
    "cross_attention_norm",
    "down_block_types",
    "dropout",
    "dual_cross_attention",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "force_upcast",
    "mid_block_add_attention",
    "mid_block_only_cross_attention",
    "mid_block_type",
    "num_attention_heads",
    "num_class_embeds",
    "only_cross_attention",
    "projection_class_embeddings_input_dim",
    "resnet_time_scale_shift",
    "reverse_transformer_layers_per_block",
    "sample_size",
    "time_cond_proj_dim",
    "time_embedding_dim",
    "time_embedding_type",
    "transformer_layers_per_block",
    "up_block_types",
    "upcast_attention",
    "use_post_quant_conv",
    "use_quant_conv",
    "in_channels",
    "out_channels",
}


READ = {
    UNetConfig: read_unet,
    VAEConfig: read_vae,
    CLIPConfig: read_text_encoder,
    Schedule: read_schedule,
}
NUMBERS = [
    (kind, field.name)
    for kind in READ
    for field in fields(kind)
    if not isinstance(field.default, (bool, str)) and field.name not in ("attention", "heads")
]
deep: list[Any] = []
for _ in range(500):
    deep = [deep]
WRONG = [None, True, "4", -1, 0, -0.5, 10**12, 1e12, float("nan"), float("inf"), [], [0], [1.5], [[4]], {}]
WRONG += [deep, ["4"], [True] * 4, [None] * 4]


@pytest.mark.parametrize(("kind", "key"), [*NUMBERS, (UNetConfig, "attention_head_dim")])
def test_numbers_of_the_wrong_type_or_size_are_refused(kind: Any, key: str) -> None:
    for value in WRONG:
        if (key, value) == ("steps_offset", 0):
            continue
        with pytest.raises(ValueError) as caught:
            READ[kind]({key: value})
        message = str(caught.value)
        assert ".json" in message and len(message) < 400 and "\n" not in message, message


def test_whole_numbers_may_be_written_with_a_point() -> None:
    assert read_unet({"mid_block_scale_factor": 1.0, "freq_shift": 0.0}) == UNetConfig()


@pytest.mark.parametrize(
    ("read", "values", "message"),
    [
        (read_unet, {"block_out_channels": [320, 640, 1280, 1284]}, "attention_head_dim = 8 does not divide"),
        (read_unet, {"attention_head_dim": [8, 8, 8, 7]}, "attention_head_dim = 7 does not divide"),
        (read_unet, {"norm_num_groups": 3}, "norm_num_groups = 3 does not divide"),
        (read_vae, {"norm_num_groups": 7}, "norm_num_groups = 7 does not divide"),
        (read_text_encoder, {"num_attention_heads": 7}, "768 channels, which num_attention_heads = 7"),
        (read_schedule, {"num_train_timesteps": 10, "steps_offset": 10}, "steps_offset = 10"),
        (read_schedule, {"beta_end": 1.0}, "beta_end = 1.0"),
        (read_vae, {"scaling_factor": 0.13025}, "that is SDXL's VAE"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(read: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(values)


# --- schedule ---


def test_the_official_schedule_is_the_default() -> None:
    assert read_schedule(SD15_SCHEDULER) == read_schedule({}) == Schedule()
    other = read_schedule({"beta_start": 0.001, "num_train_timesteps": 500, "steps_offset": 0})
    assert other == Schedule(beta_start=0.001, num_train_timesteps=500, steps_offset=0)
    assert read_schedule({"prediction_type": "v_prediction"}) == Schedule()


@pytest.mark.parametrize(
    ("key", "value", "supported"),
    [
        ("trained_betas", [0.1, 0.2], "None"),
        ("rescale_betas_zero_snr", True, "False"),
        ("beta_schedule", "squaredcos_cap_v2", "'scaled_linear' or 'linear'"),
        ("use_flow_sigmas", True, "False"),
        ("_class_name", "FlowMatchEulerDiscreteScheduler", "a sampler of a diffusion model"),
    ],
)
def test_another_schedule_is_refused(key: str, value: Any, supported: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_schedule(SD15_SCHEDULER | {key: value})
    assert str(caught.value) == f"scheduler_config.json has {key} = {value!r}: only {supported} is supported"


# --- writing ---


@pytest.mark.parametrize("sizes", SIZES)
def test_what_is_written_is_read_back(sizes: dict[str, Any]) -> None:
    files = model_files(**sizes, sampler="PNDMScheduler")
    for values in (files, json.loads(json.dumps(files))):
        for name, read in READERS.items():
            assert read(values[f"{name}/config.json"]) == sizes[name]
        assert read_schedule(values["scheduler/scheduler_config.json"]) == Schedule()


@pytest.mark.parametrize("sizes", SIZES)
def test_the_reference_libraries_build_the_same_networks(sizes: dict[str, Any]) -> None:
    files = json.loads(json.dumps(model_files(**sizes, sampler="DDIMScheduler")))
    text = CLIPTextConfig(**files["text_encoder/config.json"])
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(files["unet/config.json"])
        vae: Any = AutoencoderKL.from_config(files["vae/config.json"])
    assert read_unet(dict(unet.config)) == sizes["unet"]
    assert read_vae(dict(vae.config)) == sizes["vae"]
    assert read_text_encoder(text.to_dict()) == sizes["text_encoder"]
    last = sizes["text_encoder"].vocab_size - 1
    assert (text.bos_token_id, text.eos_token_id) == (last - 1, last)
    assert vae.config.sample_size == unet.config.sample_size * sizes["vae"].factor


@pytest.mark.parametrize("kind", [DDIMScheduler, PNDMScheduler])
def test_diffusers_samplers_have_the_same_schedule(kind: Any) -> None:
    files = model_files(UNetConfig(), VAEConfig(), CLIPConfig(), kind.__name__)
    assert files["model_index.json"]["scheduler"] == ["diffusers", kind.__name__]
    scheduler = kind.from_config(files["scheduler/scheduler_config.json"])
    torch.testing.assert_close(scheduler.alphas_cumprod, Schedule().alphas_cumprod, atol=0, rtol=1e-6)
    assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0]
    assert scheduler.config.steps_offset == 1 and scheduler.config.timestep_spacing == "leading"
