"""Training of the small model: learning, resuming, and the model folder it writes."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from support.command import raising
from support.elsewhere import elsewhere
from torch import Tensor, nn

from minidrag.method.ddim import Schedule
from minidrag.model import Model
from minidrag.networks.clip import CLIPConfig
from minidrag.networks.unet import UNetConfig
from minidrag.networks.vae import VAE, VAEConfig
from minidrag.tiny import folder, train
from minidrag.tiny.scenes import caption
from minidrag.tiny.train import TrainConfig, Trainer
from minidrag.weights import files
from minidrag.weights.load import load_model

SIDE = 32  # pixels of the images here; latents are 8x8
FEW = TrainConfig(vae_steps=6, vae_batch=2, scenes=24, vocab_size=520, steps=6, batch=4, save_every=2)
NAMES = ("vae_steps", "vae_batch", "scenes", "vocab_size", "steps", "batch", "save_every")
WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Networks and images small enough for a step to take milliseconds."""
    drawn = train.render
    vae = VAEConfig(block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4)
    unet = UNetConfig(layers_per_block=1, norm_num_groups=4, cross_attention_dim=16)
    unet = replace(unet, block_out_channels=(8, 8, 16, 16), heads=(1, 1, 2, 2))
    text = CLIPConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "VAE_CONFIG", vae)
        patch.setattr(train, "UNET_CONFIG", unet)
        patch.setattr(train, "TEXT_CONFIG", text)
        patch.setattr(train, "render", lambda scene: drawn(scene, SIDE))
        yield


