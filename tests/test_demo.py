"""The command: what it writes, that runs repeat, and one sentence for everything that cannot be done."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minidrag import images, tiny
from minidrag.app import advice, runs
from minidrag.app import options as request
from minidrag.app.options import Request
from minidrag.config import EditConfig
from minidrag.networks.clip import CLIPConfig, CLIPTextEncoder
from minidrag.networks.unet import UNet, UNetConfig
from minidrag.networks.vae import VAE, VAEConfig
from minidrag.tiny import folder, vocabulary
from minidrag.tiny.picture import Scene, render
from minidrag.tiny.things import Object
from minidrag.weights import lora_file
from minidrag.weights.lora_file import Factors, LoRA
from minidrag.weights.model import load_model

ROOT = Path(__file__).parents[1]
spec = spec_from_file_location("demo", ROOT / "demo.py")
assert spec and spec.loader
demo = module_from_spec(spec)
spec.loader.exec_module(demo)

FAST = ["--steps", "4", "--inversion-steps", "3", "--lora-steps", "2", "--lora-batch", "1"]
FAST += ["--drag-steps", "2", "--size", "64", "--device", "cpu"]
DRAG = ["--drag", "30,40:48,42"]
WRITTEN = ["comparison.png", "edited.png", "lora.safetensors", "process.gif", "run.json"]
UNKNOWN_PEFT = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the shape of the one that ships, only smaller, and untrained."""
    place = tmp_path_factory.mktemp("untrained")
    torch.manual_seed(0)
    words = vocabulary.train(["a red ball on snow", "a ball"], 520, place / "tokenizer")
    widths = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    unet = {"heads": (1, 1, 2, 2), "layers_per_block": 1, "cross_attention_dim": 16, "norm_num_groups": 4}
    folder.write(
        place / "model",
        UNet(UNetConfig(block_out_channels=(16, 16, 24, 24), **unet)),
        VAE(VAEConfig(block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4)),
        CLIPTextEncoder(CLIPConfig(vocab_size=words.eos + 1, **widths)),
        place / "tokenizer",
        {},
    )
    return place / "model"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with a picture and a mask; no network; LoRAs are kept outside of it."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("MINIDRAG_CACHE", str(tmp_path / "cache"))

    def refuse(*args: object, **options: object) -> str:
        raise AssertionError("asked the hub")

    monkeypatch.setattr("minidrag.weights.hub.snapshot_download", refuse)
    picture, mask = Image.new("RGB", (96, 80), (40, 120, 200)), Image.new("L", (96, 80))
    ImageDraw.Draw(picture).ellipse((20, 30, 44, 54), (220, 60, 40))
    ImageDraw.Draw(mask).rectangle((10, 20, 80, 66), 255)
    picture.save("photo.png")
    mask.save("mask.png")
    return work


@pytest.fixture
def start(model: Path) -> Callable[..., int]:
    """start(option, ...) runs the command with the untrained model and few steps."""

    def start(*options: str | Path) -> int:
        return demo.main([*FAST, "--model", str(model), *map(str, options)])

    return start


def listing(place: Path) -> set[Path]:
    return {path.relative_to(place) for path in place.rglob("*")}


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence with which a run ended."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    last = error.splitlines()[-1]
    assert last.startswith("minidrag: ") and len(last) < 400
    return last


# --- what a run does ---


