"""Loading: all kinds of model files give the same model, and any other file a clear error."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from support import checkpoints
from support.checkpoints import Tensors
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from minidrag.config import EditConfig
from minidrag.edit import prepare
from minidrag.model import Model
from minidrag.networks.unet import UNetConfig
from minidrag.networks.vae import VAEConfig
from minidrag.points import Pixel
from minidrag.weights import load as weights
from minidrag.weights.checkpoint import match
from minidrag.weights.files import read_header
from minidrag.weights.keys import text_keys, unet_keys, vae_keys
from minidrag.weights.load import load_model

ROWS = "text_model.embeddings.token_embedding.weight"
TEXT_PREFIX = "cond_stage_model.transformer.text_model."


def load(source: Path, vae: Path | None = None, dtype: torch.dtype = torch.float32) -> Model:
    return load_model(source, vae=vae, device="cpu", dtype=dtype)


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write_folder(tmp_path_factory.mktemp("clean") / "model")


@pytest.fixture(scope="session")
def tensors(clean: Path) -> dict[str, Tensors]:
    return checkpoints.read(clean)


@pytest.fixture(scope="session")
def expected(clean: Path) -> Tensors:
    return checkpoints.outputs(load(clean))


@pytest.fixture
def folder(clean: Path, tmp_path: Path) -> Path:
    """A copy for the test to change."""
    return Path(shutil.copytree(clean, tmp_path / "model"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Assume the sizes of the small models for single files."""
    monkeypatch.setattr(weights, "SINGLE_FILE", checkpoints.SMALL)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that accesses the hub, even if the loader catches exceptions."""
    monkeypatch.setattr(
        "minidrag.weights.hub.snapshot_download", lambda *_, **__: pytest.fail("accessed the hub")
    )


# --- folders ---


def test_folder_as_saved_today_equals_the_reference_libraries(clean: Path) -> None:
    model, double = load(clean), torch.float64
    with torch.no_grad():
        encoder: Any = CLIPTextModel.from_pretrained(clean / "text_encoder")
        text = encoder.to(double)(model.tokenizer(["a cat", ""])).last_hidden_state
        latent = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(double)
        unet: Any = UNet2DConditionModel.from_pretrained(clean / "unet")
        noise = unet.to(double)(latent, 681, text).sample
        vae: Any = AutoencoderKL.from_pretrained(clean / "vae")
        image = vae.to(double).decode(latent / 0.18215).sample
        moments = vae.encode(image).latent_dist
    reference = {"text": text, "noise": noise, "image": image}
    reference |= {"mean": moments.mean * 0.18215, "std": moments.std * 0.18215}
    for name, value in checkpoints.outputs(load(clean, dtype=double)).items():
        torch.testing.assert_close(value, reference[name], atol=1e-9, rtol=0)
    assert (model.device.type, model.dtype, model.source) == ("cpu", torch.float32, str(clean))
    assert not any(p.requires_grad for p in model.unet.parameters())
    assert model.schedule.steps_offset == 1 and model.prediction == "epsilon"


def test_tiny_names_the_small_model() -> None:
    named, folder = load_model("tiny", device="cpu"), load_model(weights.TINY, device="cpu")
    assert named.source == folder.source == str(weights.TINY)
    assert torch.equal(named.unet.conv_in.weight, folder.unet.conv_in.weight)


def wrong_positions(text: Tensors) -> Tensors:
    ids = checkpoints.position_ids().float()
    ids[0, 76] = 75.99
    return text | {"text_model.embeddings.position_ids": ids}


def whole_clip(text: Tensors) -> Tensors:
    """A file that also has CLIP's image encoder and projections."""
    other = ("vision_model.post_layernorm.weight", "visual_projection.weight", "text_projection.weight")
    return text | {name: torch.ones(4) for name in other} | {"logit_scale": torch.tensor(4.6)}


TEXT_FILES: dict[str, Callable[[Tensors], Tensors]] = {
    "official: text_model. and int64 position_ids": lambda text: (
        text | {"text_model.embeddings.position_ids": checkpoints.position_ids()}
    ),
    "without text_model.": lambda text: {key.removeprefix("text_model."): t for key, t in text.items()},
    "without text_model., with position_ids": lambda text: (
        {key.removeprefix("text_model."): t for key, t in text.items()}
        | {"embeddings.position_ids": checkpoints.position_ids()}
    ),
    "float position_ids, one of them wrong": wrong_positions,
    "all of CLIP": whole_clip,
}