def run(*words: object, config: TrainConfig = FEW) -> int:
    """Run the command with the settings of `config` and return its exit status."""
    options = [f"--{name.replace('_', '-')}={getattr(config, name)}" for name in NAMES]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train", *map(str, words), *options])
        return train.main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Model folder and checkpoint folder of an uninterrupted run."""
    place = tmp_path_factory.mktemp("trained")
    assert run(place / "model", "--work", place / "work") == 0
    return place / "model", place / "work"


def weights_of(model: Path) -> dict[str, bytes]:
    return {name: (model / file).read_bytes() for name, file in WEIGHTS.items()}


def assert_same(one: object, other: object) -> None:
    """Compare nested dictionaries and lists of tensors bit for bit."""
    assert type(one) is type(other)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict) and isinstance(other, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        assert one == other


# Learning


def round_trip(vae: VAE, config: TrainConfig) -> float:
    """Mean absolute error of the autoencoder on held-out scenes."""
    batch = train.render_batch(config, -32, 32)
    with torch.no_grad():
        return (vae.decode(vae.encode(batch)[0]) - batch).abs().mean().item()


def test_a_few_steps_reduce_the_autoencoder_error(tmp_path: Path) -> None:
    config = replace(FEW, vae_steps=60, vae_batch=4, vae_rate=4e-2, save_every=60)
    before = round_trip(train.train_vae(replace(config, vae_steps=0), tmp_path), config)
    after = round_trip(train.train_vae(config, tmp_path), config)
    assert after < 0.9 * before  # measured: 0.54 to 0.78 for three seeds


@pytest.mark.slow
def test_a_few_steps_reduce_the_unet_loss(tmp_path: Path) -> None:
    config = replace(FEW, steps=60, batch=8, rate=2e-2, save_every=60, scenes=64)
    torch.manual_seed(0)
    vae = VAE(train.VAE_CONFIG).requires_grad_(False)
    train.normalize_latents(vae, train.encode(vae, config, 0, 64)[0])
    clean, _ = train.encode(vae, config, -32, 32)
    draw, schedule = torch.Generator().manual_seed(1), Schedule()
    noise, timestep = torch.randn(clean.shape, generator=draw), torch.arange(15, 1000, 31)
    errors = []
    for steps in (0, config.steps):
        unet, _ = train.train_unet(replace(config, steps=steps), tmp_path, vae, None)
        text = torch.zeros(len(clean), 77, train.UNET_CONFIG.cross_attention_dim)
        with torch.no_grad():
            predicted = unet(schedule.add_noise(clean, noise, timestep), timestep, text).noise
        errors.append((predicted - noise).square().mean().item())
    assert errors[1] < 0.85 * errors[0]  # measured: 0.68 to 0.71 for three seeds


class UnitError(nn.Module):
    """UNet for latents of zeros whose prediction is off by 1 everywhere, so its loss is 1 at every level."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.timesteps: list[list[int]] = []

    def forward(self, noisy: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        self.timesteps.append(timestep.tolist())
        # Stable Diffusion's schedule by definition: linear in the square root of beta.
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        deviation = torch.from_numpy(np.sqrt(1 - np.cumprod(1 - betas))).float()
        return (noisy / deviation[timestep][:, None, None, None] + 1,)


def test_loss_weights_and_timesteps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SNR^(-1/2), SNR = alpha-bar / (1 - alpha-bar), mean 1 (arXiv 2310.08442); t^2 evenly spaced."""
    losses: list[float] = []

    def record(trainer: Trainer, loss_of: Callable[[int], Tensor], name: str) -> None:
        losses.extend(loss_of(step).item() for step in range(8))

    empty = torch.zeros(8, 4, 8, 8), torch.zeros(8, 4, 8, 8)
    monkeypatch.setattr(train, "UNet", UnitError)
    monkeypatch.setattr(train, "cached_latents", lambda *_: empty)
    monkeypatch.setattr(Trainer, "run", record)
    unet, _ = train.train_unet(FEW, tmp_path, VAE(train.VAE_CONFIG), None)
    assert isinstance(unet, UnitError)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    signal = np.cumprod(1 - betas)
    weights = (signal / (1 - signal)) ** -0.5
    expected = [np.mean(weights[timesteps] / weights.mean()) for timesteps in unet.timesteps]
    assert max(expected) > 1.05 * min(expected) and len(losses) == 8
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
    offsets = []
    for timesteps in unet.timesteps:
        offset = ((np.sort(timesteps) + 0.5) / 1000) ** 2 * FEW.batch - np.arange(FEW.batch)
        assert len(offset) == FEW.batch and np.ptp(offset) <= 0.01 and -0.01 <= offset.min() <= 1.01
        offsets.append(offset.mean())
    assert np.ptp(offsets) > 0.2


def test_normalized_latents_give_the_same_reconstruction() -> None:
    torch.manual_seed(3)
    vae, draw = VAE(train.VAE_CONFIG).double().requires_grad_(False), torch.Generator().manual_seed(4)
    with torch.no_grad():
        vae.quant_conv.weight[:4] *= torch.tensor([0.1, 1, 5, 30.0])[:, None, None, None]
        assert vae.quant_conv.bias is not None
        vae.quant_conv.bias += torch.randn(8, generator=draw)
    image = torch.rand(6, 3, 32, 32, generator=draw).double() * 2 - 1
    mean, std = vae.encode(image)
    noise = torch.randn(mean.shape, generator=draw).double()
    before = vae.decode(mean), vae.decode(mean + std * noise)
    assert mean.std((0, 2, 3)).max() > 10 * mean.std((0, 2, 3)).min()
    train.normalize_latents(vae, mean)
    mean, std = vae.encode(image)
    assert mean.mean((0, 2, 3)).abs().max() < 1e-9
    assert (mean.std((0, 2, 3)) - 1).abs().max() < 1e-9
    for one, other in zip(before, (vae.decode(mean), vae.decode(mean + std * noise)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


# Stopping and resuming


def stop_after(patch: pytest.MonkeyPatch, steps: int) -> None:
    """Raise KeyboardInterrupt in the step after the next `steps`."""
    update, remaining = Trainer.update_average, [steps]

    def counted(trainer: Trainer, decay: float) -> None:
        remaining[0] -= 1
        if remaining[0] < 0:
            raise KeyboardInterrupt
        update(trainer, decay)

    patch.setattr(Trainer, "update_average", counted)


def test_a_resumed_run_gives_the_same_weights(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted twice between checkpoints: while training the autoencoder, and the UNet."""
    out, work = tmp_path / "model", tmp_path / "work"
    for steps, file, done in ((3, "vae.pt", 2), (4 + 5, "unet.pt", 4)):
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, steps)
            assert run(out, "--work", work) == 130
        assert str(work) in capsys.readouterr().err and not out.exists()
        assert torch.load(work / file, weights_only=True)["done"] == done
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)  # the last two steps
        assert run(out, "--work", work) == 0
    for file in ("vae.pt", "unet.pt", "latents.pt"):
        assert_same(*(torch.load(place / file, weights_only=True) for place in (work, trained[1])))
    assert weights_of(out) == weights_of(trained[0])


