"""The small files of a model folder: sizes, schedule and tokenizer, read and written."""

import json
from collections.abc import Callable
from pathlib import Path
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
from minidrag.tiny.vocabulary import train
from minidrag.weights import configs
from minidrag.weights.configs import (
    READERS,
    load_tokenizer,
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
    ("unet", "addition_embed_type", "text_time", "None"),
    ("unet", "flip_sin_to_cos", False, "True"),
    ("unet", "freq_shift", 1, "0"),
    ("unet", "center_input_sample", True, "False"),
    ("unet", "mid_block_type", None, "'UNetMidBlock2DCrossAttn'"),
    ("unet", "transformer_layers_per_block", 2, "1"),
    ("unet", "transformer_layers_per_block", [1, 2, 10], "1"),
    ("unet", "down_block_types", ["DownBlock2D"] * 3, "one value for each of four levels"),
    (
        "unet",
        "down_block_types",
        ["DownBlock2D"] * 3 + ["SimpleCrossAttnDownBlock2D"],
        repr(["DownBlock2D"] * 4),
    ),
    (
        "unet",
        "up_block_types",
        ["CrossAttnUpBlock2D"] * 4,
        repr(["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3),
    ),
    ("unet", "block_out_channels", [320, 640, 1280], "one value for each of four levels"),
    ("unet", "attention_head_dim", (5, 10, 20), "one value for each of four levels"),
    ("vae", "act_fn", "relu", "'silu'"),
    ("vae", "in_channels", 4, "3"),
    ("vae", "use_quant_conv", False, "True"),
    ("vae", "shift_factor", 0.1159, "None"),
    ("text_encoder", "hidden_act", "relu", "'quick_gelu' or 'gelu'"),
]


@pytest.mark.parametrize(("name", "key", "value", "supported"), UNSUPPORTED)
def test_another_structure_is_refused(name: str, key: str, value: Any, supported: str) -> None:
    file, label = {
        "unet": (SD15_UNET, "UNet"),
        "vae": (SD15_VAE, "VAE"),
        "text_encoder": (SD15_TEXT, "text encoder"),
    }[name]
    with pytest.raises(ValueError) as caught:
        READERS[name](file | {key: value})
    assert (
        str(caught.value)
        == f"config.json of the {label} has {key} = {value!r}: only {supported} is supported"
    )


def test_down_blocks_that_do_not_mirror_the_up_blocks_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"config\.json of the UNet has up_block_types = .* only \['UpBlock2D', "
    ):
        read_unet(SD15_UNET | {"down_block_types": ["DownBlock2D"] * 4})


KINDS = (configs.Number, configs.Numbers)


def numeric(table: str) -> list[tuple[str, str]]:
    """Keys of a table that have numbers; read from the table so that a new key is tried too."""
    kinds = (configs.Number, configs.Numbers)
    keys = [
        key for key, known in configs.SUPPORTED[table].items() if any(isinstance(x, kinds) for x in known)
    ]
    return [(table, key) for key in keys]


READ = {
    "config.json of the UNet": read_unet,
    "config.json of the VAE": read_vae,
    "config.json of the text encoder": read_text_encoder,
    "scheduler_config.json": read_schedule,
}
deep: list[Any] = []
for _ in range(500):
    deep = [deep]
WRONG = [
    True,
    "4",
    -1,
    0,
    -0.5,
    10**12,
    1e12,
    float("nan"),
    float("inf"),
    [],
    [0],
    [1.5],
    [[4]],
    {},
    {"a": 1},
]
WRONG += [deep, [4] * 1000, ["4"], [True] * 4, [None] * 4]


@pytest.mark.parametrize(("table", "key"), [pair for table in READ for pair in numeric(table)])
def test_numbers_of_the_wrong_type_or_size_are_refused(table: str, key: str) -> None:
    """Only zero as an offset, and a list of one number of the size of a head, mean something."""
    for value in [*WRONG, *([] if key == "num_attention_heads" else [None])]:
        if (key, value) == ("steps_offset", 0):
            continue
        with pytest.raises(ValueError) as caught:
            READ[table]({key: value})
        message = str(caught.value)
        assert message.startswith(f"{table} has {key} = ") and len(message) < 400, message
        assert "\n" not in message


@pytest.mark.parametrize("table", READ)
def test_no_other_key_takes_any_value(table: str) -> None:
    for key, known in configs.SUPPORTED[table].items():
        if any(isinstance(x, KINDS) for x in known):
            continue
        for value in [0.5, "x", deep, [], {}, float("nan"), 10**4000, [known[0]]]:
            with pytest.raises(ValueError, match=f"has {key} = "):
                READ[table]({key: value})


def test_a_flag_is_no_number_and_a_number_no_flag() -> None:
    for key, value in {"flip_sin_to_cos": 1, "downsample_padding": True, "use_linear_projection": 0}.items():
        with pytest.raises(ValueError, match=f"{key} = {value}"):
            read_unet({key: value})
    assert read_unet({"mid_block_scale_factor": 1.0, "freq_shift": 0.0}) == UNetConfig()


@pytest.mark.parametrize(
    ("read", "values", "message"),
    [
        (read_unet, {"block_out_channels": [320, 640, 1280, 1284]}, "attention_head_dim = 8 does not divide"),
        (
            read_unet,
            {"attention_head_dim": [8, 8, 8, 7]},
            r"attention_head_dim = \[8, 8, 8, 7\] does not divide",
        ),
        (read_unet, {"norm_num_groups": 3}, "norm_num_groups = 3 does not divide"),
        (read_vae, {"norm_num_groups": 7}, "norm_num_groups = 7 does not divide"),
        (read_text_encoder, {"num_attention_heads": 7}, "hidden_size = 768, which num_attention_heads = 7"),
        (read_schedule, {"num_train_timesteps": 10, "steps_offset": 10}, "steps_offset = 10"),
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


# --- tokenizer ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train(["a red circle on the grass", "a blue square"], 540, tmp_path)
    return tmp_path


@pytest.mark.parametrize("limit", [16, 77, 512, 10**30, 1e30])
def test_length_of_a_tokenizer(folder: Path, limit: int) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": limit}))
    assert load_tokenizer(folder)("a " * 100).shape == (1, min(limit, 77))


def test_a_tokenizer_needs_only_two_files(folder: Path) -> None:
    before = load_tokenizer(folder)("a red square")
    (folder / "special_tokens_map.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert torch.equal(load_tokenizer(folder)("a red square"), before)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_missing_file_of_a_tokenizer(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        load_tokenizer(folder)


@pytest.mark.parametrize("change", [lambda x: b"\xef\xbb\xbf" + x, lambda x: x + b"\n \n"])
def test_merges_as_editors_leave_them(folder: Path, change: Callable[[bytes], bytes]) -> None:
    expected = load_tokenizer(folder)("a photo").tolist()
    file = folder / "merges.txt"
    file.write_bytes(change(file.read_bytes()))
    assert load_tokenizer(folder)("a photo").tolist() == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", b"", "vocab.json cannot be read as JSON: it is not valid JSON"),
        ("vocab.json", b'{"a": 0, "b', "vocab.json cannot be read as JSON: it is not valid JSON"),
        ("vocab.json", b"\xff\xfe\x00", "vocab.json cannot be read as JSON: it is not text in UTF-8"),
        ("vocab.json", b"[1, 2]", "vocab.json is not a JSON object"),
        ("vocab.json", b'{"a": 0}', "the vocabulary lacks"),
        ("merges.txt", b"#version: 0.2\na b c\n", "merges.txt is not a list of pairs"),
        ("merges.txt", b"\xff\xfe\x00", "merges.txt is not a list of pairs"),
        ("merges.txt", b"#version: 0.2\nqqq zzz\n", "the merge 'qqq zzz' has tokens that the vocabulary"),
        ("merges.txt", b"\xed\xa0\x80 b\n", r"download it again \(it is not text in UTF-8\)"),
        (
            "special_tokens_map.json",
            b"{",
            "special_tokens_map.json cannot be read as JSON: it is not valid JSON",
        ),
        ("special_tokens_map.json", b'{"pad_token": "<pad>"}', "lacks <pad>"),
        ("special_tokens_map.json", b'{"pad_token": 3}', "pad_token"),
        ("special_tokens_map.json", b'{"pad_token": {"x": 3}}', "pad_token"),
        ("vocab.json", b'{"a": "0"}', "the token 'a' has '0' instead of an id"),
        ("vocab.json", b'{"a": -1}', "the token 'a' has -1"),
        ("vocab.json", b'{"a": true}', "the token 'a' has True"),
        ("vocab.json", b'{"a": 1e3}', "the token 'a' has 1000.0"),
        ("vocab.json", b'{"a": 99999999999}', "the token 'a' has 99999999999"),
        ("vocab.json", b"[" * 100_000, "nested too deep"),
        ("merges.txt", b"", "merges.txt is not a list of pairs"),
        ("merges.txt", b"#version: 0.2\n", "the merges make only 0 of"),
        ("merges.txt", b"abc\n", "a line is 'abc'"),
        ("tokenizer_config.json", b'{"model_max_length": 0}', "model_max_length = 0: only"),
        ("tokenizer_config.json", b'{"model_max_length": NaN}', "NaN is not valid JSON"),
        ("tokenizer_config.json", b'{"model_max_length": true}', "model_max_length = True: only"),
        ("tokenizer_config.json", b'{"model_max_length": "77"}', "model_max_length = '77': only"),
        ("tokenizer_config.json", b'{"model_max_length": [77]}', r"model_max_length = \[77\]: only"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}', "added tokens are not a list"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"x": {"content": "y"}}}',
            "'y' with the id 'x'",
        ),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"9": 3}}', "None with the id 9"),
        ("added_tokens.json", b'{"<x>": "y"}', "'<x>' with the id 'y'"),
        ("added_tokens.json", b'{"<x>": -3}', "'<x>' with the id -3"),
        ("added_tokens.json", b'{"<x>": 3}', "two tokens have the same id"),
        ("added_tokens.json", b'{"a": 600}', "'a' has the ids"),
        ("added_tokens.json", b"[1]", "added_tokens.json is not a JSON object"),
        ("tokenizer.json", b'{"added_tokens": 3}', "added tokens are not a list"),
        ("tokenizer.json", b'{"added_tokens": [3]}', "None with the id None"),
        ("tokenizer.json", b"{", "tokenizer.json cannot be read as JSON: it is not valid JSON"),
    ],
)
def test_broken_file_of_a_tokenizer(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value)
