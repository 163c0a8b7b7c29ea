"""LoRA files against diffusers and peft: keys in every style, files that are written or refused."""

import copy
import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from support.loras import (
    ATTENTION,
    KOHYA,
    LOCON,
    TEXT_ENCODER,
    Models,
    build_models,
    merged_reference_noise,
    merged_weights,
    outputs,
    random_factors,
    read_notes,
    reference_outputs,
    tiny_unet,
    unet_inputs,
)
from support.references import SD15_TEXT, SD15_UNET, our_text, our_unet, prompt_tokens
from torch import Tensor
from torch.func import functional_call

from minidrag.method.lora import Factors, LoRA, target_layers
from minidrag.weights import lora_file
from minidrag.weights.lora_file import ADAPTER, FILE_NAME

TRANSFORMERS = tuple(map(int, transformers.__version__.split(".")[:2]))
Compare = Callable[..., None]
NO_LORA = LoRA({}, {})


@pytest.fixture(scope="module")
def shared_models() -> Models:
    return build_models()


@pytest.fixture
def models(shared_models: Models) -> Iterator[Models]:
    """The shared models, without a LoRA before and after."""
    yield shared_models
    shared_models.pipeline.unload_lora_weights()


# Files in every style. Their keys are written out here; diffusers today reads those in BY_DIFFUSERS.


def processor_key(path: str, factor: str) -> str:
    attention, _, projection = path.removesuffix(".0").rpartition(".")
    return f"{attention}.processor.{projection}_lora.{factor}.weight"


KEYS: dict[str, Callable[[str, str], str]] = {  # of a layer of the UNet and of down or up
    "official DragDiffusion": lambda path, factor: f"unet.unet.{path}.lora.{factor}.weight",
    "old diffusers": lambda path, factor: f"unet.{path}.lora.{factor}.weight",
    "peft": lambda path, factor: f"unet.{path}.lora_{'A' if factor == 'down' else 'B'}.weight",
    "attention processors": lambda path, factor: f"unet.{processor_key(path, factor)}",
    "attention processors, bare": processor_key,
    "attention processors, official": lambda path, factor: f"unet.unet.{processor_key(path, factor)}",
    "bare adapter": lambda path, factor: f"{path}.lora_{'A' if factor == 'down' else 'B'}.weight",
    "kohya": lambda path, factor: f"lora_unet_{path.replace('.', '_')}.lora_{factor}.weight",
}
BY_DIFFUSERS = ("old diffusers", "peft", "attention processors", "kohya")


def tensors_by_key(entries: dict[str, Factors], style: str) -> dict[str, Tensor]:
    key = KEYS[style]
    tensors = {key(path, "down"): factors.down for path, factors in entries.items()}
    return tensors | {key(path, "up"): factors.up for path, factors in entries.items()}


@pytest.mark.parametrize("style", KEYS)
def test_files_in_every_style_equal_diffusers(
    style: str, models: Models, tmp_path: Path, compare: Compare
) -> None:
    entries = random_factors(models.unet, ATTENTION, seed=3, alpha=None)
    save_file(tensors_by_key(entries, style), tmp_path / FILE_NAME)
    found = lora_file.read(tmp_path, models.unet, models.text_encoder)
    assert len(found.unet) == 128 and not found.text_encoder
    ours, without = outputs(models, found)[0], reference_outputs(models)[0]
    compare(f"LoRA, {style}: merged", ours, merged_reference_noise(models, entries))
    if style in BY_DIFFUSERS:
        models.pipeline.load_lora_weights(str(tmp_path), weight_name=FILE_NAME)
        compare(f"LoRA, {style}: diffusers", ours, reference_outputs(models)[0])
    assert (ours - without).abs().max() > 1e-3, "the LoRA changes too little to prove anything"


