"""Loading: every file that people have gives the same model, every other file one clear sentence."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from support import checkpoints
from support.checkpoints import Tensors
from torch import Tensor
from transformers import CLIPTextModel

from minidrag.networks.vae import VAEConfig
from minidrag.weights import model as weights
from minidrag.weights.checkpoint import find_part
from minidrag.weights.keys import text_keys, unet_keys, vae_keys
from minidrag.weights.model import Model, load_model

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
    """A copy to change."""
    return Path(shutil.copytree(clean, tmp_path / "model"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single files tell no sizes: takes them to be those of the small models."""
    monkeypatch.setattr(weights, "SINGLE_FILE", checkpoints.SMALL)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here may ask the hub: one that does fails, whatever the loader makes of exceptions."""
    monkeypatch.setattr(
        "minidrag.weights.hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub")
    )


# --- folders ---


def test_folder_as_saved_today_equals_the_reference_libraries(clean: Path) -> None:
    model, double = load(clean), torch.float64
    with torch.no_grad():
        encoder = CLIPTextModel.from_pretrained(clean / "text_encoder").to(double)
        text = encoder(model.tokenizer(["a cat", ""])).last_hidden_state
        latent = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(double)
        noise = UNet2DConditionModel.from_pretrained(clean / "unet").to(double)(latent, 681, text).sample
        vae = AutoencoderKL.from_pretrained(clean / "vae").to(double)
        picture = vae.decode(latent / 0.18215).sample
        moments = vae.encode(picture).latent_dist
    reference = {"text": text, "noise": noise, "picture": picture}
    reference |= {"mean": moments.mean * 0.18215, "deviation": moments.std * 0.18215}
    for name, value in checkpoints.outputs(load(clean, dtype=double)).items():
        torch.testing.assert_close(value, reference[name], atol=1e-9, rtol=0)
    assert (model.device.type, model.dtype, model.source) == ("cpu", torch.float32, str(clean))
    assert not any(p.requires_grad for p in model.unet.parameters())
    assert model.schedule.steps_offset == 1 and model.prediction == "epsilon" and not model.is_sd1


def test_the_small_model_goes_by_its_name() -> None:
    named, folder = load_model("tiny", device="cpu"), load_model(weights.TINY, device="cpu")
    assert named.source == folder.source == str(weights.TINY)
    assert torch.equal(named.unet.conv_in.weight, folder.unet.conv_in.weight)


def wrong_positions(text: Tensors) -> Tensors:
    ids = checkpoints.position_ids().float()
    ids[0, 76] = 75.99
    return text | {"text_model.embeddings.position_ids": ids}


def whole_clip(text: Tensors) -> Tensors:
    """A file of both halves of CLIP."""
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
    "both halves of CLIP": whole_clip,
}


@pytest.mark.parametrize("kind", TEXT_FILES)
def test_text_encoder_spellings(
    folder: Path, tensors: dict[str, Tensors], expected: Tensors, kind: str
) -> None:
    checkpoints.write(folder / checkpoints.FILES["text_encoder"], TEXT_FILES[kind](tensors["text_encoder"]))
    assert checkpoints.same(checkpoints.outputs(load(folder)), expected)


def test_legacy_vae_names(folder: Path, tensors: dict[str, Tensors], expected: Tensors) -> None:
    checkpoints.write(folder / checkpoints.FILES["vae"], checkpoints.legacy_vae(tensors["vae"]))
    assert checkpoints.same(checkpoints.outputs(load(folder)), expected)


def test_surplus_clip_layers_are_left_out(folder: Path, tensors: dict[str, Tensors]) -> None:
    config = folder / "text_encoder/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 2}))
    surplus = checkpoints.outputs(load(folder))
    kept = {key: t for key, t in tensors["text_encoder"].items() if ".layers.2." not in key}
    assert len(kept) == len(tensors["text_encoder"]) - 16
    checkpoints.write(folder / checkpoints.FILES["text_encoder"], kept)
    assert checkpoints.same(checkpoints.outputs(load(folder)), surplus)


def test_minimal_configs_mean_what_the_official_ones_leave_out(folder: Path, expected: Tensors) -> None:
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


def test_fp16_under_plain_names_or_as_variant(folder: Path, tensors: dict[str, Tensors]) -> None:
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
    """Headers of 2022 were not padded; the hub's cache is made of links."""
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


def test_models_of_one_file_share_nothing(clean: Path) -> None:
    first, second = load(clean), load(clean)
    first.unet.conv_in.weight.add_(1)
    assert not torch.equal(first.unet.conv_in.weight, second.unet.conv_in.weight)
    assert torch.equal(load(clean).unet.conv_in.weight, second.unet.conv_in.weight)