@pytest.mark.parametrize("kind", TEXT_FILES)
def test_text_encoder_keys(folder: Path, tensors: dict[str, Tensors], expected: Tensors, kind: str) -> None:
    checkpoints.write(folder / checkpoints.FILES["text_encoder"], TEXT_FILES[kind](tensors["text_encoder"]))
    assert checkpoints.same(checkpoints.outputs(load(folder)), expected)


def test_legacy_vae_keys(folder: Path, tensors: dict[str, Tensors], expected: Tensors) -> None:
    checkpoints.write(folder / checkpoints.FILES["vae"], checkpoints.legacy_vae(tensors["vae"]))
    assert checkpoints.same(checkpoints.outputs(load(folder)), expected)


def test_extra_clip_layers_are_ignored(folder: Path, tensors: dict[str, Tensors]) -> None:
    config = folder / "text_encoder/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 2}))
    two_layers = checkpoints.outputs(load(folder))
    kept = {key: t for key, t in tensors["text_encoder"].items() if ".layers.2." not in key}
    assert len(kept) == len(tensors["text_encoder"]) - 16
    checkpoints.write(folder / checkpoints.FILES["text_encoder"], kept)
    assert checkpoints.same(checkpoints.outputs(load(folder)), two_layers)


def test_keys_that_the_official_configs_lack_are_optional(folder: Path, expected: Tensors) -> None:
    small = {"unet": checkpoints.UNET, "vae": checkpoints.VAE, "text_encoder": checkpoints.TEXT}
    for name, config in small.items():
        assert len(config) < len(json.loads((folder / name / "config.json").read_text()))
        (folder / name / "config.json").write_text(json.dumps(config))
    shutil.rmtree(folder / "scheduler")
    assert checkpoints.same(checkpoints.outputs(load(folder)), expected)


def rounded(tensors: dict[str, Tensors], folder: Path, infix: str) -> None:
    for name, file in checkpoints.FILES.items():
        half = {key: tensor.half() for key, tensor in tensors[name].items()}
        (folder / file).unlink()
        checkpoints.write(folder / file.replace(".safetensors", f"{infix}.safetensors"), half)


def test_fp16_files_with_and_without_an_infix(folder: Path, tensors: dict[str, Tensors]) -> None:
    rounded(tensors, folder, "")
    plain = checkpoints.outputs(load(folder))
    assert plain["noise"].dtype == torch.float32
    for file in checkpoints.FILES.values():
        (folder / file).rename(folder / file.replace(".safetensors", ".fp16.safetensors"))
    assert checkpoints.same(checkpoints.outputs(load(folder)), plain)
    model = load(folder, dtype=torch.float16)
    assert {p.dtype for p in model.unet.parameters()} == {torch.float16}


def test_the_variant_is_chosen_by_dtype(folder: Path, tensors: dict[str, Tensors], expected: Tensors) -> None:
    for name, file in checkpoints.FILES.items():
        ones = {key: torch.ones_like(tensor).half() for key, tensor in tensors[name].items()}
        checkpoints.write(folder / file.replace(".safetensors", ".fp16.safetensors"), ones)
    assert checkpoints.same(checkpoints.outputs(load(folder)), expected)
    assert load(folder, dtype=torch.float64).unet.conv_in.weight.unique().numel() > 1
    for dtype in (torch.float16, torch.bfloat16):
        assert load(folder, dtype=dtype).unet.conv_in.weight.unique().tolist() == [1]


def test_odd_header_lengths_and_links(folder: Path, expected: Tensors) -> None:
    """Headers were not padded in 2022; the hub's cache consists of links."""
    for i, file in enumerate(checkpoints.FILES.values()):
        data = (folder / file).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + length] + b" " * (i + 1)
        blob = folder / f"blob{i}"
        blob.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
        (folder / file).unlink()
        (folder / file).symlink_to(blob)
    model = load(folder)
    assert all(p.data_ptr() % 4 == 0 for p in model.unet.parameters())
    assert checkpoints.same(checkpoints.outputs(model), expected)