@pytest.mark.parametrize("suffixes", [ATTENTION, KOHYA, LOCON], ids=["attention", "default", "LoCon"])
def test_kohya_files_with_alpha_and_text_encoder_equal_diffusers(
    suffixes: tuple[str, ...], models: Models, tmp_path: Path, compare: Compare
) -> None:
    entries = random_factors(models.unet, suffixes, seed=4)
    text_entries = random_factors(models.text_encoder, TEXT_ENCODER, seed=5)
    tensors = tensors_by_key(entries, "kohya")
    for path, factors in text_entries.items():
        name = f"lora_te_{path.replace('.', '_')}"
        tensors |= {f"{name}.lora_down.weight": factors.down, f"{name}.lora_up.weight": factors.up}
    for network, part in (("unet", entries), ("te", text_entries)):
        for path, factors in part.items():
            tensors[f"lora_{network}_{path.replace('.', '_')}.alpha"] = torch.tensor(factors.alpha)
    save_file(tensors, tmp_path / "lora.safetensors")
    found = lora_file.read(tmp_path / "lora.safetensors", models.unet, models.text_encoder)
    assert (len(found.unet), len(found.text_encoder)) == (len(entries), 18)
    models.pipeline.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    pairs = zip(outputs(models, found), reference_outputs(models), strict=True)
    for name, pair in zip(("UNet", "text"), pairs, strict=True):
        compare(f"LoRA, kohya with alpha: {name}", *pair)


@pytest.mark.parametrize("style", ["lora_A", "lora_linear_layer", "to_q_lora"])
def test_text_encoder_keys_of_diffusers(style: str, models: Models, tmp_path: Path, compare: Compare) -> None:
    tensors = tensors_by_key(random_factors(models.unet, ATTENTION, seed=6, alpha=None), "peft")
    for path, factors in random_factors(models.text_encoder, ("_proj",), seed=7, alpha=None).items():
        for factor, letter, tensor in (("down", "A", factors.down), ("up", "B", factors.up)):
            old = path.replace("out_proj", "to_out").replace("_proj", "")
            old = old if "to_out" in old else f"{old[:-1]}to_{old[-1]}"
            keys = {
                "lora_A": f"text_encoder.{path}.lora_{letter}.weight",
                "lora_linear_layer": f"text_encoder.{path}.lora_linear_layer.{factor}.weight",
                "to_q_lora": f"text_encoder.{old}_lora.{factor}.weight",
            }
            tensors[keys[style]] = tensor
    save_file(tensors, tmp_path / FILE_NAME)
    found = lora_file.read(tmp_path, models.unet, models.text_encoder)
    assert len(found.text_encoder) == 12
    models.pipeline.load_lora_weights(str(tmp_path), weight_name=FILE_NAME)
    pairs = zip(outputs(models, found), reference_outputs(models), strict=True)
    for name, pair in zip(("UNet", "text"), pairs, strict=True):
        compare(f"LoRA, diffusers' text encoder keys: {name}", *pair)


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"alpha_pattern": {"attn2.to_q": 11, "to_k": 2}}]
)
def test_alpha_given_only_in_the_metadata_of_peft(
    options: dict[str, Any], models: Models, tmp_path: Path, compare: Compare
) -> None:
    reference = models.pipeline.unet
    reference.add_adapter(LoraConfig(r=4, lora_alpha=7, target_modules=list(ATTENTION), **options), "ours")
    generator = torch.Generator().manual_seed(8)
    for name, weight in reference.named_parameters():
        if "lora_" in name:
            weight.requires_grad_(False).normal_(0, 0.2, generator=generator)
    reference.save_lora_adapter(tmp_path / "bare", "ours")
    tensors = {f"unet.{name}": x for name, x in load_file(tmp_path / "bare" / FILE_NAME).items()}
    config = {f"unet.{name}": x for name, x in reference.peft_config["ours"].to_dict().items()}
    save_file(tensors, tmp_path / FILE_NAME, {"lora_adapter_metadata": json.dumps(config, default=sorted)})
    for folder in (tmp_path / "bare", tmp_path):
        found = lora_file.read(folder, models.unet, models.text_encoder)
        compare("LoRA, alpha in peft's metadata", outputs(models, found)[0], reference_outputs(models)[0])


def test_no_layer_is_special(models: Models, tmp_path: Path, compare: Compare) -> None:
    """LyCORIS also has conv_in, conv_out, the timestep embedding, and every layer of the text encoder."""
    entries, text_entries = (
        random_factors(models.unet, ("",), 31),
        random_factors(models.text_encoder, ("",), 32),
    )
    assert {"conv_in", "conv_out", "time_embedding.linear_1"} < entries.keys()
    save_file(lora_file.to_keys(LoRA(entries, text_entries), "kohya"), tmp_path / "lora.safetensors")
    found = lora_file.read(tmp_path / "lora.safetensors", models.unet, models.text_encoder)
    assert (len(found.unet), len(found.text_encoder)) == (len(entries), len(text_entries))
    noise, text = outputs(models, found)
    compare("LoRA on every layer: UNet", noise, merged_reference_noise(models, entries))
    merged = merged_weights(models.text_encoder, text_entries)
    with torch.no_grad():
        compare(
            "LoRA on every layer: text",
            text,
            functional_call(models.text_encoder, merged, prompt_tokens(120)),
        )