# Output


def test_the_folder_loads_and_holds_the_ema_weights(trained: tuple[Path, Path]) -> None:
    model, state = load_model(trained[0], device="cpu"), torch.load(trained[1] / "unet.pt", weights_only=True)
    assert (
        model.unet.config == replace(train.UNET_CONFIG, sample_size=32)
        and model.vae.config == train.VAE_CONFIG
    )
    assert model.schedule == Schedule() and model.prediction == "epsilon"
    for name, network in (("unet", model.unet), ("text_encoder", model.text_encoder)):
        for key, value in network.state_dict().items():
            average, last = (state[which][f"{name}.{key}"] for which in ("average", "networks"))
            assert torch.equal(value, average.half().float()), key
            assert not torch.equal(last, average) or not last.any(), key
    scene = next(train.scenes(FEW, 0, 1))
    assert model.encode_text(caption(scene)).isfinite().all()
    made = json.loads((trained[0] / "training.json").read_text())
    assert made["steps"] == FEW.steps and made["seed"] == 0 and made["hours"] > 0
    assert not trained[0].with_name("model.part").exists()


def test_diffusers_loads_the_folder(trained: tuple[Path, Path]) -> None:
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(trained[0]).to(torch.float32)
    model = load_model(trained[0], device="cpu")
    draw = torch.Generator().manual_seed(2)
    latent = torch.randn(2, 4, 8, 8, generator=draw)
    prompts = ["a red ball on the left, on grass, at dusk", ""]
    tokens = model.tokenizer(prompts)
    options = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
    assert torch.equal(pipe.tokenizer(prompts, **options).input_ids, tokens)
    with torch.no_grad():
        text = model.text_encoder(tokens)
        torch.testing.assert_close(pipe.text_encoder(tokens)[0], text, rtol=0, atol=1e-5)
        noise = pipe.unet(latent, 500, text).sample
        torch.testing.assert_close(noise, model.unet(latent, 500, text).noise, rtol=0, atol=1e-5)
        image = pipe.vae.decode(latent / pipe.vae.config.scaling_factor).sample
        torch.testing.assert_close(image, model.vae.decode(latent), rtol=0, atol=1e-5)
    assert pipe.scheduler.config.steps_offset == 1 and pipe.scheduler.config.clip_sample is False