def test_models_from_one_file_share_no_memory(clean: Path) -> None:
    first, second = load(clean), load(clean)
    first.unet.conv_in.weight.add_(1)
    assert not torch.equal(first.unet.conv_in.weight, second.unet.conv_in.weight)
    assert torch.equal(load(clean).unet.conv_in.weight, second.unet.conv_in.weight)


def test_sd2_folder(folder: Path) -> None:
    """Linear projections, other head counts, another pad token, another prediction type."""
    torch.manual_seed(0)
    config: dict[str, Any] = checkpoints.without_labels(checkpoints.UNETS["SD 2.1"])
    config |= {"cross_attention_dim": 20}
    unet = checkpoints.randomize(UNet2DConditionModel(**config))
    unet.save_pretrained(folder / "unet")
    scheduler = folder / "scheduler/scheduler_config.json"
    values = json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction"}
    scheduler.write_text(json.dumps(values))
    (folder / "tokenizer/special_tokens_map.json").write_text('{"pad_token": "!"}')
    (folder / "tokenizer/tokenizer_config.json").write_text('{"pad_token": "<|endoftext|>"}')
    model, latent, text = load(folder), torch.randn(1, 4, 8, 8), torch.randn(1, 77, 20)
    assert model.prediction == "v_prediction"
    vocabulary = json.loads((folder / "tokenizer/vocab.json").read_text())
    assert model.tokenizer("").tolist()[0][2:] == [vocabulary["!"]] * 75
    with torch.no_grad():
        reference = unet.eval()(latent, 261, text).sample
        torch.testing.assert_close(model.unet(latent, 261, text).noise, reference)


# --- single files ---


def without_prefix(checkpoint: Tensors) -> Tensors:
    """Keys without text_model., as in files from the time of NAI and Anything."""
    return {key.replace("transformer.text_model.", "transformer."): t for key, t in checkpoint.items()}


def community(checkpoint: Tensors) -> Tensors:
    """No schedule buffers, float32 position_ids with a wrong one, an incomplete EMA."""
    kept = {key: t for key, t in checkpoint.items() if key not in checkpoints.BUFFERS}
    ids = checkpoints.position_ids().float()
    ids[0, 76] = 75.99
    kept["cond_stage_model.transformer.text_model.embeddings.position_ids"] = ids
    return kept | {"model_ema.diffusion_modelout0weight": torch.zeros(4)}


SINGLE_FILES: dict[str, Callable[[dict[str, Tensors]], Tensors]] = {
    "v1-5-pruned-emaonly": checkpoints.emaonly,
    "v1-5-pruned, with another EMA": checkpoints.pruned,
    "without text_model.": lambda tensors: without_prefix(checkpoints.emaonly(tensors)),
    "community": lambda tensors: community(checkpoints.emaonly(tensors)),
}


@pytest.mark.parametrize("kind", SINGLE_FILES)
@pytest.mark.usefixtures("small")
def test_single_files(
    tmp_path: Path, clean: Path, tensors: dict[str, Tensors], expected: Tensors, kind: str
) -> None:
    file = checkpoints.write(tmp_path / "model.safetensors", SINGLE_FILES[kind](tensors))
    shutil.copytree(clean / "tokenizer", tmp_path / "tokenizer")
    assert checkpoints.same(checkpoints.outputs(load(file)), expected)


@pytest.mark.usefixtures("small")
def test_mixed_dtypes_are_cast_per_tensor(folder: Path, tensors: dict[str, Tensors]) -> None:
    mixed = {name: checkpoints.half_mixed(part) for name, part in tensors.items()}
    for name, file in checkpoints.FILES.items():
        checkpoints.write(folder / file, mixed[name])
    file = checkpoints.write(folder / "model.safetensors", checkpoints.emaonly(mixed))
    model = load(file)
    assert {p.dtype for p in model.unet.parameters()} == {torch.float32}
    assert checkpoints.same(checkpoints.outputs(model), checkpoints.outputs(load(folder)))


@pytest.mark.usefixtures("small")
def test_metadata_is_optional_and_ignored(
    folder: Path, tensors: dict[str, Tensors], expected: Tensors
) -> None:
    file = folder / "model.safetensors"
    for metadata in (None, {"format": "pt"}, {"modelspec.title": "x", "format": "tf"}):
        save_file({k: t.contiguous() for k, t in checkpoints.emaonly(tensors).items()}, file, metadata)
        assert checkpoints.same(checkpoints.outputs(load(file)), expected)