@torch.no_grad()
def randomize_adapter(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.requires_grad_(False).normal_(0, 0.2, generator=generator)


def test_a_file_with_a_text_encoder_by_diffusers_today(
    models: Models, tmp_path: Path, compare: Compare
) -> None:
    """transformers 5.6 dropped text_model. from the names of the text encoder's layers."""
    layers, adapted, targets = {}, {}, {"unet": [*ATTENTION], "text_encoder": ["q_proj", "fc1"]}
    for name, ends in targets.items():
        config = LoraConfig(r=3, lora_alpha=3, target_modules=ends)
        model: Any = inject_adapter_in_model(config, copy.deepcopy(getattr(models.pipeline, name)))
        model.peft_config = {"default": config}
        randomize_adapter(model, 33)
        layers[f"{name}_lora_layers"], adapted[name] = get_peft_model_state_dict(model), model
    type(models.pipeline).save_lora_weights(tmp_path, **layers)
    keys = [key for key in load_file(tmp_path / FILE_NAME) if key.startswith("text_encoder.")]
    assert len(keys) == 12 and (not any("text_model" in key for key in keys) or TRANSFORMERS < (5, 6))
    found = lora_file.read(tmp_path, models.unet, models.text_encoder)
    assert len(found.text_encoder) == 6
    noise, text = outputs(models, found)
    with torch.no_grad():
        compare("LoRA, saved by diffusers today: UNet", noise, adapted["unet"](*unet_inputs()).sample)
        expected = adapted["text_encoder"](prompt_tokens(120)).last_hidden_state
    compare("LoRA, saved by diffusers today: text", text, expected)


ADAPTERS: dict[str, Any] = {
    "plain": {"lora_alpha": 5},
    "default alpha": {},
    "rslora": {"lora_alpha": 5, "use_rslora": True},
    "patterns": {
        "rank_pattern": {"attn2.to_k": 2},
        "alpha_pattern": {"attn2.to_k": 11, "^down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": 2},
    },
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("network", ["unet", "text_encoder"])
def test_adapters_of_peft(network: str, kind: str, models: Models, tmp_path: Path, compare: Compare) -> None:
    """adapter_model.safetensors, with alpha in adapter_config.json beside it, by peft itself."""
    reference = copy.deepcopy(getattr(models.pipeline, network))
    targets = list(ATTENTION if network == "unet" else ("q_proj", "fc2"))
    options = ADAPTERS[kind] if network == "unet" or kind != "patterns" else {"alpha_pattern": {"fc2": 3}}
    adapted: Any = get_peft_model(reference, LoraConfig(**{"r": 4, "target_modules": targets, **options}))
    randomize_adapter(adapted, 34)
    adapted.save_pretrained(tmp_path)
    assert all(key.startswith("base_model.model.") for key in load_file(tmp_path / ADAPTER))
    with torch.no_grad():
        inputs = unet_inputs() if network == "unet" else (prompt_tokens(120),)
        expected = adapted(*inputs)[0]
    for path in (tmp_path, tmp_path / ADAPTER):
        found = lora_file.read(path, models.unet, models.text_encoder)
        ours = outputs(models, found)[network == "text_encoder"]
        compare(f"LoRA, adapter of peft: {network}", ours, expected)
        assert not (found.text_encoder if network == "unet" else found.unet)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"lora_alpha": None}, "lora_alpha = None"),
        ({"lora_alpha": float("nan")}, "NaN is not valid JSON"),
        ({"lora_alpha": 1e30}, r"lora_alpha = 1e\+30"),
        ({"lora_alpha": True}, "lora_alpha = True"),
        ({"lora_alpha": [1, 2]}, r"lora_alpha = \[1, 2\]"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "alpha_pattern has"),
        ({"alpha_pattern": {"to_q": "3"}}, "alpha_pattern has"),
        ({"alpha_pattern": [1]}, "alpha_pattern is not a table"),
        (None, "adapter_config.json is missing"),
        ("[" * 100_000, "nested too deep"),
        ("[1]", "is not a JSON object"),
        ("{", "is not valid JSON"),
    ],
)
def test_adapters_that_are_not_plain_are_refused(values: Any, message: str, tmp_path: Path) -> None:
    unet, layer = tiny_unet(), "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file(
        {f"{layer}.lora_A.weight": torch.ones(2, 16), f"{layer}.lora_B.weight": torch.ones(16, 2)},
        tmp_path / ADAPTER,
    )
    config, tensors = tmp_path / "adapter_config.json", tmp_path / ADAPTER
    config.write_text(
        json.dumps({"lora_alpha": 2, "rank_pattern": {"[": 3, "(x+x+)+y": 2}, "alpha_pattern": {"to_q": 4}})
    )
    assert [factors.alpha for factors in lora_file.read(tmp_path, unet, None).unet.values()] == [4]
    config.write_text(values if isinstance(values, str) else json.dumps(values))
    if values is None:
        config.unlink()
    with pytest.raises(ValueError, match=message) as caught:
        lora_file.read(tmp_path, unet, None)
    assert str(caught.value).startswith(str(tensors)) and "\n" not in str(caught.value)