def test_a_run_writes_all_its_files_readable(
    start: Callable[..., int], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("photo.png", *DRAG, "--mask", "mask.png", "--prompt", "a red ball", "--out", "new/out") == 0
    assert sorted(path.name for path in Path("new/out").iterdir()) == WRITTEN
    edited, photo = Image.open("new/out/edited.png"), Image.open("photo.png")
    assert edited.size == photo.size and edited.mode == "RGB"
    assert edited.getpixel((2, 2)) == photo.getpixel((2, 2)), "outside the mask"
    comparison, animation = Image.open("new/out/comparison.png"), Image.open("new/out/process.gif")
    assert comparison.width > 3 * comparison.height
    assert animation.n_frames == 4  # the original, the first step, the last, and the edit
    notes = lora_file.read_notes("new/out/lora.safetensors")
    assert notes["prompt"] == "a red ball" and notes["lora_steps"] == "2"
    said = capsys.readouterr().out
    assert "handle 1: came" in said and "of 18.1 pixels" in said
    assert "stopped: all 2 steps were done" in said and "advice: " in said
    assert str(here / "new/out") in said and "seconds: model" in said and "note:" not in said


def test_run_json_says_all_that_is_needed_to_repeat(start: Callable[..., int], here: Path) -> None:
    assert start("photo.png", *DRAG, "--drag", "60,60:61.5,60", "--mask", "mask.png", "--out", "out") == 0
    values = json.loads(Path("out/run.json").read_text())
    assert values["picture"] == str(here / "photo.png") and values["mask"] == str(here / "mask.png")
    assert values["sha256"] == {name: request.sha256(here / f"{name}.png") for name in ("mask",)} | {
        "picture": request.sha256(here / "photo.png")
    }
    assert values["drags"][1] == {"handle": [60, 60], "target": [61.5, 60]}
    assert values["config"] == asdict(EditConfig()) | {
        "steps": 4,
        "inversion_steps": 3,
        "lora_steps": 2,
        "lora_batch": 1,
        "drag_steps": 2,
        "size": 64,
    }
    assert (values["device"], values["dtype"], values["seed"]) == ("cpu", "float32", 0)
    assert values["versions"]["torch"] == torch.__version__
    result = values["result"]
    assert len(result["paths"]) == 2 and len(result["paths"][0]) == 3 and len(result["losses"]) == 2
    assert result["distances"] == [pytest.approx(18.1108, abs=1e-3), 1.5] and result["reason"] == "steps"
    assert list(result["seconds"]) == ["model", "LoRA", "inversion", "drag", "denoising", "pictures"]


def test_a_run_repeats_byte_for_byte(
    start: Callable[..., int], here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start("photo.png", *DRAG, "--mask", "mask.png", "--seed", "3", "--out", "first") == 0
    assert "LoRA: trained and kept in " in capsys.readouterr().out
    first = {name: Path("first", name).read_bytes() for name in WRITTEN[:-1]}

    assert demo.main(["--from", "first/run.json", "--out", "second"]) == 0
    assert "LoRA: reused from " in capsys.readouterr().out
    monkeypatch.setenv("MINIDRAG_CACHE", str(here.parent / "other"))
    assert demo.main(["--from", "first/run.json", "--out", "third"]) == 0
    assert "LoRA: trained and kept in " in capsys.readouterr().out
    assert demo.main(["--from", "first/run.json", "--lora", "first/lora.safetensors", "--out", "fourth"]) == 0
    assert "LoRA: read from first/lora.safetensors" in capsys.readouterr().out
    for again in ("second", "third", "fourth"):
        for name, expected in first.items():
            assert Path(again, name).read_bytes() == expected, (again, name)

    assert demo.main(["--from", "first/run.json", "--seed", "4", "--out", "fifth"]) == 0
    assert Path("fifth/edited.png").read_bytes() != first["edited.png"]


def test_options_change_a_run_that_is_repeated(start: Callable[..., int]) -> None:
    assert start("photo.png", *DRAG, "--mask", "mask.png", "--out", "first") == 0
    options = ["--drag", "35,40:40,45", "--mask", "none", "--drag-steps", "1", "--no-keep-background"]
    assert demo.main(["--from", "first/run.json", *options, "--prompt", "a ball", "--out", "second"]) == 0
    before, after = (json.loads(Path(name, "run.json").read_text()) for name in ("first", "second"))
    assert after["mask"] is None and after["prompt"] == "a ball"
    assert after["drags"] == [{"handle": [35, 40], "target": [40, 45]}]
    assert after["config"] == before["config"] | {"drag_steps": 1, "keep_background": False}


def test_without_a_photo_it_takes_what_comes_along(start: Callable[..., int]) -> None:
    assert start() == 0 and start() == 0
    values = json.loads(Path("runs/picture-2/run.json").read_text())
    bundled = json.loads((tiny.DEMO / "drag.json").read_text())
    assert values["picture"] == str(tiny.DEMO / "picture.png") and values["prompt"] == bundled["prompt"]
    assert sorted(path.name for path in Path("runs/picture-1").iterdir()) == WRITTEN


def test_the_bundled_picture_is_what_its_recipe_renders() -> None:
    scene = json.loads((tiny.DEMO / "drag.json").read_text())["scene"]
    objects = tuple(Object(**thing) for thing in scene.pop("objects"))
    peaks = tuple(tuple(peak) for peak in scene.pop("peaks"))
    picture = images.load_picture(tiny.DEMO / "picture.png")
    assert render(Scene(**scene, peaks=peaks, objects=objects)).tobytes() == picture.tobytes()


def test_which_model_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load(source: object, **options: object) -> None:
        asked.append(source)
        raise ValueError("enough")

    monkeypatch.setattr(demo, "load_model", load)
    assert demo.main(["photo.png", *DRAG]) == 2 and demo.main([]) == 2
    assert demo.main(["photo.png", *DRAG, "--model", "tiny"]) == 2
    assert asked == ["sd15", "tiny", "tiny"]


def test_in_a_process_of_its_own(model: Path, here: Path) -> None:
    command = [sys.executable, ROOT / "demo.py", "photo.png", *DRAG, "--model", model, *FAST, "--out", "out"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (here / "out").iterdir()) == WRITTEN
    assert "note: there is no mask" in done.stdout and "files: comparison.png" in done.stdout
    for stage in ("LoRA", "inversion", "drag", "denoising", "animation"):
        assert f"{stage:10}: 100%" in done.stderr


def test_every_setting_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    other: dict[Any, str] = {int: "7", float: "0.25", int | None: "96", "steps": "60", "block": "2"}
    other |= {"motion_loss": "sum", "motion_reference": "start", "lora_targets": "qkvo"}
    for field in fields(EditConfig):
        name = "--" + field.name.replace("_", "-")
        if field.type is bool:
            options = [f"--no-{name[2:]}" if field.default else name]
        else:
            options = [name, other.get(field.name) or other[field.type]]
        given = vars(demo.build_parser().parse_args(["photo.png", *DRAG, *options]))
        config = demo.read_request(given).config
        changed = {key for key, value in asdict(config).items() if value != getattr(EditConfig(), key)}
        assert changed == {field.name}
    with pytest.raises(SystemExit) as end:
        demo.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and len(request.HELP) == len(fields(EditConfig))
    assert all(" ".join(help.split()) in text for help in request.HELP.values())
    assert "(mean; paper sum)" in text and "(qk; official qkvo)" in text and "(80; thorough 160)" in text


def test_official_settings_are_a_starting_point() -> None:
    def config(*options: str) -> EditConfig:
        return demo.read_request(vars(demo.build_parser().parse_args(["photo.png", *DRAG, *options]))).config

    assert config() == EditConfig()
    assert config("--config", "official") == EditConfig.official()
    assert config("--config", "paper") == EditConfig.paper()
    settings = ("--config", "official", "--lora-targets", "qkv")
    assert config(*settings) == replace(EditConfig.official(), lora_targets="qkv")


def test_points_from_a_file() -> None:
    Path("points.json").write_text('{"drags": [{"handle": [30, 40], "target": [48, 42.5]}]}')
    given = vars(
        demo.build_parser().parse_args(["photo.png", "--points", "points.json", "--drag", "1,2:3,4"])
    )
    assert demo.read_request(given).drags == [((1, 2), (3, 4)), ((30, 40), (48, 42.5))]


def test_paths_in_a_file_start_from_its_folder(here: Path) -> None:
    Path("in").mkdir()
    Path("in/mine.json").write_text('{"picture": "../photo.png", "vae": "../photo.png", "model": "tiny"}')
    found = request.read(Path("in/mine.json"))
    assert found["picture"].samefile("photo.png") and found["vae"] == str(here / "photo.png")
    assert found["model"] == "tiny"


# --- the LoRA that is kept ---


def test_a_lora_is_kept_for_the_same_things_only(model: Path) -> None:
    loaded, picture = load_model(model, device="cpu"), images.load_picture(Path("photo.png"))
    asked = Request(Path("photo.png"), [], prompt="a ball", config=EditConfig(size=64))
    keys = [runs.lora_key(loaded, picture, asked)]
    for name, value in {"prompt": "a red ball", "seed": 1}.items():
        keys.append(runs.lora_key(loaded, picture, replace(asked, **{name: value})))
    for name, value in {"lora_steps": 3, "lora_targets": "qkvo", "size": 72}.items():
        config = replace(asked.config, **{name: value})
        keys.append(runs.lora_key(loaded, picture, replace(asked, config=config)))
    keys.append(runs.lora_key(loaded, picture.rotate(90), asked))
    with torch.no_grad():
        loaded.unet.conv_in.weight.mul_(1.01)
    keys.append(runs.lora_key(loaded, picture, asked))
    assert len(set(keys)) == len(keys)
    same = replace(asked, picture=Path("elsewhere.png"), config=replace(asked.config, drag_steps=5))
    assert runs.lora_key(loaded, picture, same) == keys[-1]


@pytest.mark.parametrize("damage", ["cut", "empty", "another kind"])
def test_a_damaged_kept_lora_is_trained_again(
    start: Callable[..., int], here: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    assert start("photo.png", *DRAG, "--out", "first") == 0
    (kept,) = (here.parent / "cache/lora").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(
        {"cut": whole[:500], "empty": b"", "another kind": Path("photo.png").read_bytes()}[damage]
    )
    capsys.readouterr()
    assert start("photo.png", *DRAG, "--out", "second") == 0
    assert "LoRA: trained and kept" in capsys.readouterr().out
    assert kept.read_bytes() == whole


def test_where_no_lora_can_be_kept_the_run_goes_on(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIDRAG_CACHE", "photo.png")
    assert start("photo.png", *DRAG, "--out", "out") == 0
    assert "LoRA: trained, but not kept" in capsys.readouterr().out
    assert Path("out/lora.safetensors").exists()


def test_where_the_disk_is_full_the_run_goes_on_without_keeping_the_lora(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, picture = load_model(model, device="cpu"), images.load_picture(Path("photo.png"))
    asked = Request(Path("photo.png"), [], config=EditConfig(size=64, lora_steps=1, lora_batch=1))
    monkeypatch.setattr(lora_file, "save_file", raising(SafetensorError("No space left on device")))
    trained, origin = runs.find_lora(loaded, picture, asked)
    assert trained.unet and origin.startswith("trained, but not kept") and "No space left" in origin


# --- advice ---


def test_notes_before_a_run(model: Path) -> None:
    loaded, picture = load_model(model, device="cpu"), images.load_picture(Path("photo.png"))
    asked = Request(Path("photo.png"), [((30, 40), (48, 42))], prompt="a ball")
    mask = images.load_mask(Path("mask.png"), picture.size)
    assert advice.before(loaded, picture, mask, asked) == []

    def only(request: Request, mask: torch.Tensor | None = mask) -> str:
        (note,) = advice.before(loaded, picture, mask, request)
        return note

    assert "there is no mask: everything may change" in only(asked, None)
    assert "the mask is empty: everything may change" in only(replace(asked, mask=Path("mask.png")), None)
    assert "no prompt" in only(replace(asked, prompt=" "))
    assert "was cut to the 77" in only(replace(asked, prompt="ball " * 80))
    assert "drag 1 is far" in only(replace(asked, drags=[((30, 40), (60, 42))]))
    assert "target of drag 1 lies outside" in only(replace(asked, drags=[((15, 40), (5, 40))]))


def test_advice_after_a_run(start: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert start("photo.png", *DRAG, "--drag-lr", "0", "--track-radius", "0", "--out", "stuck") == 0
    said = capsys.readouterr().out
    assert re.search(r"handle 1: came -?[01]\.\d of 18\.1 pixels", said), said
    assert "advice: handle 1 did not move" in said
    assert start("photo.png", "--drag", "30,40:30,40", "--out", "there") == 0
    said = capsys.readouterr().out
    assert "every handle has arrived, after 0 steps" in said and "nothing was dragged" in said


def test_a_handle_that_went_away_is_said() -> None:
    result = {"distances": [1.5, 9.0], "remaining": [5.0, 2.0], "paths": [[(0, 0), (3, 3)]] * 2}
    edit: Any = SimpleNamespace(**result, losses=[1.0], reason="steps")
    said = advice.after(edit, Request(Path("photo.png"), []))
    assert said[0] == "handle 1: had 1.5 pixels to go and went away from its target, 5.0 are left"
    assert said[1] == "handle 2: came 7.0 of 9.0 pixels nearer to its target, 2.0 are left"


def test_a_long_prompt_is_cut_and_said(start: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    long, longer = "ball " * 80, "ball " * 80 + "snow"
    assert start(*PHOTO, "--prompt", long, "--out", "long") == 0
    assert "tokens and was cut to the 77 that the model reads" in capsys.readouterr().out
    assert start(*PHOTO, "--prompt", longer, "--out", "longer") == 0
    assert "LoRA: reused" in capsys.readouterr().out
    edits = [Path(name, "edited.png").read_bytes() for name in ("long", "longer")]
    assert edits[0] == edits[1], "what is cut off has no effect"


def test_an_empty_mask_is_said(start: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (96, 80)).save("black.png")
    assert start("photo.png", *DRAG, "--mask", "black.png", "--out", "out") == 0
    assert "note: the mask is empty: everything may change" in capsys.readouterr().out


# --- what cannot be done ---


def bad_files(place: Path) -> None:
    """Files of all the kinds that are refused."""
    (place / "notes.txt").write_text("not a picture")
    Image.effect_noise((96, 80), 99).save(place / "whole.png")
    whole = (place / "whole.png").read_bytes()
    (place / "cut.png").write_bytes(whole[: len(whole) // 2])
    (place / "bomb.pbm").write_bytes(b"P4 90000 90000 0")  # a header that announces far more than there is
    Image.new("RGB", (63, 90)).save(place / "small.png")
    Image.new("RGB", (1000, 70)).save(place / "strip.png")
    Image.new("L", (95, 80), 255).save(place / "other.png")
    Image.new("L", (96, 80), 90).save(place / "dark.png")
    texts = {
        "broken": '{"picture": ',
        "list": "[1, 2]",
        "unknown": '{"picture": "photo.png", "colour": 1}',
        "kind": '{"picture": "photo.png", "seed": "one"}',
        "flag": '{"picture": "photo.png", "seed": true}',
        "uneven": '{"drags": [{"handle": [1, 2]}]}',
        "word": '{"drags": [{"handle": [1, 2], "target": ["three", 4]}]}',
        "long": '{"drags": [{"handle": [1, 2], "target": [1, %s]}]}' % ("9" * 400),
        "number": '{"drags": [3]}',
        "text": '{"drags": [{"handle": "12", "target": [3, 4]}]}',
        "yes": '{"drags": [{"handle": [true, 4], "target": [3, 4]}]}',
        "more": '{"drags": [{"handle": [1, 2], "target": [3, 4], "mask": 1}]}',
        "deep": "[" * 100_000,
        "none": '{"drags": []}',
        "setting": '{"picture": "photo.png", "config": {"drag_step": 3}}',
        "value": '{"picture": "photo.png", "config": {"drag_steps": 2.5}}',
        "truth": '{"picture": "photo.png", "config": {"keep_background": 1}}',
        "gone": '{"picture": "gone.png", "drags": [{"handle": [1, 2], "target": [3, 4]}]}',
        "no picture": '{"drags": [{"handle": [1, 2], "target": [3, 4]}]}',
    }
    for name, text in texts.items():
        (place / f"{name}.json").write_text(text)


PHOTO = ["photo.png", *DRAG]
BAD = {  # options -> words of the complaint
    "no such picture": (["gone.png", *DRAG], "there is no file gone.png"),
    "a folder": ([".", *DRAG], "is a folder"),
    "not a picture": (["notes.txt", *DRAG], "no picture of a known format"),
    "too small": (["small.png", *DRAG], "63x90 pixels"),
    "cut short": (["cut.png", *DRAG], "cut.png cannot be read: image file is truncated"),
    "too large": (["large.png", *DRAG], "too large"),
    "far too large": (["bomb.pbm", *DRAG], "too large"),
    "picture without a name": (["", *DRAG], "the name of a file is empty"),
    "mask without a name": ([*PHOTO, "--mask", ""], "--mask: invalid path value: ''"),
    "out without a name": ([*PHOTO, "--out", ""], "--out: invalid path value: ''"),
    "a strip": (["strip.png", *DRAG], "crop it"),
    "no drag": (["photo.png"], "at least one --drag"),
    "handle outside": (["photo.png", "--drag", "96,40:48,42"], "handle 96,40 lies outside the picture"),
    "target outside": (["photo.png", "--drag", "30,40:50,80"], "target 50,80 lies outside the picture"),
    "not numbers": (["photo.png", "--drag", "a,40:48,42"], "'a,40:48,42' is no drag"),
    "not a number": (["photo.png", "--drag", "nan,40:48,42"], "is no drag"),
    "infinite": (["photo.png", "--drag", "1e999,40:48,42"], "is no drag"),
    "half a drag": (["photo.png", "--drag", "30,40"], "is no drag"),
    "three points": (["photo.png", "--drag", "30,40:48,42:1,1"], "is no drag"),
    "one coordinate": (["photo.png", "--drag", "30:48,42"], "is no drag"),
    "handle not in mask": (["photo.png", "--drag", "5,5:48,42", "--mask", "mask.png"], "outside the mask"),
    "mask of another size": ([*PHOTO, "--mask", "other.png"], "95x80 pixels and the picture 96x80"),
    "no mask there": ([*PHOTO, "--mask", "gone.png"], "there is no file gone.png"),
    "mask unreadable": ([*PHOTO, "--mask", "notes.txt"], "no picture of a known format"),
    "mask cut short": ([*PHOTO, "--mask", "cut.png"], "cut.png cannot be read: image file is truncated"),
    "mask without white": ([*PHOTO, "--mask", "dark.png"], "has no white"),
    "unknown model": ([*PHOTO, "--model", "sd16"], "sd16 does not exist"),
    "no model": ([*PHOTO, "--model", "."], "config.json is missing"),
    "no vae": ([*PHOTO, "--vae", "gone"], "gone does not exist"),
    "unknown config": ([*PHOTO, "--config", "mine"], "'paper', 'official'"),
    "unknown option": ([*PHOTO, "--lora-step", "3"], "unrecognized arguments: --lora-step"),
    "setting no number": ([*PHOTO, "--lora-steps", "few"], "invalid int value: 'few'"),
    "impossible step": ([*PHOTO, "--inversion-steps", "9"], "inversion_steps 9 is not possible"),
    "too many steps": ([*PHOTO, "--steps", "999999"], "choose 1 to 999"),
    "negative": ([*PHOTO, "--lora-steps", "-1"], "lora_steps -1 is not possible"),
    "rate not a number": ([*PHOTO, "--drag-lr", "nan"], "drag_lr nan is not possible"),
    "unknown targets": ([*PHOTO, "--lora-targets", "qv"], "qk, qkv, qkvo"),
    "huge size": ([*PHOTO, "--size", "9" * 30], "size 9"),
    "large size": ([*PHOTO, "--size", "100000"], "working size 120000x100000 is too large"),
    "huge seed": ([*PHOTO, "--seed", "9" * 30], "--seed 9"),
    "unknown dtype": ([*PHOTO, "--dtype", "float8"], "float8 is no dtype"),
    "unknown device": ([*PHOTO, "--device", "gpu"], "gpu is no device"),
    "absent device": ([*PHOTO, "--device", "mps:7"], "no device mps:7 here"),
    "no lora there": ([*PHOTO, "--lora", "gone.safetensors"], "no LoRA file gone.safetensors"),
    "no lora": ([*PHOTO, "--lora", "notes.txt"], "notes.txt"),
    "out is a file": ([*PHOTO, "--out", "photo.png"], "nothing can be written to photo.png"),
    "out in a file": ([*PHOTO, "--out", "photo.png/a/b"], "nothing can be written to photo.png/a/b"),
    "no json there": (["--from", "gone.json"], "gone.json cannot be read"),
    "json broken": (["--from", "broken.json"], "broken.json cannot be read as JSON"),
    "json no text": (["--from", "photo.png"], "photo.png cannot be read as JSON"),
    "json no object": (["--from", "list.json"], "no JSON object"),
    "json unknown key": (["--from", "unknown.json"], "unknown keys colour"),
    "json kind": (["--from", "kind.json"], 'seed cannot be "one"'),
    "json flag": (["--from", "flag.json"], "seed cannot be true"),
    "json setting": (["--from", "setting.json"], "drag_step is no setting"),
    "json value": (["--from", "value.json"], "drag_steps cannot be 2.5"),
    "json truth": (["--from", "truth.json"], "keep_background cannot be 1"),
    "json picture gone": (["--from", "gone.json"], "gone.png"),
    "json without picture": (["--from", "no picture.json"], "names no picture"),
    "points uneven": (["photo.png", "--points", "uneven.json"], "is no drag"),
    "points not numbers": (["photo.png", "--points", "word.json"], "is no drag"),
    "points too long": (["photo.png", "--points", "long.json"], "is no drag"),
    "points flat": (["photo.png", "--points", "number.json"], "3 is no drag"),
    "points of text": (["photo.png", "--points", "text.json"], '"12", "target": [3, 4]} is no drag'),
    "points of truth": (["photo.png", "--points", "yes.json"], "is no drag"),
    "points and more": (["photo.png", "--points", "more.json"], "is no drag"),
    "points without end": (["photo.png", "--points", "deep.json"], "cannot be read as JSON"),
    "points none": (["photo.png", "--points", "none.json"], "at least one --drag"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence_and_leaves_nothing(
    start: Callable[..., int], here: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    options, words = BAD[case]
    bad_files(here)
    if case == "too large":
        Image.new("1", (8100, 8000)).save("large.png")
    if case == "no json there":
        (here / "gone.json").unlink()
    before = listing(here)
    assert start(*options) == 2
    assert words in complaint(capsys)
    assert listing(here) == before and not (here.parent / "cache").exists()


@pytest.mark.parametrize(
    ("kind", "words"),
    [("v-prediction", "no Stable Diffusion 1.x model"), ("inpainting", "is an inpainting model")],
)
def test_a_model_of_another_kind(
    start: Callable[..., int],
    model: Path,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    words: str,
) -> None:
    other = Path(shutil.copytree(model, here.parent / "other"))
    if kind == "v-prediction":
        file = other / "scheduler/scheduler_config.json"
        file.write_text(file.read_text().replace('"epsilon"', '"v_prediction"'))
    else:
        file = other / "unet/config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"in_channels": 9}))
        tensors = load_file(other / "unet/diffusion_pytorch_model.safetensors")
        tensors["conv_in.weight"] = torch.zeros(len(tensors["conv_in.weight"]), 9, 3, 3)
        save_file(tensors, other / "unet/diffusion_pytorch_model.safetensors")
    assert start(*PHOTO, "--model", other) == 2
    assert words in complaint(capsys)
    assert not Path("runs").exists()


def test_a_lora_that_does_not_fit(start: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    wrong = LoRA({path: Factors(torch.ones(2, 320), torch.ones(320, 2), 2)}, {})
    lora_file.write(wrong, "wrong.safetensors")
    before = listing(Path())
    assert start(*PHOTO, "--lora", "wrong.safetensors") == 2
    assert "does not fit the UNet" in complaint(capsys)
    assert listing(Path()) == before


def test_a_picture_that_changed_since(start: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert start(*PHOTO, "--out", "out") == 0
    Image.new("RGB", (96, 80)).save("photo.png")
    assert demo.main(["--from", "out/run.json"]) == 2
    assert "photo.png has changed since out/run.json was written" in complaint(capsys)
    given = vars(demo.build_parser().parse_args(["photo.png", "--from", "out/run.json"]))
    assert demo.read_request(given).picture == Path("photo.png")


def test_cuda_that_is_not_there(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert start(*PHOTO, "--device", "cuda") == 2
    assert "there is no device cuda here" in complaint(capsys)


def test_dtype_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert request.choose_device("cuda", None) == ("cuda", "float16")
    assert request.choose_device("cuda:0", "float32") == ("cuda:0", "float32")
    assert request.choose_device("cpu", None) == ("cpu", "float32")
    with pytest.raises(ValueError, match="no device cuda:1 here"):
        request.choose_device("cuda:1", None)


def test_numbers_out_of_range_stop_with_stage_and_step(
    start: Callable[..., int], model: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Path(shutil.copytree(model, here.parent / "broken"))
    file = broken / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"conv_out.bias": tensors["conv_out.bias"] * torch.nan}, file)
    for dtype, words in (("float32", "a smaller"), ("bfloat16", "--dtype float32")):
        assert start(*PHOTO, "--model", broken, "--dtype", dtype) == 2
        sentence = complaint(capsys)
        assert "LoRA" in sentence and "step 1" in sentence and words in sentence
    assert not Path("runs").exists() and not (here.parent / "cache").exists()


def test_numbers_out_of_range_in_a_lora_stop_the_inversion(
    start: Callable[..., int], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(*PHOTO, "--out", "first") == 0
    file = here / "first/lora.safetensors"
    save_file(
        {name: tensor * torch.nan for name, tensor in load_file(file).items()}, here / "nan.safetensors"
    )
    before = listing(here)
    assert start(*PHOTO, "--lora", "nan.safetensors") == 2
    assert "inversion: a number is no longer finite in step 1 of 3" in complaint(capsys)
    assert listing(here) == before


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        MemoryError(),
    ],
)
def test_out_of_memory_names_what_lowers_it(
    start: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    monkeypatch.setattr(demo, "drag_edit", raising(error))
    assert start(*PHOTO) == 2
    sentence = complaint(capsys)
    assert all(
        option in sentence for option in ("--size", "--dtype float16", "--checkpointing", "--lora-batch")
    )
    assert not Path("runs").exists()


def test_the_allocators_own_words_are_known(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "fit_lora", lambda *arguments: torch.empty(2**50))
    assert start(*PHOTO) == 2
    assert "out of memory: try --dtype float16" in complaint(capsys)


def raising(error: BaseException) -> Callable[..., None]:
    def stop(*arguments: object, **options: object) -> None:
        raise error

    return stop


def test_a_mistake_in_the_program_is_not_hidden(
    start: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "drag_edit", raising(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        start(*PHOTO)
    assert not Path("runs").exists()


def test_ctrl_c_keeps_a_finished_lora(
    start: Callable[..., int],
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(runs, "fit_lora", raising(KeyboardInterrupt()))
        assert start(*PHOTO) == 130
        assert complaint(capsys) == "minidrag: stopped: nothing was finished"
        patch.undo()
    with monkeypatch.context() as patch:
        patch.setenv("MINIDRAG_CACHE", str(here.parent / "cache"))
        patch.setattr(runs, "write", raising(KeyboardInterrupt()))
        assert start(*PHOTO) == 130
        assert "stopped: the LoRA was trained and kept in " in complaint(capsys)
    (kept,) = (here.parent / "cache/lora").iterdir()
    assert kept.suffix == ".safetensors" and not Path("runs").exists()


INTERRUPTED = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import demo
signal.signal(signal.SIGINT, signal.default_int_handler)  # which tests run in the background do not have

class Progress(demo.Progress):
    def __call__(self, name, done, total):
        super().__call__(name, done, total)
        if name == "drag":
            os.kill(os.getpid(), signal.SIGINT)

demo.Progress = Progress
sys.exit(demo.main(sys.argv[1:]))
"""


def test_a_signal_in_the_drag_keeps_the_lora(
    start: Callable[..., int], model: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*FAST, *PHOTO, "--model", model]
    command = [sys.executable, "-c", INTERRUPTED, *map(str, options)]
    done = subprocess.run(
        command, cwd=here, env=dict(os.environ), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("minidrag: stopped: the LoRA was trained and kept in ")
    assert not Path("runs").exists() and len(list((here.parent / "cache/lora").iterdir())) == 1
    assert start(*PHOTO) == 0
    assert "LoRA: reused from " in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["LoRA", "inversion", "denoising", "animation"])
def test_a_signal_in_any_stage_leaves_no_folder(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    class Progress(demo.Progress):
        def __call__(self, name: str, done: int, total: int) -> None:
            if name == stage:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(demo, "Progress", Progress)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by tests in the background
    try:
        assert start(*PHOTO) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    kept = "nothing was finished" if stage == "LoRA" else "the LoRA was trained and kept in "
    assert f"stopped: {kept}" in complaint(capsys)
    assert not Path("runs").exists()


def test_a_full_disk_leaves_nothing(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "save_gif", raising(OSError(28, "No space left on device", "process.gif")))
    Path("out").mkdir()
    Path("out/mine.txt").write_text("keep")
    assert start(*PHOTO, "--out", "out") == 2
    assert complaint(capsys) == "minidrag: process.gif: No space left on device"
    assert listing(Path("out")) == {Path("mine.txt")}