@pytest.mark.usefixtures("small")
def test_search_for_the_tokenizer_of_a_single_file(
    tmp_path: Path, clean: Path, tensors: dict[str, Tensors], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = checkpoints.write(tmp_path / "a" / "model.safetensors", checkpoints.emaonly(tensors))
    requests = []

    def answer(repository: str, allow_patterns: list[str], local_files_only: bool) -> str:
        requests.append((repository, allow_patterns[:2]))
        return str(clean)

    monkeypatch.setattr("minidrag.weights.hub.snapshot_download", answer)
    assert load(file).tokenizer("a").shape == (1, 77)
    assert requests == [(weights.DEFAULT, ["tokenizer/vocab.json", "tokenizer/merges.txt"])]
    for given in (clean, clean / "tokenizer"):
        assert load_model(file, tokenizer=given, device="cpu").tokenizer("a").shape == (1, 77)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(clean / "tokenizer" / name, file.parent)
    assert load(file).tokenizer("a").shape == (1, 77)
    assert len(requests) == 1
    with pytest.raises(FileNotFoundError, match=r"has a vocab\.json: copy"):
        load_model(file, tokenizer=tmp_path, device="cpu")


V_PREDICTION: dict[str, Callable[[Path, Tensors], None]] = {
    "tensor": lambda file, _: None,
    "yaml": lambda file, _: said(file, 'model:\n  params:\n    parameterization: "v"\n'),
    "yml": lambda file, _: said(file, "parameterization : 'v'  # as trained\n", ".yml"),
    "next line": lambda file, _: said(file, "parameterization:\n    v\n"),
    "flow": lambda file, _: said(file, "model: {target: x, parameterization: v}\n"),
    "metadata": lambda file, tensors: save_file(tensors, file, {"modelspec.prediction_type": "v"}),
}


def said(file: Path, text: str, suffix: str = ".yaml") -> None:
    file.with_suffix(suffix).write_text(text)


@pytest.mark.parametrize("kind", V_PREDICTION)
@pytest.mark.usefixtures("small")
def test_single_files_that_predict_v(folder: Path, tensors: dict[str, Tensors], kind: str) -> None:
    """As in a folder, the model loads, with its prediction named, and cannot be dragged with."""
    content = checkpoints.emaonly(tensors) | ({"v_pred": torch.zeros(0)} if kind == "tensor" else {})
    content = {key: tensor.contiguous() for key, tensor in content.items()}
    file = checkpoints.write(folder / "model.safetensors", content)
    V_PREDICTION[kind](file, content)
    model = load(file)
    assert model.prediction == "v_prediction"
    with pytest.raises(ValueError, match="that predicts the noise, not v_prediction"):
        prepare(model, (64, 64), [Pixel(9, 9)], [Pixel(20, 9)], None, EditConfig())


@pytest.mark.usefixtures("small")
def test_single_files_that_predict_the_noise(folder: Path, tensors: dict[str, Tensors]) -> None:
    file = checkpoints.write(folder / "model.safetensors", checkpoints.emaonly(tensors))
    texts = ['parameterization: "eps"\n', '# parameterization: "v"\nscale: 1\n', "\xff\n", ""]
    for text in [*texts, "parameterization: # v\n  eps"]:
        file.with_suffix(".yaml").write_text(text, encoding="latin-1")
        assert load(file).prediction == "epsilon"
    checkpoints.write(file, checkpoints.emaonly(tensors) | {"ztsnr": torch.zeros(0)})
    assert "rescale_betas_zero_snr = True" in error(ValueError, file)


@pytest.mark.usefixtures("small")
def test_single_files_without_a_part(folder: Path, tensors: dict[str, Tensors], expected: Tensors) -> None:
    whole, file = checkpoints.emaonly(tensors), folder / "model.safetensors"
    starts = {"VAE": "first_stage_model.", "text encoder": "cond_stage_model."}

    def write_without(*parts: str) -> None:
        absent = tuple(starts[part] for part in parts)
        checkpoints.write(file, {key: t for key, t in whole.items() if not key.startswith(absent)})

    write_without("VAE")
    assert error(ValueError, file).endswith("it has no VAE: give one with --vae")
    assert checkpoints.same(checkpoints.outputs(load(file, vae=folder)), expected)
    write_without("text encoder")
    assert "has no text encoder, so it is not a complete model" in error(ValueError, file)
    write_without("VAE", "text encoder")
    assert "has no VAE and no text encoder" in error(ValueError, file)


@pytest.mark.usefixtures("small")
def test_a_single_file_with_added_tokens(folder: Path, tensors: dict[str, Tensors]) -> None:
    """Its embedding is longer; without the tokens' names it is refused."""
    rows = torch.cat([tensors["text_encoder"][ROWS], torch.ones(2, 20)])
    more = tensors | {"text_encoder": tensors["text_encoder"] | {ROWS: rows}}
    file = checkpoints.write(folder / "model.safetensors", checkpoints.emaonly(more))
    assert "has 514 tokens, but the text encoder of" in error(ValueError, file)
    (folder / "tokenizer/added_tokens.json").write_text('{"<toy>": 514, "<toy>_1": 515}')
    model = load(file)
    assert model.tokenizer("<toy>")[0, 1:3].tolist() == [514, 515]
    assert model.encode_text("<toy>").shape == (1, 77, 20)


# --- networks that do not belong together ---


def test_added_tokens_of_a_folder_need_rows_and_rows_need_names(folder: Path) -> None:
    (folder / "tokenizer/added_tokens.json").write_text('{"<toy>": 514}')
    assert "has 515 tokens, but the text encoder of" in error(ValueError, folder)
    encoder: Any = CLIPTextModel.from_pretrained(folder / "text_encoder")
    encoder.resize_token_embeddings(515)
    encoder.save_pretrained(folder / "text_encoder")
    assert load(folder).tokenizer("<toy>")[0, 1] == 514
    (folder / "tokenizer/added_tokens.json").unlink()
    assert "has 514 tokens, but the text encoder of" in error(ValueError, folder)


def test_the_vae_of_sdxl_is_refused_by_its_scale(folder: Path, clean: Path) -> None:
    config = folder / "vae/config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"scaling_factor": 0.13025}))
    for vae in (folder, folder / "vae"):
        assert "scaling_factor = 0.13025: that is SDXL's VAE" in error(ValueError, clean, vae)
    assert "SDXL's VAE" in error(ValueError, folder)
    load(folder, vae=clean)  # instead of its own


def test_networks_of_two_models_are_refused(folder: Path) -> None:
    encoder = CLIPTextModel(CLIPTextConfig(**checkpoints.TEXT | {"hidden_size": 24}))
    encoder.save_pretrained(folder / "text_encoder")
    assert "the text encoder's vectors have 24 channels and the UNet takes 20" in error(ValueError, folder)


def test_a_folder_of_a_training_has_the_unet_alone(folder: Path) -> None:
    shutil.rmtree(folder / "vae")
    assert error(ValueError, folder).endswith("it has no VAE: give one with --vae")
    shutil.rmtree(folder / "text_encoder")
    assert "has no VAE and no text encoder" in error(ValueError, folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "diffusion_pytorch_model.non_ema.safetensors",
            "non_ema.safetensors is there: if it is",
        ),
        ("my_unet.safetensors", "my_unet.safetensors is there: if it is the unet, rename it"),
        ("model.onnx", "model.onnx is an ONNX file"),
        ("diffusion_flax_model.msgpack", "is a Flax file"),
        ("unet.gguf", "is a GGUF file"),
        ("diffusion_pytorch_model.ckpt", "has only pickles"),
    ],
)
def test_other_weight_files_in_a_folder_are_named(folder: Path, name: str, message: str) -> None:
    (folder / checkpoints.FILES["unet"]).rename(folder / "unet" / name)
    assert message in error(FileNotFoundError, folder)