def test_a_folder_without_a_lora_says_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="has neither pytorch_lora_weights.safetensors nor adapter_model"
    ):
        lora_file.read(tmp_path, tiny_unet(), None)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / ADAPTER).touch()
    with pytest.raises(FileNotFoundError, match=f"give {tmp_path / 'unet'}"):
        lora_file.read(tmp_path, tiny_unet(), None)


def test_a_bundled_embedding_is_left_out(tmp_path: Path) -> None:
    unet = tiny_unet()
    lora = LoRA(random_factors(unet, ATTENTION, 35), {})
    bundle = {f"bundle_emb.word{i}.string_to_param.*": torch.ones(2, 12) for i in range(2)}
    save_file(lora_file.to_keys(lora, "kohya") | bundle, tmp_path / "lora.safetensors")
    found = lora_file.read(tmp_path / "lora.safetensors", unet, None)
    assert found.unet.keys() == lora.unet.keys()
    (note,) = lora_file.left_out(tmp_path / "lora.safetensors")
    assert "word0, word1" in note and "not used" in note
    save_file(lora_file.to_keys(lora, "kohya"), tmp_path / "lora.safetensors")
    assert lora_file.left_out(tmp_path / "lora.safetensors") == []


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float64])
def test_every_kind_of_floats_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        f"{FIRST}.lora_{name}.weight": torch.tensor([[0.5] * 16] * 16).to(dtype) for name in ("down", "up")
    }
    tensors[f"{FIRST}.alpha"] = torch.tensor(3)  # LyCORIS: an integer
    save_file(tensors, tmp_path / "lora.safetensors")
    ((down, up, alpha),) = lora_file.read(tmp_path / "lora.safetensors", tiny_unet(), None).unet.values()
    assert alpha == 3 and down.eq(0.5).all() and up.eq(0.5).all()
    assert down.dtype == (dtype if dtype.itemsize > 1 else torch.float32)


def test_layer_paths_of_stable_diffusion_stay_unique_without_their_dots() -> None:
    for model in (our_unet(SD15_UNET), our_text(SD15_TEXT)):
        paths = list(target_layers(model))
        assert len({path.replace(".", "_") for path in paths}) == len(paths)


def test_a_default_kohya_file_for_stable_diffusion_has_264_modules() -> None:
    unet, text_encoder = our_unet(SD15_UNET), our_text(SD15_TEXT)
    assert sum(path.endswith(KOHYA) for path in target_layers(unet)) == 192
    assert sum(path.endswith(TEXT_ENCODER) for path in target_layers(text_encoder)) == 72


# Writing.


def test_a_file_we_write_loads_in_diffusers_with_equal_outputs(
    models: Models, tmp_path: Path, compare: Compare
) -> None:
    text_entries = random_factors(models.text_encoder, ("_proj", "fc1"), 10, alpha=2.5)
    lora = LoRA(random_factors(models.unet, LOCON, 9), text_entries)
    lora_file.write(lora, tmp_path / FILE_NAME, {"prompt": "a boat"})
    models.pipeline.load_lora_weights(str(tmp_path), weight_name=FILE_NAME)
    pairs = zip(outputs(models, lora), reference_outputs(models), strict=True)
    for name, pair in zip(("UNet", "text"), pairs, strict=True):
        # alpha / rank is folded into up in float32.
        compare(f"LoRA, written by us, alpha folded: {name}", *pair, 1e-5)


