"""LoRA against diffusers and peft: files in every spelling, training step for step, and coming off again."""

import json
import math
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from support.references import (
    SD15_TEXT,
    SD15_UNET,
    TEXTS,
    UNETS,
    our_text,
    our_unet,
    prompt_tokens,
    random,
    reference_text,
    reference_unet,
    same_weights,
)
from torch import Tensor, nn
from torch.func import functional_call

from minidrag.method import lora
from minidrag.method.ddim import Schedule
from minidrag.method.lora import LoRALayer
from minidrag.weights import lora_file
from minidrag.weights.lora_file import FILE_NAME, Factors, LoRA, target_layers

TINY = SD15_UNET | {
    "attention_head_dim": 2,
    "block_out_channels": [16, 24, 32, 32],
    "cross_attention_dim": 12,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
RECIPE: dict[str, Any] = {"rank": 4, "targets": "qkvo", "steps": 4, "batch": 3, "rate": 1e-2}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
DEFAULT_KOHYA = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
LOCON = (*DEFAULT_KOHYA, "conv1", "conv2", "conv_shortcut", "time_emb_proj", "samplers.0.conv")


class Models(NamedTuple):
    unet: nn.Module
    text_encoder: nn.Module
    pipeline: StableDiffusionPipeline  # diffusers', of the same weights


@pytest.fixture(scope="module")
def shared() -> Models:
    unet, reference = our_unet(UNETS["SD 1.5"]), reference_unet(UNETS["SD 1.5"])
    text_encoder, text_reference = our_text(TEXTS["quick_gelu"]), reference_text(TEXTS["quick_gelu"])
    same_weights(reference, unet, torch.float64)
    same_weights(text_reference, text_encoder, torch.float64)
    absent = dict.fromkeys(("vae", "tokenizer", "scheduler", "safety_checker", "feature_extractor"))
    pipeline = StableDiffusionPipeline(
        unet=reference, text_encoder=text_reference, requires_safety_checker=False, **absent
    )
    return Models(unet, text_encoder, pipeline)


@pytest.fixture
def models(shared: Models) -> Iterator[Models]:
    """The shared models, without a LoRA before and after."""
    yield shared
    lora.remove(shared.unet)
    lora.remove(shared.text_encoder)
    shared.pipeline.unload_lora_weights()


def tiny(dtype: torch.dtype = torch.float64) -> nn.Module:
    reference, unet = reference_unet(TINY), our_unet(TINY)
    same_weights(reference, unet, dtype)
    return unet


def made_up(
    model: nn.Module, names: tuple[str, ...], seed: int, alpha: float | None = 5.0
) -> dict[str, Factors]:
    """Random factors, of two ranks, for all layers of a model whose paths end in one of `names`."""
    generator, entries = torch.Generator().manual_seed(seed), {}
    for path, layer in target_layers(model).items():
        if path.endswith(names):
            out, inside, *size = layer.weight.shape
            rank = 3 if path.endswith("to_k") else 4
            down = torch.randn(rank, inside, *size, generator=generator) / inside
            up = torch.randn(out, rank, *[1] * len(size), generator=generator)
            entries[path] = Factors(down, up, rank if alpha is None else alpha)
    return entries


def inputs(kind: str = "SD 1.5") -> tuple[Tensor, int, Tensor]:
    return random(2, 4, 8, 6, seed=1), 681, random(2, 7, UNETS[kind]["cross_attention_dim"], seed=2)


@torch.no_grad()
def outputs(models: Models) -> tuple[Tensor, Tensor]:
    return models.unet(*inputs()).noise, models.text_encoder(prompt_tokens(120))


@torch.no_grad()
def reference_outputs(models: Models) -> tuple[Tensor, Tensor]:
    tokens = prompt_tokens(120)
    return models.pipeline.unet(*inputs()).sample, models.pipeline.text_encoder(tokens).last_hidden_state


@torch.no_grad()
def merged_outputs(models: Models, entries: dict[str, Factors]) -> Tensor:
    """Of diffusers' UNet, with the additions computed here and put into its weights."""
    weights = {}
    for path, (down, up, alpha) in entries.items():
        before = models.pipeline.unet.get_submodule(path).weight
        change = torch.einsum("or,ri->oi", up.flatten(1).double(), down.flatten(1).double())
        weights[f"{path}.weight"] = before + alpha / down.shape[0] * change.reshape(before.shape)
    return functional_call(models.pipeline.unet, weights, inputs()).sample


# ---- every spelling, written out here by hand; those that diffusers reads today are compared with it -----


def processors(path: str, word: str) -> str:
    attention, _, projection = path.removesuffix(".0").rpartition(".")
    return f"{attention}.processor.{projection}_lora.{word}.weight"


SPELLINGS: dict[str, Callable[[str, str], str]] = {
    "official DragDiffusion": lambda path, word: f"unet.unet.{path}.lora.{word}.weight",
    "old diffusers": lambda path, word: f"unet.{path}.lora.{word}.weight",
    "peft": lambda path, word: f"unet.{path}.lora_{'A' if word == 'down' else 'B'}.weight",
    "attention processors": lambda path, word: f"unet.{processors(path, word)}",
    "attention processors, bare": processors,
    "attention processors, official": lambda path, word: f"unet.unet.{processors(path, word)}",
    "bare adapter": lambda path, word: f"{path}.lora_{'A' if word == 'down' else 'B'}.weight",
    "kohya": lambda path, word: f"lora_unet_{path.replace('.', '_')}.lora_{word}.weight",
}
BY_DIFFUSERS = ("old diffusers", "peft", "attention processors", "kohya")


def spelled(entries: dict[str, Factors], spelling: str) -> dict[str, Tensor]:
    name = SPELLINGS[spelling]
    tensors = {name(path, "down"): factors.down for path, factors in entries.items()}
    return tensors | {name(path, "up"): factors.up for path, factors in entries.items()}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_files_of_every_spelling_equal_diffusers(
    spelling: str, models: Models, tmp_path: Path, compare: Callable
) -> None:
    entries = made_up(models.unet, ATTENTION, seed=3, alpha=None)
    save_file(spelled(entries, spelling), tmp_path / FILE_NAME)
    lora.attach(models.unet, lora_file.read(tmp_path, models.unet, models.text_encoder))
    ours, plain = outputs(models)[0], reference_outputs(models)[0]
    assert len(lora.lora_layers(models.unet)) == 128
    compare(f"LoRA, {spelling}: merged", ours, merged_outputs(models, entries))
    if spelling in BY_DIFFUSERS:
        models.pipeline.load_lora_weights(tmp_path, weight_name=FILE_NAME)
        compare(f"LoRA, {spelling}: diffusers", ours, reference_outputs(models)[0])
    assert (ours - plain).abs().max() > 1e-3, "the LoRA does next to nothing, so the test proves nothing"


@pytest.mark.parametrize("names", [ATTENTION, DEFAULT_KOHYA, LOCON], ids=["attention", "default", "LoCon"])
def test_kohya_files_with_alpha_and_text_encoder_equal_diffusers(
    names: tuple[str, ...], models: Models, tmp_path: Path, compare: Callable
) -> None:
    entries = made_up(models.unet, names, seed=4)
    words = made_up(models.text_encoder, ("_proj", "fc1", "fc2"), seed=5)
    tensors = spelled(entries, "kohya")
    for path, factors in words.items():
        name = f"lora_te_{path.replace('.', '_')}"
        tensors |= {f"{name}.lora_down.weight": factors.down, f"{name}.lora_up.weight": factors.up}
    for side, part in (("unet", entries), ("te", words)):
        for path, factors in part.items():
            tensors[f"lora_{side}_{path.replace('.', '_')}.alpha"] = torch.tensor(factors.alpha)
    save_file(tensors, tmp_path / "lora.safetensors")
    found = lora_file.read(tmp_path / "lora.safetensors", models.unet, models.text_encoder)
    lora.attach(models.unet, found, models.text_encoder)
    assert (len(found.unet), len(found.text_encoder)) == (len(entries), 18)
    models.pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    for name, ours, theirs in zip(("UNet", "text"), outputs(models), reference_outputs(models), strict=True):
        compare(f"LoRA, kohya with alpha: {name}", ours, theirs)


@pytest.mark.parametrize("style", ["lora_A", "lora_linear_layer", "to_q_lora"])
def test_text_encoder_spellings_of_diffusers(
    style: str, models: Models, tmp_path: Path, compare: Callable
) -> None:
    tensors = spelled(made_up(models.unet, ATTENTION, seed=6, alpha=None), "peft")
    for path, factors in made_up(models.text_encoder, ("_proj",), seed=7, alpha=None).items():
        for word, letter, tensor in (("down", "A", factors.down), ("up", "B", factors.up)):
            old = path.replace("out_proj", "to_out").replace("_proj", "")
            old = old if "to_out" in old else f"{old[:-1]}to_{old[-1]}"
            tensors[
                {
                    "lora_A": f"text_encoder.{path}.lora_{letter}.weight",
                    "lora_linear_layer": f"text_encoder.{path}.lora_linear_layer.{word}.weight",
                    "to_q_lora": f"text_encoder.{old}_lora.{word}.weight",
                }[style]
            ] = tensor
    save_file(tensors, tmp_path / FILE_NAME)
    lora.attach(models.unet, lora_file.read(tmp_path, models.unet, models.text_encoder), models.text_encoder)
    assert len(lora.lora_layers(models.text_encoder)) == 12
    models.pipeline.load_lora_weights(tmp_path, weight_name=FILE_NAME)
    for name, ours, theirs in zip(("UNet", "text"), outputs(models), reference_outputs(models), strict=True):
        compare(f"LoRA, diffusers' text encoder spellings: {name}", ours, theirs)


@pytest.mark.parametrize(
    "extra", [{}, {"use_rslora": True}, {"alpha_pattern": {"attn2.to_q": 11, "to_k": 2}}]
)
def test_alpha_that_only_peft_metadata_tell(
    extra: dict[str, Any], models: Models, tmp_path: Path, compare: Callable
) -> None:
    reference = models.pipeline.unet
    reference.add_adapter(LoraConfig(r=4, lora_alpha=7, target_modules=list(ATTENTION), **extra), "made")
    generator = torch.Generator().manual_seed(8)
    for name, weight in reference.named_parameters():
        if "lora_" in name:
            weight.requires_grad_(False).normal_(0, 0.2, generator=generator)
    reference.save_lora_adapter(tmp_path / "bare", "made")
    weights = {f"unet.{name}": x for name, x in load_file(tmp_path / "bare" / FILE_NAME).items()}
    config = {f"unet.{name}": x for name, x in reference.peft_config["made"].to_dict().items()}
    metadata = {"lora_adapter_metadata": json.dumps(config, default=sorted)}
    save_file(weights, tmp_path / FILE_NAME, metadata)
    for place in (tmp_path / "bare", tmp_path):
        lora.attach(models.unet, lora_file.read(place, models.unet, models.text_encoder))
        compare("LoRA, alpha in peft's metadata", outputs(models)[0], reference_outputs(models)[0])
        lora.remove(models.unet)


def test_layer_names_of_stable_diffusion_stay_apart_without_their_dots() -> None:
    for model in (our_unet(SD15_UNET), our_text(SD15_TEXT)):
        paths = list(target_layers(model))
        assert len({path.replace(".", "_") for path in paths}) == len(paths)


def test_kohya_default_file_for_stable_diffusion_has_264_modules() -> None:
    unet, text_encoder = our_unet(SD15_UNET), our_text(SD15_TEXT)
    assert sum(path.endswith(DEFAULT_KOHYA) for path in target_layers(unet)) == 192
    assert sum(path.endswith(("_proj", "fc1", "fc2")) for path in target_layers(text_encoder)) == 72


# ---- what is written -------------------------------------------------------------------------------------


def test_our_file_loads_in_diffusers_with_equal_output(
    models: Models, tmp_path: Path, compare: Callable
) -> None:
    made = LoRA(made_up(models.unet, LOCON, 9), made_up(models.text_encoder, ("_proj", "fc1"), 10, alpha=2.5))
    lora_file.write(made, tmp_path / FILE_NAME, {"prompt": "a boat"})
    lora.attach(models.unet, made, models.text_encoder)
    models.pipeline.load_lora_weights(tmp_path, weight_name=FILE_NAME)
    # alpha / rank is folded into up in float32
    for name, ours, theirs in zip(("UNet", "text"), outputs(models), reference_outputs(models), strict=True):
        compare(f"LoRA, written by us, alpha folded: {name}", ours, theirs, 1e-5)


def test_a_trained_lora_loads_in_diffusers_with_the_same_numbers(
    models: Models, tmp_path: Path, compare: Callable
) -> None:
    made = LoRA(made_up(models.unet, ATTENTION, 11, alpha=None), {})
    lora_file.write(made, tmp_path / FILE_NAME)
    lora.attach(models.unet, made)
    models.pipeline.unet.load_lora_adapter(tmp_path, prefix="unet", weight_name=FILE_NAME)
    compare("LoRA, written by us, alpha = rank", outputs(models)[0], reference_outputs(models)[0])


@pytest.mark.parametrize("style", ["peft", "diffusers", "kohya"])
def test_styles_come_back_as_what_they_were(style: str, models: Models, tmp_path: Path) -> None:
    made = LoRA(made_up(models.unet, LOCON, 12), made_up(models.text_encoder, ("_proj", "fc2"), 13))
    save_file(lora_file.to_keys(made, style), tmp_path / "lora.safetensors")
    found = lora_file.read(tmp_path / "lora.safetensors", models.unet, models.text_encoder)
    for before, after in ((made.unet, found.unet), (made.text_encoder, found.text_encoder)):
        assert before.keys() == after.keys()
        for path, (down, up, alpha) in before.items():
            assert torch.equal(down, after[path].down)
            scaled = after[path].up * (after[path].alpha / len(down))
            assert torch.equal(up * (alpha / len(down)), scaled), path
            assert after[path].alpha == (alpha if style == "kohya" else len(down))


def test_the_same_lora_makes_the_same_bytes_and_keeps_its_notes(tmp_path: Path) -> None:
    unet = tiny()
    made = LoRA(made_up(unet, ATTENTION, 14), {})
    notes = {str(i): f"note {i}" for i in range(9)}
    for name in ("a", "b", "c"):
        lora_file.write(made, tmp_path / name, dict(reversed(notes.items())) if name == "c" else notes)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    assert lora_file.read_notes(tmp_path / "a") == notes
    save_file(lora_file.to_keys(made, "kohya"), tmp_path / "other")
    assert lora_file.read_notes(tmp_path / "other") == {}


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "lora.safetensors").mkdir()
    with pytest.raises(OSError):
        lora_file.write(LoRA(made_up(tiny(), ATTENTION, 15), {}), tmp_path / "lora.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


@pytest.fixture
def disk_full() -> Iterator[None]:
    """The system refuses to let a file grow beyond 1 MB: to whoever writes, the same as a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("disk_full")
def test_a_full_disk_is_an_oserror_and_leaves_nothing(tmp_path: Path) -> None:
    big = Factors(torch.zeros(20_000, 16), torch.zeros(16, 20_000), 1.0)
    with pytest.raises(OSError) as caught:
        lora_file.write(LoRA({"to_q": big}, {}), tmp_path / "lora.safetensors")
    assert caught.value.filename == str(tmp_path / "lora.safetensors") and caught.value.strerror
    assert not list(tmp_path.iterdir())


# ---- what is refused ------------------------------------------------------------------------------------

FIRST = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
REFUSED = {
    "LoHa": ({f"{FIRST}.hada_w1_a": (2, 16)}, "LoHa"),
    "LoKr": ({f"{FIRST}.lokr_w1": (2, 16)}, "LoKr"),
    "Tucker": ({f"{FIRST}.lora_mid.weight": (2, 2, 3, 3)}, "Tucker"),
    "DoRA": ({f"{FIRST}.dora_scale": (16, 1)}, "DoRA"),
    "DoRA by peft": ({"unet.x.to_q.lora_magnitude_vector": (16,)}, "DoRA"),
    "bias difference": ({f"{FIRST}.diff_b": (16,)}, "weight differences"),
    "whole model": ({"model.diffusion_model.input_blocks.0.0.weight": (16, 4, 3, 3)}, "no plain LoRA"),
    "bias": ({"unet.x.to_q.lora_B.bias": (16,)}, "no plain LoRA"),
    "one half": ({f"{FIRST}.lora_down.weight": (2, 16)}, "not whole"),
    "alpha alone": ({f"{FIRST}.alpha": ()}, "not whole"),
    "rank 0": ({f"{FIRST}.lora_down.weight": (0, 16), f"{FIRST}.lora_up.weight": (16, 0)}, "not whole"),
    "a number": ({f"{FIRST}.lora_down.weight": (), f"{FIRST}.lora_up.weight": ()}, "not whole"),
    "SDXL": (
        {f"lora_te1_x{i}.lora_{word}.weight": (2, 2) for i in range(5) for word in ("down", "up")},
        "UNet: there is no lora_te1_x0, there is no lora_te1_x1, there is no lora_te1_x2, and 2 more",
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
def test_files_that_are_no_plain_lora_for_this_model_are_refused(kind: str, tmp_path: Path) -> None:
    sizes, sentence = REFUSED[kind]
    unet, path = tiny(), tmp_path / "lora.safetensors"
    save_file({name: torch.ones(size) for name, size in sizes.items()}, path)
    with pytest.raises(ValueError, match=sentence) as caught:
        lora_file.read(path, unet, None)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage", [lambda x: x[:-9], lambda x: x[:20], lambda x: b"", lambda x: b"PK\3\4" + x]
)
def test_broken_files_are_refused(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    unet, path = tiny(), tmp_path / "lora.safetensors"
    lora_file.write(LoRA(made_up(unet, ATTENTION, 16), {}), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        lora_file.read(path, unet, None)
    with pytest.raises(FileNotFoundError):
        lora_file.read(tmp_path / "absent.safetensors", unet, None)


def test_a_lora_that_does_not_fit_changes_nothing(models: Models) -> None:
    unet = tiny()
    before = list(unet.modules())
    words = made_up(models.text_encoder, ("_proj",), 17)
    with pytest.raises(ValueError, match="does not fit the UNet"):
        lora.attach(unet, LoRA(made_up(models.unet, ATTENTION, 17), {}))
    with pytest.raises(ValueError, match="does not fit the text encoder: there is no"):
        lora.attach(unet, LoRA(made_up(unet, ATTENTION, 17), words))
    with pytest.raises(ValueError, match="of rank 4 on 'kv': rank from 1, targets qk, qkv, qkvo"):
        lora.add(unet, 4, "kv", torch.Generator())
    assert list(unet.modules()) == before
    lora.add(unet, 4, "qk", torch.Generator())
    with pytest.raises(ValueError, match="wears a LoRA already"):
        lora.add(unet, 4, "qk", torch.Generator())


# ---- on and off -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("targets", "count"), [("qk", 64), ("qkv", 96), ("qkvo", 128)])
def test_an_untrained_lora_changes_nothing_and_leaves_no_trace(
    targets: str, count: int, models: Models
) -> None:
    modules, state = list(models.unet.named_modules()), models.unet.state_dict()
    before = outputs(models)[0]
    lora.add(models.unet, 4, targets, torch.Generator().manual_seed(0))
    layers = lora.lora_layers(models.unet)
    assert len(layers) == count and all(".attn" in path for path in layers)
    assert torch.equal(outputs(models)[0], before)
    lora.merge(models.unet)
    assert torch.equal(outputs(models)[0], before)
    lora.remove(models.unet)
    assert list(models.unet.named_modules()) == modules  # the very same objects under the same names
    after = models.unet.state_dict()
    assert after.keys() == state.keys() and all(after[name] is not None for name in state)
    assert all(after[name].data_ptr() == state[name].data_ptr() for name in state)
    assert torch.equal(outputs(models)[0], before)


def test_the_official_size() -> None:
    unet = our_unet(SD15_UNET)
    lora.add(unet, 16, "qkvo", torch.Generator().manual_seed(0))
    assert sum(parameter.numel() for parameter in lora.parameters(unet)) == 3_188_736


def test_initial_values() -> None:
    unet = tiny(torch.float16)
    lora.add(unet, 32, "qkvo", torch.Generator().manual_seed(0))
    layers = lora.lora_layers(unet).values()
    down = torch.cat([layer.down.flatten() for layer in layers])
    assert len(down) > 30_000 and down.dtype == torch.float32
    assert abs(down.mean().item()) < 4 / 32 / len(down) ** 0.5
    assert abs(down.std().item() * 32 - 1) < 4 / (2 * len(down)) ** 0.5
    assert all(not layer.up.any() and layer.scale == 1 and not layer.down.requires_grad for layer in layers)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_layer_keeps_its_dtype_and_the_lora_its_precision(dtype: torch.dtype, merged: bool) -> None:
    for base, x in (
        (nn.Linear(6, 5), random(2, 3, 6, seed=1, dtype=dtype)),
        (nn.Conv2d(6, 5, 3, stride=2, padding=1), random(2, 6, 7, 4, seed=1, dtype=dtype)),
    ):
        size = base.weight.shape[2:]
        factors = Factors(random(3, 6, *size, seed=2), random(5, 3, *[1] * len(size), seed=3), 1.5)
        layer = LoRALayer(base.to(dtype), factors)
        assert (
            layer.down.dtype == layer.up.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        )
        change = 0.5 * (factors.up.flatten(1) @ factors.down.flatten(1)).reshape(base.weight.shape)
        weight, bias = base.weight.detach().double() + change, base.bias.detach().double()
        wanted = functional_call(base.double(), {"weight": weight, "bias": bias}, x.double())
        base.to(dtype)
        if merged:
            layer.merge()
        found = layer(x)
        bound = {torch.float16: 2e-2, torch.bfloat16: 2e-1, torch.float32: 2e-5, torch.float64: 1e-12}[dtype]
        assert found.dtype == dtype and (found - wanted).abs().max() < bound


def test_merging_gives_equal_outputs_and_gradients(models: Models, compare: Callable) -> None:
    plain = outputs(models)[0]
    made = LoRA(made_up(models.unet, LOCON, 18), {})
    lora.attach(models.unet, made)
    latent, timestep, text = inputs()
    results = []
    for merged in (False, True):
        if merged:
            lora.merge(models.unet)
        leaf = latent.clone().requires_grad_(True)
        noise = models.unet(leaf, timestep, text).noise
        results.append((noise.detach(), *torch.autograd.grad(noise.square().sum(), leaf)))
    for name, one, other in zip(("noise", "gradient"), *results, strict=True):
        compare(f"LoRA, merged against not: {name}", one, other)
    again = lora.extract(models.unet)
    for path, factors in made.unet.items():
        assert torch.equal(again.unet[path].down.float(), factors.down) and again.unet[path].alpha == 5
    lora.remove(models.unet)
    assert torch.equal(outputs(models)[0], plain)


# ---- training -------------------------------------------------------------------------------------------


def picture(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """What `fit` is told of a picture."""
    mean, spread = random(1, 4, 12, 9, seed=20, dtype=dtype), random(1, 4, 12, 9, seed=21, dtype=dtype)
    text = random(1, 7, TINY["cross_attention_dim"], seed=22, dtype=dtype)
    return {"schedule": Schedule(), "mean": mean, "std": 0.1 * spread.exp(), "text": text}


def test_training_equals_peft_step_for_step(compare: Callable) -> None:
    """Against a loop written here, on diffusers' UNet with peft's LoRA and its gradients."""
    unet, reference = our_unet(TINY), reference_unet(TINY)
    same_weights(reference, unet, torch.float64)
    told, losses = picture(), []
    lora.fit(unet, **told, **RECIPE, seed=7, on_step=lambda step, loss: losses.append(loss))
    trained = lora.extract(unet).unet
    lora.remove(unet)

    generator = torch.Generator().manual_seed(7)
    lora.add(unet, RECIPE["rank"], RECIPE["targets"], generator)
    reference.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=list(ATTENTION)), "made")
    for path, layer in lora.lora_layers(unet).items():
        wrapped = reference.get_submodule(path)
        wrapped.lora_A["made"].weight.data = layer.down.detach().clone()
        wrapped.lora_B["made"].weight.data = layer.up.detach().clone()
    weights = [weight for name, weight in reference.named_parameters() if "lora_" in name]
    optimizer = torch.optim.AdamW(weights, lr=RECIPE["rate"], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32).square()
    share = torch.cumprod(1 - betas, 0).double()
    for step in range(RECIPE["steps"]):
        latent, times, noise = lora.draw(Schedule(), told["mean"], told["std"], RECIPE["batch"], generator)
        a = share[times][:, None, None, None]
        noisy = a**0.5 * latent + (1 - a) ** 0.5 * noise
        predicted = reference(noisy, times, told["text"].repeat(3, 1, 1)).sample
        loss = ((predicted - noise) ** 2).mean()
        assert abs(loss.item() - losses[step]) < 1e-9
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for i, (half, name) in enumerate((("lora_A", "down"), ("lora_B", "up"))):
        theirs = [getattr(reference.get_submodule(path), half)["made"].weight.flatten() for path in trained]
        ours = [factors[i].flatten() for factors in trained.values()]
        compare(f"LoRA, trained against peft: {name}", torch.cat(ours), torch.cat(theirs))


def test_the_loss_of_different_timesteps_is_the_mean_over_samples(compare: Callable) -> None:
    unet, told = tiny(), picture()
    generator = torch.Generator().manual_seed(1)
    latent, _, noise = lora.draw(told["schedule"], told["mean"], told["std"], 3, generator)
    times = [0, 500, 999]
    loss = lora.noise_loss(unet, told["schedule"], latent, torch.tensor(times), noise, told["text"])
    squares, share = [], 1.0
    levels = {}
    for t in range(1000):
        share *= 1 - (0.00085**0.5 + t / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2
        levels[t] = share
    for z, t, e in zip(latent, times, noise, strict=True):
        noisy = math.sqrt(levels[t]) * z + math.sqrt(1 - levels[t]) * e
        squares.append((unet(noisy[None], t, told["text"]).noise - e).square().flatten())
    wanted = torch.cat(squares).mean()
    assert abs(loss.item() / wanted.item() - 1) < 1e-6  # the schedule is float32


def test_every_sample_of_every_step_is_drawn_anew() -> None:
    told, generator = picture(), torch.Generator().manual_seed(2)
    draws = [lora.draw(told["schedule"], told["mean"], told["std"], 50, generator) for _ in range(40)]
    latent, times, noise = (torch.cat(x) for x in zip(*draws, strict=True))
    apart = (latent - told["mean"]) / told["std"]
    for x in (apart, noise):
        assert len(x.unique(dim=0)) == 2000 and abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02
    assert abs((apart * noise).mean()) < 0.02
    assert times.min() < 5 and times.max() > 994 and times.max() < 1000
    assert abs(times.double().mean() - 499.5) < 4 * 289 / 2000**0.5


def test_training_lowers_the_loss_and_touches_nothing_else() -> None:
    unet, told = tiny(torch.float32), picture(torch.float32)
    flags = {name: i % 2 == 0 for i, (name, _) in enumerate(unet.named_parameters())}
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(flags[name])
    parameters, before = dict(unet.named_parameters()), {k: x.clone() for k, x in unet.state_dict().items()}
    drawn = lora.draw(told["schedule"], told["mean"], told["std"], 64, torch.Generator().manual_seed(99))

    def loss() -> float:
        with torch.no_grad():
            return lora.noise_loss(unet, told["schedule"], *drawn, told["text"]).item()

    def watch(step: int, value: float) -> None:
        asking = [name for name, parameter in unet.named_parameters() if parameter.requires_grad]
        holding = [name for name, parameter in unet.named_parameters() if parameter.grad is not None]
        assert asking == holding and all(name.endswith((".down", ".up")) for name in asking)
        assert len(asking) == 2 * len(lora.lora_layers(unet))
        seen.append((step, value))

    untrained, seen = loss(), []
    made = lora.fit(unet, **told, **RECIPE | {"steps": 24, "rate": 2e-2}, on_step=watch)
    assert [step for step, _ in seen] == list(range(1, 25)) and all(math.isfinite(value) for _, value in seen)
    assert loss() < 0.95 * untrained
    assert not unet.training and not any(parameter.requires_grad for parameter in lora.parameters(unet))
    for path, factors in lora.extract(unet).unet.items():
        assert torch.equal(factors.up, made.unet[path].up) and factors.up.any(), path
    lora.remove(unet)
    assert {name: parameter.requires_grad for name, parameter in unet.named_parameters()} == flags
    assert all(parameter is parameters[name] for name, parameter in unet.named_parameters())
    assert all(torch.equal(x, before[name]) for name, x in unet.state_dict().items())
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert loss() == untrained
    lora.attach(unet, made)
    assert loss() < 0.95 * untrained


def test_training_is_the_same_for_the_same_seed_and_not_for_another() -> None:
    unet, told = tiny(torch.float32), picture(torch.float32)
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(results))  # the global generator is none of its business
        results.append(lora.fit(unet, **told, **RECIPE, seed=seed).unet)
        lora.remove(unet)
    same = [torch.equal(results[0][path].up, results[1][path].up) for path in results[0]]
    other = [torch.equal(results[0][path].up, results[2][path].up) for path in results[0]]
    assert all(same) and not any(other)


def test_training_works_where_gradients_are_off_and_with_checkpointing() -> None:
    unet, told = tiny(torch.float32), picture(torch.float32)
    with torch.no_grad():
        one = lora.fit(unet, **told, **RECIPE).unet
    lora.remove(unet)
    unet.checkpointing = True
    other = lora.fit(unet, **told, **RECIPE).unet
    assert all(torch.equal(one[path].up, other[path].up) for path in one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_a_half_precision_unet_keeps_the_lora_in_float32(dtype: torch.dtype) -> None:
    exact, half = tiny(torch.float32), tiny(torch.float32).to(dtype)
    told = picture(torch.float32)
    made = lora.fit(exact, **told, **RECIPE | {"steps": 1}).unet
    found = lora.fit(half, **told | {"text": told["text"].to(dtype)}, **RECIPE | {"steps": 1}).unet
    # Adam's first step is the sign of the gradient: of those that count, nearly all are the same.
    same = [(made[path].up.sign() == found[path].up.sign()).float().mean().item() for path in made]
    assert sum(same) / len(same) > 0.9
    assert all(factors.up.dtype == torch.float32 for factors in found.values())
    assert all(parameter.dtype == dtype for name, parameter in half.named_parameters() if "base" in name)


def test_a_loss_that_is_not_a_number_stops_training_and_says_where() -> None:
    unet, told = tiny(torch.float32), picture(torch.float32)
    modules = list(unet.modules())
    with pytest.raises(FloatingPointError, match="LoRA training: the loss is nan in step 1"):
        lora.fit(unet, **told | {"std": told["std"] * math.nan}, **RECIPE)
    assert list(unet.modules()) == modules


def test_training_that_is_interrupted_leaves_no_half_trained_lora() -> None:
    unet, told = tiny(torch.float32), picture(torch.float32)
    modules, flags = list(unet.modules()), [parameter.requires_grad for parameter in unet.parameters()]

    def stop(step: int, loss: float) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lora.fit(unet, **told, **RECIPE, on_step=stop)
    assert list(unet.modules()) == modules
    assert [parameter.requires_grad for parameter in unet.parameters()] == flags