# --- another VAE ---


VAE_FILES: dict[str, Callable[[Tensors], Tensors]] = {
    "LDM, prefixed": checkpoints.ldm_vae,
    "LDM, bare, with scalars of an EMA": lambda vae: (
        checkpoints.ldm_vae(vae, "")
        | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(1)}
    ),
    "LDM, bare, with the training's discriminator": lambda vae: (
        checkpoints.ldm_vae(vae, "") | {"loss.discriminator.main.0.weight": torch.zeros(3)}
    ),
    "LDM, with the prefix of later models": lambda vae: checkpoints.ldm_vae(vae, "vae."),
    "diffusers": lambda vae: vae,
    "diffusers, legacy": checkpoints.legacy_vae,
}


@pytest.mark.parametrize("kind", VAE_FILES)
@pytest.mark.usefixtures("small")
def test_vae_file(folder: Path, tensors: dict[str, Tensors], expected: Tensors, kind: str) -> None:
    other = {key: tensor * 1.5 for key, tensor in tensors["vae"].items()}
    checkpoints.write(folder / checkpoints.FILES["vae"], other)
    assert not torch.equal(checkpoints.outputs(load(folder))["image"], expected["image"])
    file = checkpoints.write(folder / "vae.safetensors", VAE_FILES[kind](tensors["vae"]))
    (folder / checkpoints.FILES["vae"]).unlink()  # with vae=, the model's own is not needed
    assert checkpoints.same(checkpoints.outputs(load(folder, vae=file)), expected)