def test_a_file_with_alpha_equal_to_the_rank_loads_in_diffusers_exactly(
    models: Models, tmp_path: Path, compare: Compare
) -> None:
    lora = LoRA(random_factors(models.unet, ATTENTION, 11, alpha=None), {})
    lora_file.write(lora, tmp_path / FILE_NAME)
    models.pipeline.unet.load_lora_adapter(tmp_path, prefix="unet", weight_name=FILE_NAME)
    compare("LoRA, written by us, alpha = rank", outputs(models, lora)[0], reference_outputs(models)[0])


@pytest.mark.parametrize("style", ["peft", "diffusers", "kohya"])
def test_what_is_written_in_any_style_is_read_back_exactly(
    style: str, models: Models, tmp_path: Path
) -> None:
    text_entries = random_factors(models.text_encoder, ("_proj", "fc2"), 13)
    lora = LoRA(random_factors(models.unet, LOCON, 12), text_entries)
    save_file(lora_file.to_keys(lora, style), tmp_path / "lora.safetensors")
    found = lora_file.read(tmp_path / "lora.safetensors", models.unet, models.text_encoder)
    for before, after in ((lora.unet, found.unet), (lora.text_encoder, found.text_encoder)):
        assert before.keys() == after.keys()
        for path, (down, up, alpha) in before.items():
            assert torch.equal(down, after[path].down)
            scaled = after[path].up * (after[path].alpha / len(down))
            assert torch.equal(up * (alpha / len(down)), scaled), path
            assert after[path].alpha == (alpha if style == "kohya" else len(down))


def test_the_same_lora_gives_the_same_bytes_and_keeps_its_notes(tmp_path: Path) -> None:
    lora = LoRA(random_factors(tiny_unet(), ATTENTION, 14), {})
    notes = {str(i): f"note {i}" for i in range(9)}
    for name in ("a", "b", "c"):
        lora_file.write(lora, tmp_path / name, dict(reversed(notes.items())) if name == "c" else notes)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    assert read_notes(tmp_path / "a") == notes
    save_file(lora_file.to_keys(lora, "kohya"), tmp_path / "other")
    assert read_notes(tmp_path / "other") == {}