def test_sd2_folder(folder: Path) -> None:
    """Linear projections, its own head counts, pad token 0, a scheduler for another prediction."""
    torch.manual_seed(0)
    config = checkpoints.without_labels(checkpoints.UNETS["SD 2.1"]) | {"cross_attention_dim": 20}
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
    """As in the time of NAI and Anything: no text_model."""
    return {key.replace("transformer.text_model.", "transformer."): t for key, t in checkpoint.items()}


def community(checkpoint: Tensors) -> Tensors:
    """No schedule buffers, float32 position_ids with a wrong one, an EMA that is not whole."""
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
def test_mixed_dtypes_are_cast_one_by_one(folder: Path, tensors: dict[str, Tensors]) -> None:
    mixed = {name: checkpoints.half_mixed(part) for name, part in tensors.items()}
    for name, file in checkpoints.FILES.items():
        checkpoints.write(folder / file, mixed[name])
    file = checkpoints.write(folder / "model.safetensors", checkpoints.emaonly(mixed))
    model = load(file)
    assert {p.dtype for p in model.unet.parameters()} == {torch.float32}
    assert checkpoints.same(checkpoints.outputs(model), checkpoints.outputs(load(folder)))


@pytest.mark.usefixtures("small")
def test_metadata_is_optional_and_harmless(
    folder: Path, tensors: dict[str, Tensors], expected: Tensors
) -> None:
    file = folder / "model.safetensors"
    for metadata in (None, {"format": "pt"}, {"modelspec.title": "x", "format": "tf"}):
        save_file({k: t.contiguous() for k, t in checkpoints.emaonly(tensors).items()}, file, metadata)
        assert checkpoints.same(checkpoints.outputs(load(file)), expected)