@pytest.mark.usefixtures("small")
def test_vae_folder_model_or_checkpoint(
    folder: Path, clean: Path, tensors: dict[str, Tensors], expected: Tensors
) -> None:
    (folder / checkpoints.FILES["vae"]).write_bytes(b"")
    file = checkpoints.write(folder / "all.safetensors", checkpoints.emaonly(tensors))
    for vae in (clean / "vae", clean, file):  # sd-vae-ft-mse has its files at the root
        assert checkpoints.same(checkpoints.outputs(load(folder, vae=vae)), expected)


# --- full size ---


def full_size(text_prefix: str = TEXT_PREFIX) -> dict[str, Tensor]:
    """The keys and shapes of v1-5-pruned-emaonly."""
    names = ("unet", "vae", "text_encoder")
    tensors = {name: checkpoints.on_meta(checkpoints.listed(name)) for name in names}
    checkpoint = checkpoints.emaonly(tensors)
    text = {key: checkpoint.pop(key) for key in list(checkpoint) if "text_model." in key}
    return checkpoint | {key.replace(TEXT_PREFIX, text_prefix): tensor for key, tensor in text.items()}


def test_full_size_keys_and_shapes() -> None:
    """Apply the rules to all keys of the official files: 686, 248 and 196 tensors."""
    for prefix in (TEXT_PREFIX, "cond_stage_model.transformer."):
        checkpoint = full_size(prefix)
        assert len(checkpoint) == 1145
        for name, rule in {"unet": unet_keys, "vae": vae_keys, "text_encoder": text_keys}.items():
            wanted, found = checkpoints.listed(name), rule(checkpoint)
            assert found.keys() == wanted.keys()
            for ours, key in found.items():
                shape = list(checkpoint[key].shape)
                assert shape == wanted[ours] or shape == [*wanted[ours], 1, 1]
    for name, rule in {"unet": unet_keys, "vae": vae_keys, "text_encoder": text_keys}.items():
        assert rule(checkpoints.listed(name)) == {key: key for key in checkpoints.listed(name)}


def test_the_old_vae_keys_are_renamed_only_in_the_attention() -> None:
    other = ["encoder.key.weight", "query.weight", "decoder.up_blocks.0.attentions.0.value.weight"]
    assert vae_keys(other) == {key: key for key in other}


def test_full_size_ema_keys_are_unique() -> None:
    checkpoint = full_size()
    plain = [key for key in checkpoint if key.startswith("model.diffusion_model.")]
    flat = {"model_ema." + key[len("model.") :].replace(".", "") for key in plain}
    assert len(flat) == 686
    with_average = [*checkpoint, *flat]
    assert len(with_average) == 1831
    assert set(unet_keys(with_average).values()) == flat
    almost = [key for key in with_average if key != "model_ema.diffusion_modelout2bias"]
    assert not set(unet_keys(almost).values()) & flat


def official_size(folder: Path) -> Path:
    """Write a tokenizer with as many tokens as the official one."""
    checkpoints.write_tokenizer(folder / "tokenizer")
    vocabulary = json.loads((folder / "tokenizer/vocab.json").read_text())
    vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"] = 49406, 49407
    (folder / "tokenizer/vocab.json").write_text(json.dumps(vocabulary))
    return folder