def test_a_failed_write_leaves_no_file_behind(tmp_path: Path) -> None:
    (tmp_path / "lora.safetensors").mkdir()
    with pytest.raises(OSError):
        lora_file.write(LoRA(random_factors(tiny_unet(), ATTENTION, 15), {}), tmp_path / "lora.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


@pytest.fixture
def disk_full() -> Iterator[None]:
    """Let no file grow beyond 1 MB, which looks like a full disk to the code that writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("disk_full")
def test_a_full_disk_raises_oserror_and_leaves_no_file_behind(tmp_path: Path) -> None:
    large = Factors(torch.zeros(20_000, 16), torch.zeros(16, 20_000), 1.0)
    with pytest.raises(OSError) as caught:
        lora_file.write(LoRA({"to_q": large}, {}), tmp_path / "lora.safetensors")
    assert caught.value.filename == str(tmp_path / "lora.safetensors") and caught.value.strerror
    assert not list(tmp_path.iterdir())


# Files that are refused.

PATH = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FIRST = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
REFUSED: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {  # shapes by key, pattern of the message
    "LoHa": ({f"{FIRST}.hada_w1_a": (2, 16)}, "LoHa"),
    "LoKr": ({f"{FIRST}.lokr_w1": (2, 16)}, "LoKr"),
    "OFT": ({f"{FIRST}.oft_blocks": (4, 4, 4)}, "this is OFT"),
    "OFT by peft": ({"base_model.model.x.to_q.oft_R.weight": (4, 6)}, "this is OFT"),
    "VeRA": ({"base_model.model.x.to_q.vera_lambda_b": (16,)}, "it has a tensor .*vera_lambda_b"),
    "GLoRA": ({f"{FIRST}.a1.weight": (2, 16)}, f"it has a tensor {FIRST}.a1.weight"),
    "norms": ({"lora_unet_conv_norm_out.w_norm": (16,)}, "weight differences"),
    "embedding": ({"emb_params": (2, 16)}, "an embedding of textual inversion"),
    "embedding of diffusers": ({"<cat>": (16,)}, "an embedding of textual inversion"),
    "two styles at once": (
        {f"{FIRST}.lora_down.weight": (2, 16), f"{PATH}.lora_A.weight": (2, 16)},
        f"is there twice, as {FIRST}.lora_down.weight and as {PATH}.lora_A.weight",
    ),
    "two adapters": (
        {f"{PATH}.lora_A.{name}.weight": (2, 16) for name in ("cat", "dog")},
        "is there twice, as .*cat.weight and as .*dog.weight",
    ),
    "Tucker": ({f"{FIRST}.lora_mid.weight": (2, 2, 3, 3)}, "Tucker"),
    "DoRA": ({f"{FIRST}.dora_scale": (16, 1)}, "DoRA"),
    "DoRA by peft": ({"unet.x.to_q.lora_magnitude_vector": (16,)}, "DoRA"),
    "bias difference": ({f"{FIRST}.diff_b": (16,)}, "weight differences"),
    "whole model": ({"model.diffusion_model.input_blocks.0.0.weight": (16, 4, 3, 3)}, "not a plain LoRA"),
    "bias": ({"unet.x.to_q.lora_B.bias": (16,)}, "not a plain LoRA"),
    "down alone": ({f"{FIRST}.lora_down.weight": (2, 16)}, "is incomplete"),
    "alpha alone": ({f"{FIRST}.alpha": ()}, "is incomplete"),
    "rank 0": (
        {f"{FIRST}.lora_down.weight": (0, 16), f"{FIRST}.lora_up.weight": (16, 0)},
        "is incomplete",
    ),
    "scalars": ({f"{FIRST}.lora_down.weight": (), f"{FIRST}.lora_up.weight": ()}, "is incomplete"),
    "layers of another model": (
        {f"unet.x{i}.lora_{factor}.weight": (2, 2) for i in range(5) for factor in ("A", "B")},
        "UNet: layer x0 does not exist, layer x1 does not exist, layer x2 does not exist, and 2 more",
    ),
    "wrong width": (
        {f"{FIRST}.lora_down.weight": (2, 20), f"{FIRST}.lora_up.weight": (16, 2)},
        r"to_q is \[16, 16\], not \[16, 2\] times \[2, 20\]",
    ),
    "wrong ranks": ({f"{FIRST}.lora_down.weight": (2, 16), f"{FIRST}.lora_up.weight": (16, 3)}, "to_q is"),
    "convolution": (
        {f"{FIRST}.lora_down.weight": (2, 16, 1, 1), f"{FIRST}.lora_up.weight": (16, 2, 1, 1)},
        "to_q is",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_files_other_than_a_plain_lora_for_this_model_are_refused(kind: str, tmp_path: Path) -> None:
    shapes, pattern = REFUSED[kind]
    unet, path = tiny_unet(), tmp_path / "lora.safetensors"
    save_file({key: torch.ones(shape) for key, shape in shapes.items()}, path)
    with pytest.raises(ValueError, match=pattern) as caught:
        lora_file.read(path, unet, None)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


PLAIN = {f"{FIRST}.lora_down.weight": torch.ones(2, 16), f"{FIRST}.lora_up.weight": torch.ones(16, 2)}
MALFORMED: dict[str, tuple[dict[str, Tensor], str | None, str]] = {  # tensors, metadata of peft, message
    "no tensors": ({}, None, "there is no LoRA in the file"),
    "embedding alone": ({"bundle_emb.x.y": torch.ones(2)}, None, "there is no LoRA in the file"),
    "two alphas": (PLAIN | {f"{FIRST}.alpha": torch.ones(2)}, None, r"alpha is F32 \[2\]"),
    "no alpha": (PLAIN | {f"{FIRST}.alpha": torch.ones(0)}, None, r"alpha is F32 \[0\]"),
    "complex alpha": (PLAIN | {f"{FIRST}.alpha": torch.tensor(1j)}, None, "alpha is C64"),
    "alpha that is no number": (PLAIN | {f"{FIRST}.alpha": torch.tensor(torch.nan)}, None, "alpha is nan"),
    "infinite alpha": (PLAIN | {f"{FIRST}.alpha": torch.tensor(torch.inf)}, None, "alpha is inf"),
    "huge alpha": (PLAIN | {f"{FIRST}.alpha": torch.tensor(1e30)}, None, r"alpha is 1e\+30"),
    "numbers that are not": ({key: x / 0 for key, x in PLAIN.items()}, None, "that are not finite"),
    "integers": ({key: x.to(torch.int8) for key, x in PLAIN.items()}, None, "is I8: only floating point"),
    "complex": ({key: x * 1j for key, x in PLAIN.items()}, None, "is C64: only floating point"),
    "a bias of peft": (
        PLAIN | {"conv_in.lora_B.bias": torch.ones(2)},
        None,
        "has a tensor conv_in.lora_B.bias",
    ),
    "a module that peft saved": (
        PLAIN | {"conv_in.weight": torch.ones(2)},
        None,
        "has a tensor conv_in.weight",
    ),
    "packed": (
        {key: x.to(torch.uint8).view(torch.float4_e2m1fn_x2) for key, x in PLAIN.items()},
        None,
        "is F4: only floating point",
    ),
    "metadata: a list": (PLAIN, "[1, 2]", "is not a JSON object"),
    "metadata: a number": (PLAIN, "3", "is not a JSON object"),
    "metadata: deep": (PLAIN, "[" * 100_000, "nested too deep"),
    "metadata: broken": (PLAIN, "{", "is not valid JSON"),
    "metadata: alpha": (PLAIN, '{"unet.lora_alpha": "x"}', "lora_alpha = 'x'"),
    "metadata: PiSSA": (PLAIN, '{"unet.init_lora_weights": "pissa"}', "init_lora_weights = 'pissa'"),
    "SDXL, text encoders": ({f"lora_te2_x.{name}": x for name, x in PLAIN.items()}, None, "a LoRA for SDXL"),
    "SDXL, keys of LDM": (
        {"lora_unet_input_blocks_4_1_proj_in.alpha": torch.ones(())},
        None,
        "a LoRA for SDXL",
    ),
    "SDXL, diffusers": (
        {
            "unet.down_blocks.2.attentions.0.transformer_blocks.9.attn1.to_q.lora_A.weight": torch.ones(
                2, 1280
            )
        },
        None,
        "a LoRA for SDXL",
    ),
    "Flux": (
        {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 2)},
        None,
        "for Flux",
    ),
    "VAE": ({"lora_vae_encoder_conv_in.lora_down.weight": torch.ones(2, 3)}, None, "a LoRA of a VAE"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_files_are_refused(kind: str, tmp_path: Path) -> None:
    tensors, metadata, message = MALFORMED[kind]
    path, unet = tmp_path / "lora.safetensors", tiny_unet()
    save_file(tensors, path, {"lora_adapter_metadata": metadata} if metadata else None)
    with pytest.raises(ValueError, match=message) as caught:
        lora_file.read(path, unet, None)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [lambda x: x[:-9], lambda x: x[:20], lambda x: b""])
def test_damaged_files_are_refused(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    unet, path = tiny_unet(), tmp_path / "lora.safetensors"
    lora_file.write(LoRA(random_factors(unet, ATTENTION, 16), {}), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="is truncated or not a safetensors file") as caught:
        lora_file.read(path, unet, None)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="there is no file .*absent.safetensors"):
        lora_file.read(tmp_path / "absent.safetensors", unet, None)


def test_a_lora_fits_only_the_networks_whose_layers_it_names(models: Models) -> None:
    unet = tiny_unet()
    entries = random_factors(unet, ATTENTION, 17)
    text_entries = random_factors(models.text_encoder, ("_proj",), 17)
    lora_file.check_fit(LoRA(entries, text_entries), unet, models.text_encoder)
    lora_file.check_fit(LoRA(entries, {}), unet, None)
    lora_file.check_fit(NO_LORA, unet, None)
    with pytest.raises(ValueError, match="does not fit the UNet: .* is "):
        lora_file.check_fit(LoRA(random_factors(models.unet, ATTENTION, 17), {}), unet, models.text_encoder)
    with pytest.raises(ValueError, match="does not fit the text encoder: layer .* does not exist"):
        lora_file.check_fit(LoRA(entries, text_entries), unet, None)