def test_fine_tuning_keeps_the_autoencoder_and_starts_from_the_given_unet(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    start, before = trained[0], weights_of(trained[0])
    for steps in (0, 3):
        out, work = tmp_path / f"{steps}", tmp_path / f"work-{steps}"
        config = replace(FEW, steps=steps)
        assert run(out, "--work", work, "--start", start, config=config) == 0
        after = weights_of(out)
        assert after["vae"] == before["vae"]
        for name in ("unet", "text_encoder"):
            assert (after[name] == before[name]) == (steps == 0)
        for file in ("vocab.json", "merges.txt"):
            assert (out / "tokenizer" / file).read_bytes() == (start / "tokenizer" / file).read_bytes()
        assert not (work / "vae.pt").exists()
        assert json.loads((out / "training.json").read_text())["start"] == str(start)
    assert weights_of(start) == before


@pytest.mark.parametrize("name", ["model", "letters", "file"])
def test_nothing_is_overwritten(trained: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    model, out = load_model(trained[0], device="cpu"), tmp_path / name
    if name == "model":
        shutil.copytree(trained[0], out)
    elif name == "letters":
        out.mkdir()
        (out / "letter.txt").write_text("dear reader")
    else:
        out.write_text("dear reader")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match=f"{name} exists already: give another folder, or delete it"):
        write(model, out, trained[1])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def write(model: Model, out: Path, work: Path) -> None:
    folder.write(out, model.unet, model.vae, model.text_encoder, work / "tokenizer", {})


# Errors


def refused(capsys: pytest.CaptureFixture[str], *words: object, config: TrainConfig = FEW) -> str:
    """Run a command that must fail and return its error message."""
    capsys.readouterr()
    assert run(*words, config=config) == 2
    message = capsys.readouterr().err
    assert message.splitlines()[-1].startswith("minidrag: ") and "Traceback" not in message
    return message.splitlines()[-1]


@pytest.mark.parametrize("kept", [0, 100, 0.5])
@pytest.mark.parametrize("name", ["vae.pt", "unet.pt", "latents.pt", "settings.json"])
def test_the_error_names_a_broken_checkpoint(
    name: str, kept: float, trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, out = tmp_path / "work", tmp_path / "model"
    shutil.copytree(trained[1], work)
    if name == "latents.pt":
        (work / "unet.pt").unlink()  # otherwise nothing reads the latents
    whole = (work / name).read_bytes()
    (work / name).write_bytes(whole[: int(kept * len(whole)) if kept < 1 else int(kept)])
    message = refused(capsys, out, "--work", work)
    assert str(work / name) in message and "delete " in message
    assert not out.exists()


@pytest.mark.parametrize("place", ["x" * 300, "file/model"])
def test_a_folder_that_cannot_be_made_is_refused_before_the_training(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert place.partition("/")[0] in refused(capsys, tmp_path / place, "--work", tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path: Path) -> None:
    layer = nn.Linear(1, 1)
    trainer = train.Trainer(nn.ModuleDict({"x": layer}), 0.1, 3, TrainConfig(), tmp_path / "x.pt")
    with pytest.raises(FloatingPointError, match="the loss of the UNet became nan: try a smaller rate"):
        trainer.run(lambda step: layer.weight.sum() * float("nan"), "UNet")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("done", ["x", None, [1]])
def test_the_error_names_a_checkpoint_with_damaged_numbers(
    done: Any, trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    shutil.copytree(trained[1], work)
    state = torch.load(work / "vae.pt", weights_only=True)
    torch.save(state | {"done": done}, work / "vae.pt")
    assert str(work / "vae.pt") in refused(capsys, tmp_path / "model", "--work", work)


def test_the_error_names_a_checkpoint_of_other_networks(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    work = tmp_path / "work"
    shutil.copytree(trained[1], work)
    monkeypatch.setattr(train, "VAE_CONFIG", replace(train.VAE_CONFIG, layers_per_block=2))
    assert str(work / "vae.pt") in refused(capsys, tmp_path / "model", "--work", work)


def test_missing_checkpoints_are_created_again(trained: tuple[Path, Path], tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "model"
    shutil.copytree(trained[1], work)
    for name in ("unet.pt", "latents.pt"):
        (work / name).unlink()
    assert run(out, "--work", work) == 0
    assert weights_of(out) == weights_of(trained[0])


def test_a_run_with_other_settings_is_not_touched(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained[1].iterdir()}
    message = refused(capsys, tmp_path / "model", "--work", trained[1], config=replace(FEW, batch=5))
    assert str(trained[1]) in message and "--work" in message
    assert {path: path.stat().st_mtime_ns for path in trained[1].iterdir()} == before


def test_a_missing_start_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, tmp_path / "model", "--work", tmp_path / "work", "--start", tmp_path / "none")
    assert str(tmp_path / "none") in message and "does not exist" in message
    assert list(tmp_path.iterdir()) == []


def test_other_folders_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error comes before any training."""
    (tmp_path / "letter.txt").write_text("dear reader")
    message = refused(capsys, tmp_path, "--work", tmp_path / "work")
    assert str(tmp_path) in message
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


HUGE = 10**18
IMPOSSIBLE = {  # setting -> values that are refused
    **dict.fromkeys(("vae_steps", "steps"), (-1, HUGE)),
    **dict.fromkeys(("vae_batch", "batch", "scenes", "save_every", "vocab_size"), (0, -1, HUGE)),
    **dict.fromkeys(("vae_rate", "rate", "kl_weight"), (-1, "nan", "inf")),
    **dict.fromkeys(("empty_captions", "ema"), (-0.1, 1.1, "nan", "inf")),
    "seed": (-1, HUGE),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_settings_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in IMPOSSIBLE[name]:
        words = ["train", str(tmp_path / "model"), "--work", str(tmp_path / "work")]
        monkeypatch.setattr(sys, "argv", [*words, f"--{name.replace('_', '-')}={value}"])
        assert train.main() == 2
        assert capsys.readouterr().err.startswith(f"minidrag: {name} must be at ")
    assert list(tmp_path.iterdir()) == []


def test_every_setting_has_bounds() -> None:
    assert train.BOUNDS.keys() | {"device"} == TrainConfig.__dataclass_fields__.keys()


def test_checkpoints_are_not_written_among_other_files(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(trained[0], tmp_path / "model"))
    before = {path: path.stat().st_mtime_ns for path in model.rglob("*")}
    assert "not results of this command" in refused(capsys, tmp_path / "out", "--work", model)
    assert "not results of this command" in refused(
        capsys, tmp_path / "out", "--work", model, "--start", model
    )
    assert "exists already" in refused(capsys, model, "--work", tmp_path / "work", "--start", model)
    for work in (tmp_path / "new", tmp_path / "new/work"):
        assert "would be part of the model" in refused(capsys, tmp_path / "new", "--work", work)
    assert {path: path.stat().st_mtime_ns for path in model.rglob("*")} == before
    assert list(tmp_path.iterdir()) == [model]


DISK = "No space left on device"


@pytest.mark.parametrize(
    ("module", "name", "error"),
    [
        (torch, "save", RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos")),
        (torch, "save", OSError(28, DISK)),
        (files, "save_file", SafetensorError("I/O error: No space left on device")),
        (files, "save_file", OSError(28, DISK)),
        (folder, "write_json", OSError(28, DISK)),
    ],
)
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(
    module: Any, name: str, error: Exception, trained: tuple[Path, Path], tmp_path: Path, capsys: Any
) -> None:
    work = (
        Path(shutil.copytree(trained[1], tmp_path / "work"))
        if module in (files, folder)
        else tmp_path / "work"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, raising(error))
        message = refused(capsys, tmp_path / "model", "--work", work)
    assert DISK in message or "cannot be written, perhaps as the disk is full" in message
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
    assert not [path for path in work.rglob("*") if ".part" in path.name]
    assert run(tmp_path / "model", "--work", work) == 0
    assert weights_of(tmp_path / "model") == weights_of(trained[0])


def test_out_of_memory_names_what_needs_less(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "render_batch", raising(RuntimeError("CUDA out of memory. Tried to allocate")))
        message = refused(capsys, tmp_path / "model", "--work", tmp_path / "work")
    assert message == "minidrag: out of memory: try a smaller --batch or --vae-batch"


@pytest.mark.parametrize("name", ["vae.pt", "settings.json"])
def test_checkpoints_that_are_not_files(
    name: str, trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = Path(shutil.copytree(trained[1], tmp_path / "work"))
    (work / name).unlink()
    os.mkfifo(work / name)
    assert "is not a regular file" in refused(capsys, tmp_path / "model", "--work", work)


@pytest.mark.slow
def test_training_on_another_device_gives_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "autocast", lambda config: nullcontext())  # this device has no autocast
    monkeypatch.setattr(Trainer, "save", lambda trainer: None)
    train.train(FEW, tmp_path / "here", tmp_path / "work")
    with elsewhere() as device:
        train.train(replace(FEW, device=device), tmp_path / "there", tmp_path / "other work")
    here, there = (load_model(tmp_path / name, device="cpu") for name in ("here", "there"))
    for name in WEIGHTS:
        found = getattr(there, name).state_dict()
        for key, weight in getattr(here, name).state_dict().items():
            torch.testing.assert_close(found[key], weight, atol=1e-3, rtol=0)