@pytest.mark.slow
def test_full_size_single_file(tmp_path: Path) -> None:
    """A sparse file of 4.27 GB, loaded as fp16 in 2.1 GB of memory."""
    shapes = checkpoints.shapes_of(full_size())
    file = checkpoints.write_zeros(tmp_path / "v1-5.safetensors", shapes)
    assert abs(file.stat().st_size - 4_265_146_304) < 2000
    model = load_model(file, tokenizer=official_size(tmp_path), device="cpu", dtype=torch.float16)
    parts = (model.unet, model.vae, model.text_encoder)
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert counts == [859_520_964, 83_653_863, 123_060_480]
    assert model.unet.config == UNetConfig()
    file.unlink()


def test_full_size_vae_file(tmp_path: Path) -> None:
    """Like vae-ft-mse-840000-ema-pruned.safetensors: bare LDM keys, 250 tensors."""
    vae = checkpoints.ldm_vae(checkpoints.on_meta(checkpoints.listed("vae")), "")
    shapes = checkpoints.shapes_of(vae) | {"model_ema.decay": [], "model_ema.num_updates": []}
    assert len(shapes) == 250
    file = checkpoints.write_zeros(tmp_path / "vae.safetensors", shapes)
    assert len(match("vae", read_header(file), VAEConfig()).keys) == 248


