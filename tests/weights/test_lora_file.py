"""LoRA files against diffusers and peft: keys in every style, files that are written or refused."""

import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from support.loras import (
    ATTENTION,
    KOHYA,
    LOCON,
    TEXT_ENCODER,
    Models,
    build_models,
    merged_reference_noise,
    outputs,
    random_factors,
    read_notes,
    reference_outputs,
    tiny_unet,
)
from support.references import SD15_TEXT, SD15_UNET, our_text, our_unet
from torch import Tensor

from minidrag.method.lora import Factors, LoRA, target_layers
from minidrag.weights import lora_file
from minidrag.weights.lora_file import FILE_NAME

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

FIRST = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
REFUSED: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {  # shapes by key, pattern of the message
    "LoHa": ({f"{FIRST}.hada_w1_a": (2, 16)}, "LoHa"),
    "LoKr": ({f"{FIRST}.lokr_w1": (2, 16)}, "LoKr"),
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


@pytest.mark.parametrize("damage", [lambda x: x[:-9], lambda x: x[:20], lambda x: b""])
def test_damaged_files_are_refused(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    unet, path = tiny_unet(), tmp_path / "lora.safetensors"
    lora_file.write(LoRA(random_factors(unet, ATTENTION, 16), {}), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="is truncated or not a safetensors file") as caught:
        lora_file.read(path, unet, None)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
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