@pytest.mark.usefixtures("small")
def test_where_the_tokenizer_of_a_single_file_is_found(
    tmp_path: Path, clean: Path, tensors: dict[str, Tensors], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = checkpoints.write(tmp_path / "a" / "model.safetensors", checkpoints.emaonly(tensors))
    asked = []

    def answer(repository: str, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append((repository, allow_patterns[:2]))
        return str(clean)

    monkeypatch.setattr("minidrag.weights.hub.snapshot_download", answer)
    assert load(file).tokenizer("a").shape == (1, 77)
    assert asked == [(weights.DEFAULT, ["tokenizer/vocab.json", "tokenizer/merges.txt"])]
    for given in (clean, clean / "tokenizer"):
        assert load_model(file, tokenizer=given, device="cpu").tokenizer("a").shape == (1, 77)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(clean / "tokenizer" / name, file.parent)
    assert load(file).tokenizer("a").shape == (1, 77)
    assert len(asked) == 1
    with pytest.raises(FileNotFoundError, match=r"no vocab\.json"):
        load_model(file, tokenizer=tmp_path, device="cpu")


# --- a VAE of its own ---


VAE_FILES: dict[str, Callable[[Tensors], Tensors]] = {
    "LDM, prefixed": checkpoints.ldm_vae,
    "LDM, bare, with numbers of an EMA": lambda vae: (
        checkpoints.ldm_vae(vae, "")
        | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(1)}
    ),
    "LDM, bare, with what only training needs": lambda vae: (
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
    assert not torch.equal(checkpoints.outputs(load(folder))["picture"], expected["picture"])
    file = checkpoints.write(folder / "vae.safetensors", VAE_FILES[kind](tensors["vae"]))
    (folder / checkpoints.FILES["vae"]).unlink()  # the model's own is not needed then
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
    """Names and shapes of v1-5-pruned-emaonly."""
    names = ("unet", "vae", "text_encoder")
    tensors = {name: checkpoints.on_meta(checkpoints.listed(name)) for name in names}
    checkpoint = checkpoints.emaonly(tensors)
    text = {key: checkpoint.pop(key) for key in list(checkpoint) if "text_model." in key}
    return checkpoint | {key.replace(TEXT_PREFIX, text_prefix): tensor for key, tensor in text.items()}


def test_full_size_names_and_shapes_in_every_spelling() -> None:
    """686, 248 and 196 tensors: each rule meets each name of the real files."""
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


def test_the_vae_is_renamed_in_its_attention_alone() -> None:
    other = ["encoder.key.weight", "query.weight", "decoder.up_blocks.0.attentions.0.value.weight"]
    assert vae_keys(other) == {key: key for key in other}


def test_full_size_ema_names_are_unique() -> None:
    checkpoint = full_size()
    plain = [key for key in checkpoint if key.startswith("model.diffusion_model.")]
    flat = {"model_ema." + key[len("model.") :].replace(".", "") for key in plain}
    assert len(flat) == 686
    with_average = [*checkpoint, *flat]
    assert len(with_average) == 1831
    assert set(unet_keys(with_average).values()) == flat
    almost = [key for key in with_average if key != "model_ema.diffusion_modelout2bias"]
    assert not set(unet_keys(almost).values()) & flat


@pytest.mark.slow
def test_full_size_single_file(tmp_path: Path, clean: Path) -> None:
    """4.27 GB by its header, a hole on the disk; loaded as fp16, so that 2.1 GB of memory do."""
    shapes = checkpoints.shapes_of(full_size())
    file = checkpoints.write_zeros(tmp_path / "v1-5.safetensors", shapes)
    assert abs(file.stat().st_size - 4_265_146_304) < 2000
    model = load_model(file, tokenizer=clean, device="cpu", dtype=torch.float16)
    parts = (model.unet, model.vae, model.text_encoder)
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert counts == [859_520_964, 83_653_863, 123_060_480]
    assert model.is_sd1
    file.unlink()


def test_full_size_vae_file(tmp_path: Path) -> None:
    """vae-ft-mse-840000-ema-pruned.safetensors: bare LDM names, 250 tensors."""
    vae = checkpoints.ldm_vae(checkpoints.on_meta(checkpoints.listed("vae")), "")
    shapes = checkpoints.shapes_of(vae) | {"model_ema.decay": [], "model_ema.num_updates": []}
    assert len(shapes) == 250
    file = checkpoints.write_zeros(tmp_path / "vae.safetensors", shapes)
    assert len(find_part("vae", file, VAEConfig()).names) == 248


MEASURE = """
import sys, torch
from pathlib import Path
from minidrag.weights.checkpoint import fill, find_part
from minidrag.networks.vae import VAEConfig
def kilobytes(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])
part = find_part("vae", Path(sys.argv[1]), VAEConfig())
before = kilobytes("VmRSS")
network = fill(part, torch.device("cpu"), torch.float32)
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
    """The message; it must be one paragraph and come from here, not from a library below."""
    with pytest.raises(expected) as caught:
        load_model(source, vae=vae, device="cpu")
    assert type(caught.value) in (ValueError, FileNotFoundError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "cut short or no safetensors"),
    "header only in part": (lambda data: data[:1000], "cut short or no safetensors"),
    "last byte missing": (lambda data: data[:-1], "cut short or no safetensors"),
    "a web page": (lambda data: b"<!DOCTYPE html><html>not found</html>", "cut short or no safetensors"),
    "a pickle by another name": (lambda data: b"PK\x03\x04" + data, "is a pickle"),
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
    assert f"{folder} has no vocab.json" in error(FileNotFoundError, folder)
    (folder / "vae/config.json").write_text("{")
    assert "vae/config.json is not valid JSON" in error(ValueError, folder)
    (folder / "unet/config.json").write_text('{"block_out_channels": 3}')
    assert "unet/config.json" in error(ValueError, folder)


def test_folder_with_pickles_only(folder: Path) -> None:
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


def test_tensors_missing_left_over_or_of_another_shape(folder: Path, tensors: dict[str, Tensors]) -> None:
    file = folder / checkpoints.FILES["unet"]
    kept = {key: t for key, t in tensors["unet"].items() if not key.startswith("mid_block.attentions")}
    assert "26 tensors missing (mid_block.attentions.0.norm.weight, " in write_and_fail(folder, file, kept)
    more = tensors["unet"] | {"class_embedding.weight": torch.zeros(3), "x": torch.zeros(1)}
    assert "2 tensors not known (class_embedding.weight, x)" in write_and_fail(folder, file, more)
    bent = tensors["unet"] | {"conv_out.bias": torch.zeros(5)}
    message = write_and_fail(folder, file, bent)
    assert "1 tensors of another shape (conv_out.bias [5], not [4])" in message and str(file) in message


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
    "no whole checkpoint": ["conv_in.weight", "encoder.conv_in.weight"],
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_single_files_of_another_kind(tmp_path: Path, kind: str) -> None:
    file = checkpoints.write(tmp_path / "x.safetensors", {key: torch.zeros(1) for key in FOREIGN[kind]})
    message = error(ValueError, file)
    assert kind in message and str(file) in message


def test_sdxl_folder(folder: Path) -> None:
    config = folder / "unet/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"addition_embed_type": "text_time"}))
    assert "addition_embed_type" in error(ValueError, folder)


@pytest.mark.parametrize(
    "source", ["./no/model", "/no/model", "~/no model", "model.safetensors", "a/b.ckpt", "x"]
)
def test_a_path_to_nothing_is_no_hub_id(source: str) -> None:
    assert f"{source} does not exist" in error(FileNotFoundError, source)


def test_a_path_beside_something_that_exists_is_no_hub_id(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    assert "model/sd15 does not exist" in error(FileNotFoundError, "model/sd15")
    assert "does not exist" in error(FileNotFoundError, Path("owner/name"))
    assert load(Path("model")).dtype == torch.float32


def test_the_id_that_is_gone() -> None:
    assert weights.DEFAULT in error(ValueError, "runwayml/stable-diffusion-v1-5")