MEASURE = """
import sys, torch
from pathlib import Path
from minidrag.weights.checkpoint import load_weights, match
from minidrag.weights.files import read_header
from minidrag.networks.vae import VAEConfig
def kilobytes(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])
part = match("vae", read_header(Path(sys.argv[1])), VAEConfig())
before = kilobytes("VmRSS")
network = load_weights(part, torch.device("cpu"), torch.float32)
weights = sum(p.numel() * 4 for p in network.parameters())
touched = sum(float(p.sum()) for p in network.parameters())
print((kilobytes("VmHWM") - before) * 1024 / weights)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_peak_memory(tmp_path: Path, dtype: str) -> None:
    file = checkpoints.write_zeros(tmp_path / "vae.safetensors", checkpoints.listed("vae"), dtype)
    command = [sys.executable, "-c", MEASURE, str(file)]
    environment = os.environ | {"PYTHONPATH": str(Path(weights.__file__).parents[1])}
    ratio = float(subprocess.run(command, check=True, capture_output=True, env=environment).stdout)
    assert ratio < 1.15, ratio


# --- bad input ---


def error(expected: type[Exception], source: Path | str, vae: Path | None = None) -> str:
    """The message of the error; it must be one line and raised by minidrag, not by a library."""
    with pytest.raises(expected) as caught:
        load_model(source, vae=vae, device="cpu")
    assert type(caught.value) in (ValueError, FileNotFoundError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


TRUNCATED = "truncated or not a safetensors file"
BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", TRUNCATED),
    "truncated header": (lambda data: data[:1000], TRUNCATED),
    "last byte missing": (lambda data: data[:-1], TRUNCATED),
    "a web page": (lambda data: b"<!DOCTYPE html><html>not found</html>", TRUNCATED),
    "a pickle with another suffix": (lambda data: b"PK\x03\x04" + data, "is a pickle"),
    "Git LFS pointer": (lambda data: b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_file(folder: Path, kind: str) -> None:
    change, sentence = BROKEN[kind]
    file = folder / checkpoints.FILES["vae"]
    file.write_bytes(change(file.read_bytes()))
    message = error(ValueError, folder)
    assert str(file) in message and sentence in message


@pytest.mark.parametrize("name", [*checkpoints.FILES.values(), "unet/config.json", "tokenizer/merges.txt"])
def test_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert str(folder / name) in error(FileNotFoundError, folder)


def test_missing_tokenizer_and_broken_config(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    assert f"neither {folder} nor {folder / 'tokenizer'} has a vocab.json" in error(FileNotFoundError, folder)
    (folder / "vae/config.json").write_text("{")
    assert "vae/config.json cannot be read as JSON: it is not valid JSON" in error(ValueError, folder)
    (folder / "unet/config.json").write_text('{"block_out_channels": 3}')
    assert f"{folder / 'unet/config.json'} is not usable: " in error(ValueError, folder)
    (folder / "unet/config.json").write_text('{"act_fn": "gelu"}')
    sentence = "config.json of the UNet has act_fn = 'gelu': only 'silu' is supported"
    assert error(ValueError, folder) == f"{folder / 'unet/config.json'} is not usable: {sentence}"


def test_folder_with_only_pickles(folder: Path) -> None:
    file = folder / checkpoints.FILES["unet"]
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    message = error(FileNotFoundError, folder)
    assert str(file) in message and "python -m weights_convert safetensors" in message


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".pth"])
def test_pickles_are_not_opened(tmp_path: Path, clean: Path, suffix: str) -> None:
    file = tmp_path / f"model.vae{suffix}"
    file.write_bytes(f"cos\nmkdir\n(S'{tmp_path / 'opened'}'\ntR.".encode())
    assert "python -m weights_convert safetensors" in error(ValueError, file)
    assert "python -m weights_convert safetensors" in error(ValueError, clean, vae=file)
    assert not (tmp_path / "opened").exists()


def test_missing_unexpected_and_misshapen_tensors(folder: Path, tensors: dict[str, Tensors]) -> None:
    file = folder / checkpoints.FILES["unet"]
    kept = {key: t for key, t in tensors["unet"].items() if not key.startswith("mid_block.attentions")}
    assert "missing tensors: 26 (mid_block.attentions.0.norm.weight, " in write_and_fail(folder, file, kept)
    more = tensors["unet"] | {"class_embedding.weight": torch.zeros(3), "x": torch.zeros(1)}
    assert "unexpected tensors: 2 (class_embedding.weight, x)" in write_and_fail(folder, file, more)
    bent = tensors["unet"] | {"conv_out.bias": torch.zeros(5)}
    message = write_and_fail(folder, file, bent)
    assert "wrong shapes: 1 (conv_out.bias [5], expected [4])" in message and str(file) in message


def write_and_fail(folder: Path, file: Path, tensors: Tensors) -> str:
    checkpoints.write(file, tensors)
    return error(ValueError, folder)


@pytest.mark.parametrize(("channels", "kind"), [(9, "inpainting"), (8, "InstructPix2Pix")])
@pytest.mark.usefixtures("small")
def test_unets_with_more_input_channels(
    folder: Path, tensors: dict[str, Tensors], channels: int, kind: str
) -> None:
    width = tensors["unet"]["conv_in.weight"].shape[0]
    unet = tensors["unet"] | {"conv_in.weight": torch.zeros(width, channels, 3, 3)}
    config = folder / "unet/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": channels}))
    file = checkpoints.write(folder / "model.safetensors", checkpoints.emaonly(tensors | {"unet": unet}))
    assert kind in write_and_fail(folder, folder / checkpoints.FILES["unet"], unet)
    assert kind in error(ValueError, file)


FOREIGN = {
    "SDXL": ["model.diffusion_model.label_emb.0.0.weight", "conditioner.embedders.0.transformer.x"],
    "Stable Diffusion 3": ["model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight"],
    "Stable Diffusion 2.x": ["model.diffusion_model.out.0.weight", "cond_stage_model.model.ln_final.weight"],
    "LoRA": ["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"],
    "not a complete checkpoint": ["conv_in.weight", "encoder.conv_in.weight"],
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_single_files_of_another_kind(tmp_path: Path, kind: str) -> None:
    file = checkpoints.write(tmp_path / "x.safetensors", {key: torch.zeros(1) for key in FOREIGN[kind]})
    message = error(ValueError, file)
    assert kind in message and str(file) in message


def test_sdxl_folder(folder: Path) -> None:
    config = folder / "unet/config.json"
    levels = {"block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20]}
    config.write_text(json.dumps(json.loads(config.read_text()) | levels))
    assert "only one value for each of four levels is supported" in error(ValueError, folder)


@pytest.mark.parametrize(
    "source", ["./no/model", "/no/model", "~/no model", "model.safetensors", "a/b.ckpt", "x"]
)
def test_a_missing_path_is_not_a_hub_id(source: str) -> None:
    assert f"{source} does not exist" in error(FileNotFoundError, source)


def test_a_missing_path_in_an_existing_folder_is_not_a_hub_id(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    assert "model/sd15 does not exist" in error(FileNotFoundError, "model/sd15")
    assert "does not exist" in error(FileNotFoundError, Path("owner/name"))
    assert load(Path("model")).dtype == torch.float32


def test_the_removed_repository() -> None:
    assert weights.DEFAULT in error(ValueError, "runwayml/stable-diffusion-v1-5")
