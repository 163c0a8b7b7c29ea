"""The command: what it writes, that runs repeat, and one sentence for everything that cannot be done."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from support import profiles
from support.command import FAST, PHOTO, ROOT, WRITTEN, complaint, demo, listing, raising
from support.loras import read_notes

from minidrag import tiny
from minidrag.app import draw, results, session
from minidrag.app.command_line import build_parser
from minidrag.app.options import Options, read_options
from minidrag.config import EditConfig
from minidrag.method.lora import Factors, LoRA
from minidrag.method.progress import Progress
from minidrag.system import pictures
from minidrag.system.files import sha256
from minidrag.tiny.objects import Object
from minidrag.tiny.renderer import Scene, render
from minidrag.weights import files, lora_file

T = TypeVar("T")

pytestmark = pytest.mark.usefixtures("workdir")

DRAG = PHOTO[1:]


# What a run does


def test_a_run_writes_all_its_files(
    start: Callable[..., int], workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(*PHOTO, "--mask", "mask.png", "--prompt", "a red ball", "--out", "new/out") == 0
    assert sorted(path.name for path in Path("new/out").iterdir()) == WRITTEN
    edited, photo = Image.open("new/out/edited.png"), Image.open("photo.png")
    assert edited.size == photo.size and edited.mode == "RGB"
    assert edited.getpixel((2, 2)) == photo.getpixel((2, 2)), "outside the mask"
    comparison, animation = Image.open("new/out/comparison.png"), Image.open("new/out/process.gif")
    assert comparison.width > 3 * comparison.height
    assert getattr(animation, "n_frames", 1) == 4  # the original, the first step, the last, and the edit
    notes = read_notes("new/out/lora.safetensors")
    assert notes["prompt"] == "a red ball" and notes["lora_steps"] == "2"
    said = capsys.readouterr().out
    assert "handle 1 moved " in said and " of 18.1 pixels, " in said
    assert (
        "not every handle arrived, with 2 updates (--drag-levels, --drag-steps)" in said
        and "advice: " in said
    )
    assert f"files: {', '.join(WRITTEN)} in {workdir / 'new/out'}" in said
    assert "seconds: model " in said and ", total " in said and "note:" not in said


def test_a_run_without_a_lora_writes_none(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(*PHOTO, "--lora-steps", "0", "--out", "out") == 0
    assert {file.name for file in Path("out").iterdir()} == {*WRITTEN} - {"lora.safetensors"}
    assert "LoRA: none (--lora-steps)" in capsys.readouterr().out


def test_run_json_has_everything_needed_to_repeat(start: Callable[..., int], workdir: Path) -> None:
    assert start(*PHOTO, "--drag", "60,60:61.5,60", "--mask", "mask.png", "--out", "out") == 0
    values = json.loads(Path("out/run.json").read_text())
    photo, mask = workdir / "photo.png", workdir / "mask.png"
    assert values["image"] == str(photo) and values["mask"] == str(mask)
    assert values["sha256"] == {"image": sha256(photo), "mask": sha256(mask)}
    assert values["drags"][1] == {"handle": [60, 60], "target": [61.5, 60]}
    assert values["config"] == asdict(EditConfig()) | {
        "steps": 4,
        "inversion_steps": 3,
        "lora_steps": 2,
        "lora_batch": 1,
        "warp_start": False,
        "drag_levels": 1,
        "scale_radii": False,
        "drag_steps": 2,
        "size": 64,
    }
    assert (values["device"], values["dtype"], values["seed"]) == ("cpu", "float32", 0)
    assert values["versions"]["torch"] == torch.__version__
    result = values["result"]
    assert len(result["paths"]) == 2 and len(result["paths"][0]) == 3 and len(result["losses"]) == 2
    assert result["distances"] == [pytest.approx(18.1108, abs=1e-3), 1.5] and result["arrived"] is False
    assert list(result["seconds"]) == ["model", "LoRA", "inversion", "drag", "denoising", "animation"]


def test_a_generated_image_is_made_and_then_edited(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    made = ["--generate", "--prompt", "a ball", "--negative", "snow", "--guidance", "3"]
    assert start(*made, "--out", "first") == 0
    assert listing(Path("first")) == {Path("generated.png")}
    assert "; to edit it, add --drag X,Y:X,Y" in capsys.readouterr().out
    assert start(*made, "--drag", "20,30:40,30", "--out", "second") == 0
    assert sorted(path.name for path in Path("second").iterdir()) == sorted([*WRITTEN, "generated.png"])
    assert Path("first/generated.png").read_bytes() == Path("second/generated.png").read_bytes()
    values = json.loads(Path("second/run.json").read_text())
    assert (values["image"], values["negative"], values["guidance"]) == (None, "snow", 3.0)
    assert demo.main(["--from", "second/run.json", "--out", "third"]) == 0
    assert Path("third/edited.png").read_bytes() == Path("second/edited.png").read_bytes()
    plain = ["--generate", "--model", "tiny", "--prompt", "a ball", "--drag", "1,1:2,2"]
    assert read_options(vars(build_parser().parse_args(plain))).config.lora_steps == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--generate"], "--generate needs a --prompt that describes the image"),
        (["--generate", "--prompt", " "], "--generate needs a --prompt that describes the image"),
        ([*PHOTO, "--generate", "--prompt", "x"], "--generate makes an image: give no PHOTO with it"),
        (["--generate", "--prompt", "x", "--guidance", "nan"], "--guidance must be 0 to 100, got NaN"),
        (
            ["--generate", "--prompt", "x", "--drag", "500,1:2,2"],
            "handle 500,1 is outside the image of 64x64 pixels",
        ),
    ],
)
def test_what_cannot_be_generated_is_refused(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    assert start(*options, "--out", "out") == 2
    assert complaint(capsys) == f"minidrag: {reason}" and not Path("out").exists()


def test_a_run_repeats_byte_for_byte(
    start: Callable[..., int],
    workdir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert start(*PHOTO, "--mask", "mask.png", "--seed", "3", "--out", "first") == 0
    assert "LoRA: trained and cached in " in capsys.readouterr().out
    first = {name: Path("first", name).read_bytes() for name in WRITTEN[:-1]}

    assert demo.main(["--from", "first/run.json", "--out", "second"]) == 0
    assert "LoRA: reused from " in capsys.readouterr().out
    monkeypatch.setenv("MINIDRAG_CACHE", str(workdir.parent / "other"))
    assert demo.main(["--from", "first/run.json", "--out", "third"]) == 0
    assert "LoRA: trained and cached in " in capsys.readouterr().out
    assert demo.main(["--from", "first/run.json", "--lora", "first/lora.safetensors", "--out", "fourth"]) == 0
    assert "LoRA: read from first/lora.safetensors" in capsys.readouterr().out
    for again in ("second", "third", "fourth"):
        for name, expected in first.items():
            assert Path(again, name).read_bytes() == expected, (again, name)

    assert demo.main(["--from", "first/run.json", "--seed", "4", "--out", "fifth"]) == 0
    assert Path("fifth/edited.png").read_bytes() != first["edited.png"]


def test_options_change_a_run_that_is_repeated(start: Callable[..., int]) -> None:
    assert start(*PHOTO, "--mask", "mask.png", "--out", "first") == 0
    options = ["--drag", "35,40:40,45", "--mask", "none", "--drag-steps", "1", "--no-keep-background"]
    assert demo.main(["--from", "first/run.json", *options, "--prompt", "a ball", "--out", "second"]) == 0
    before, after = (json.loads(Path(name, "run.json").read_text()) for name in ("first", "second"))
    assert after["mask"] is None and after["prompt"] == "a ball"
    assert after["drags"] == [{"handle": [35, 40], "target": [40, 45]}]
    assert after["config"] == before["config"] | {"drag_steps": 1, "keep_background": False}


def test_without_a_photo_the_one_that_ships_is_edited(start: Callable[..., int]) -> None:
    assert start() == 0 and start() == 0
    values = json.loads(Path("runs/ball-2/run.json").read_text())
    shipped = json.loads((tiny.DEMO / "drag.json").read_text())
    assert values["image"] == str(tiny.DEMO / "ball.png") and values["prompt"] == shipped["prompt"]
    assert sorted(path.name for path in Path("runs/ball-1").iterdir()) == WRITTEN


def test_the_shipped_image_is_rendered_from_its_recipe() -> None:
    scene = json.loads((tiny.DEMO / "drag.json").read_text())["scene"]
    objects = tuple(Object(**thing) for thing in scene.pop("objects"))
    peaks = tuple(tuple(peak) for peak in scene.pop("peaks"))
    image = pictures.load_image(tiny.DEMO / "ball.png")
    assert render(Scene(**scene, peaks=peaks, objects=objects)).tobytes() == image.tobytes()


def test_default_model(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[object] = []

    def load(options: Options) -> None:
        loaded.append(options.model)
        raise ValueError("enough")

    monkeypatch.setattr(demo, "open_model", load)
    assert demo.main(PHOTO) == 2 and demo.main([]) == 2
    assert demo.main([*PHOTO, "--model", "tiny"]) == 2
    assert loaded == ["sd15", "tiny", "tiny"]


def test_in_a_process_of_its_own(untrained: Path, workdir: Path) -> None:
    command = [sys.executable, ROOT / "demo.py", *PHOTO, "--model", untrained, *FAST, "--out", "out"]
    done = subprocess.run(command, cwd=workdir, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (workdir / "out").iterdir()) == WRITTEN
    assert "note: there is no mask" in done.stdout and "files: comparison.png" in done.stdout
    for stage in ("LoRA", "inversion", "drag", "denoising", "animation"):
        assert f"{stage:10}: 100%" in done.stderr


def test_help_begins_with_what_the_command_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        demo.main(["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and shown.startswith("usage: minidrag [PHOTO] [options]")
    assert demo.__doc__ and demo.__doc__.strip() in shown


@pytest.mark.parametrize("mask", [["--mask", "mask.png"], [], ["--mask", "mask.png", "--no-keep-background"]])
def test_a_photo_with_a_profile_is_edited_in_the_colors_that_it_shows(
    start: Callable[..., int], mask: list[str]
) -> None:
    """A photo in Display P3 gives the files, to the byte, of the same photo converted to sRGB beforehand."""
    photo = Image.open("photo.png")
    photo.save("p3.png", icc_profile=profiles.rgb(profiles.DISPLAY_P3, 2.2))
    shown = profiles.in_srgb(np.asarray(photo), profiles.DISPLAY_P3, 2.2)
    converted = pictures.load_image(Path("p3.png"))
    assert np.abs(np.asarray(converted) - shown).max() < 1.5 and converted.tobytes() != photo.tobytes()
    converted.save("srgb.png")
    for name in ("p3", "srgb"):
        assert start(f"{name}.png", *DRAG, *mask, "--out", name) == 0
    for name in ("edited.png", "comparison.png", "process.gif"):
        assert Path("p3", name).read_bytes() == Path("srgb", name).read_bytes()
        with Image.open(Path("p3", name)) as image:
            assert "icc_profile" not in image.info


def test_a_photo_with_transparency_says_so(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    photo = Image.open("photo.png").convert("RGBA")
    photo.putpixel((0, 0), (0, 0, 0, 0))
    photo.save("clear.png")
    assert start("clear.png", *DRAG, "--out", "out") == 0
    assert "note: transparent parts of the image count as white" in capsys.readouterr().out
    assert Image.open("out/edited.png").mode == "RGB"


def test_the_psnr_of_the_reconstruction_is_recorded(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(*PHOTO, "--out", "out") == 0
    found = json.loads(Path("out/run.json").read_text())["result"]["reconstruction_psnr"]
    assert f"the reconstruction is poor ({found:.1f} dB PSNR; expect" in capsys.readouterr().out  # untrained


# What cannot be done


def write_bad_files(place: Path) -> None:
    """Files of all the kinds that are refused."""
    (place / "notes.txt").write_text("not an image")
    Image.effect_noise((96, 80), 99).save(place / "whole.png")
    whole = (place / "whole.png").read_bytes()
    (place / "cut.png").write_bytes(whole[: len(whole) // 2])
    (place / "bomb.pbm").write_bytes(b"P4 90000 90000 0")  # the header claims far more than there is
    Image.new("RGB", (63, 90)).save(place / "small.png")
    Image.new("RGB", (1000, 70)).save(place / "strip.png")
    Image.new("L", (95, 80), 255).save(place / "other.png")
    Image.new("L", (96, 80), 90).save(place / "dark.png")
    texts = {
        "broken": '{"image": ',
        "list": "[1, 2]",
        "unknown": '{"image": "photo.png", "shade": 1}',
        "kind": '{"image": "photo.png", "seed": "one"}',
        "flag": '{"image": "photo.png", "seed": true}',
        "uneven": '{"drags": [{"handle": [1, 2]}]}',
        "word": '{"drags": [{"handle": [1, 2], "target": ["three", 4]}]}',
        "long": '{"drags": [{"handle": [1, 2], "target": [1, %s]}]}' % ("9" * 400),
        "number": '{"drags": [3]}',
        "text": '{"drags": [{"handle": "12", "target": [3, 4]}]}',
        "yes": '{"drags": [{"handle": [true, 4], "target": [3, 4]}]}',
        "more": '{"drags": [{"handle": [1, 2], "target": [3, 4], "mask": 1}]}',
        "deep": "[" * 100_000,
        "none": '{"drags": []}',
        "setting": '{"image": "photo.png", "config": {"drag_step": 3}}',
        "value": '{"image": "photo.png", "config": {"drag_steps": 2.5}}',
        "truth": '{"image": "photo.png", "config": {"keep_background": 1}}',
        "gone": '{"image": "gone.png", "drags": [{"handle": [1, 2], "target": [3, 4]}]}',
        "no image": '{"drags": [{"handle": [1, 2], "target": [3, 4]}]}',
    }
    for name, text in texts.items():
        (place / f"{name}.json").write_text(text)


BAD = {  # options -> words of the complaint
    "no such image": (["gone.png", *DRAG], "there is no file gone.png"),
    "a folder": ([".", *DRAG], ". is a folder"),
    "not an image": (["notes.txt", *DRAG], "notes.txt is not an image in a known format: save it as PNG"),
    "too small": (["small.png", *DRAG], "small.png is 63x90 pixels: each side must be at least 64"),
    "truncated": (["cut.png", *DRAG], "cut.png cannot be read: image file is truncated"),
    "too large": (["large.png", *DRAG], "large.png is too large, more than 64,000,000 pixels"),
    "far too large": (["bomb.pbm", *DRAG], "bomb.pbm is too large, more than 64,000,000 pixels"),
    "image without a name": (["", *DRAG], "a file name is empty"),
    "mask without a name": ([*PHOTO, "--mask", ""], "--mask: invalid path value: ''"),
    "out without a name": ([*PHOTO, "--out", ""], "--out: invalid path value: ''"),
    "a strip": (["strip.png", *DRAG], "the image is 1000x70 pixels, longer than 8 to 1: crop it"),
    "no drag": (["photo.png"], "no drag: give at least one --drag X,Y:X,Y"),
    "handle outside": (["photo.png", "--drag", "96,40:48,42"], "handle 96,40 is outside the image of 96x80"),
    "target outside": (["photo.png", "--drag", "30,40:50,80"], "target 50,80 is outside the image of 96x80"),
    "not numbers": (["photo.png", "--drag", "a,40:48,42"], "invalid drag 'a,40:48,42': expected X,Y:X,Y"),
    "not a number": (["photo.png", "--drag", "nan,40:48,42"], "invalid drag 'nan,40:48,42'"),
    "infinite": (["photo.png", "--drag", "1e999,40:48,42"], "invalid drag '1e999,40:48,42'"),
    "half a drag": (["photo.png", "--drag", "30,40"], "invalid drag '30,40'"),
    "three points": (["photo.png", "--drag", "30,40:48,42:1,1"], "invalid drag '30,40:48,42:1,1'"),
    "one coordinate": (["photo.png", "--drag", "30:48,42"], "invalid drag '30:48,42'"),
    "handle not in mask": (
        ["photo.png", "--drag", "5,5:48,42", "--mask", "mask.png"],
        "handle 5,5 is outside the mask: mark what it drags as editable too",
    ),
    "mask of another size": ([*PHOTO, "--mask", "other.png"], "other.png is 95x80 pixels, the image 96x80"),
    "no such mask": ([*PHOTO, "--mask", "gone.png"], "there is no file gone.png"),
    "mask unreadable": ([*PHOTO, "--mask", "notes.txt"], "notes.txt is not an image in a known format"),
    "mask truncated": ([*PHOTO, "--mask", "cut.png"], "cut.png cannot be read: image file is truncated"),
    "mask without white": ([*PHOTO, "--mask", "dark.png"], "dark.png has no white: its lightest gray is 90"),
    "unknown model": ([*PHOTO, "--model", "sd16"], "sd16 does not exist: give a folder, a .safetensors"),
    "not a model": ([*PHOTO, "--model", "."], "config.json is missing: the folder is not a model"),
    "no such vae": ([*PHOTO, "--vae", "gone"], "gone does not exist: give a folder, a .safetensors"),
    "unknown config": (
        [*PHOTO, "--config", "mine"],
        "argument --config: invalid choice: 'mine' (choose from ",
    ),
    "unknown option": ([*PHOTO, "--lora-step", "3"], "unrecognized arguments: --lora-step 3 (--help lists"),
    "setting not a number": ([*PHOTO, "--lora-steps", "few"], "--lora-steps: invalid int value: 'few'"),
    "impossible step": (
        [*PHOTO, "--inversion-steps", "9"],
        "inversion_steps must be 1 to 4, the steps",
    ),
    "too many steps": ([*PHOTO, "--steps", "999999"], "steps must be 1 to 999, got 999999"),
    "far too many steps": ([*PHOTO, "--steps", "9" * 30], "steps must be at most 1000000, got 9999"),
    "negative": ([*PHOTO, "--lora-steps", "-1"], "lora_steps must be at least 0, got -1"),
    "rate not a number": ([*PHOTO, "--drag-lr", "nan"], "drag_lr must be at least 0, got nan"),
    "unknown targets": ([*PHOTO, "--lora-targets", "qv"], "must be one of qk, qkv, qkvo, got 'qv'"),
    "huge size": ([*PHOTO, "--size", "9" * 30], "size must be at most 1000000, got 9999"),
    "large size": (
        [*PHOTO, "--size", "100000"],
        "the working size 120000x100000 has more than 16,000,000 pixels: choose a smaller --size",
    ),
    "huge seed": ([*PHOTO, "--seed", "9" * 30], "--seed must be 0 to 2**63 - 1, got 9999"),
    "negative seed": ([*PHOTO, "--seed", "-1"], "--seed must be 0 to 2**63 - 1, got -1"),
    "unknown dtype": (
        [*PHOTO, "--dtype", "float8"],
        "dtype 'float8' does not work on cpu: use one of",
    ),
    "unknown device": ([*PHOTO, "--device", "gpu"], "unknown device 'gpu': use cpu, cuda, or mps"),
    "absent device": ([*PHOTO, "--device", "mps:7"], "device 'mps:7' is not available: use "),
    "no such lora": ([*PHOTO, "--lora", "gone.safetensors"], "there is no LoRA file gone.safetensors"),
    "not a lora": ([*PHOTO, "--lora", "notes.txt"], "notes.txt is truncated or not a safetensors file"),
    "out is a file": ([*PHOTO, "--out", "photo.png"], "photo.png cannot be written to: "),
    "out in a file": ([*PHOTO, "--out", "photo.png/a/b"], "photo.png/a/b cannot be written to: "),
    "no such json": (["--from", "gone.json"], "there is no file gone.json"),
    "json broken": (["--from", "broken.json"], "broken.json cannot be read as JSON"),
    "json not text": (["--from", "photo.png"], "photo.png cannot be read as JSON"),
    "json not an object": (["--from", "list.json"], "list.json: expected a JSON object"),
    "json unknown key": (["--from", "unknown.json"], "unknown.json: unknown keys shade: the keys are image,"),
    "json kind": (["--from", "kind.json"], 'kind.json: seed cannot be "one"'),
    "json flag": (["--from", "flag.json"], "flag.json: seed cannot be true"),
    "json setting": (["--from", "setting.json"], "unknown setting drag_step, did you mean drag_steps?"),
    "json value": (["--from", "value.json"], "the setting drag_steps cannot be 2.5"),
    "json truth": (["--from", "truth.json"], "the setting keep_background cannot be 1"),
    "json image gone": (["--from", "gone.json"], "there is no file gone.png"),
    "json without image": (["--from", "no image.json"], "no image.json names no image: give one"),
    "points uneven": (["photo.png", "--points", "uneven.json"], 'invalid drag {"handle": [1, 2]}: expected'),
    "points not numbers": (
        ["photo.png", "--points", "word.json"],
        '["three", 4]}: expected {"handle": [x,',
    ),
    "points too long": (["photo.png", "--points", "long.json"], '"target": [1, 9999'),
    "points flat": (["photo.png", "--points", "number.json"], "number.json: invalid drag 3: expected"),
    "points of text": (
        ["photo.png", "--points", "text.json"],
        '"12", "target": [3, 4]}: expected {"handle"',
    ),
    "points of truth": (["photo.png", "--points", "yes.json"], 'invalid drag {"handle": [true, 4]'),
    "points and more": (["photo.png", "--points", "more.json"], '"mask": 1}: expected {"handle": [x, y]'),
    "points without end": (["photo.png", "--points", "deep.json"], "deep.json cannot be read as JSON"),
    "points none": (["photo.png", "--points", "none.json"], "no drag: give at least one --drag"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence_and_leaves_nothing(
    start: Callable[..., int], workdir: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    options, words = BAD[case]
    write_bad_files(workdir)
    if case == "too large":
        Image.new("1", (8100, 8000)).save("large.png")
    if case == "no such json":
        (workdir / "gone.json").unlink()
    before = listing(workdir)
    assert start(*options) == 2
    assert words in complaint(capsys)
    assert listing(workdir) == before and not (workdir.parent / "cache").exists()


@pytest.mark.parametrize(
    ("kind", "words"),
    [("v-prediction", "is not a Stable Diffusion 1.x model: use one"), ("inpainting", "inpainting model")],
)
def test_a_model_of_another_kind(
    start: Callable[..., int],
    untrained: Path,
    workdir: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    words: str,
) -> None:
    other = Path(shutil.copytree(untrained, workdir.parent / "other"))
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
    assert not Path("runs").exists() and not (workdir.parent / "cache").exists()


def test_a_lora_that_does_not_fit(start: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    wrong = LoRA({path: Factors(torch.ones(2, 320), torch.ones(320, 2), 2)}, {})
    lora_file.write(wrong, "wrong.safetensors")
    before = listing(Path())
    assert start(*PHOTO, "--lora", "wrong.safetensors") == 2
    assert "does not fit the UNet" in complaint(capsys)
    assert listing(Path()) == before


def test_an_image_that_changed_since(start: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert start(*PHOTO, "--out", "out") == 0
    Image.new("RGB", (96, 80)).save("photo.png")
    assert demo.main(["--from", "out/run.json"]) == 2
    assert "photo.png has changed since out/run.json was written: to use it anyway" in complaint(capsys)


def test_cuda_that_is_not_available(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert start(*PHOTO, "--device", "cuda") == 2
    assert "device 'cuda' is not available: use " in complaint(capsys)


def test_a_number_that_is_not_finite_stops_with_stage_and_step(
    start: Callable[..., int], untrained: Path, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Path(shutil.copytree(untrained, workdir.parent / "broken"))
    file = broken / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"conv_out.bias": tensors["conv_out.bias"] * torch.nan}, file)
    for dtype, advice in (
        ("float32", "try a smaller --drag-lr or --lora-lr"),
        ("bfloat16", "try --dtype float32"),
    ):
        assert start(*PHOTO, "--model", broken, "--dtype", dtype) == 2
        wanted = f"minidrag: LoRA: a number is not finite after 1 of 2: {advice}"
        assert complaint(capsys) == wanted
    assert not Path("runs").exists() and not (workdir.parent / "cache").exists()


def test_a_lora_in_a_folder_and_a_tokenizer(
    start: Callable[..., int], workdir: Path, untrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--lora takes a folder as diffusers and peft write it; --tokenizer is in run.json and read from it."""
    assert start(*PHOTO, "--out", "first") == 0
    (workdir / "lora").mkdir()
    tensors = load_file(workdir / "first/lora.safetensors")
    bundle = {"bundle_emb.word.string_to_param.*": torch.ones(1, 16)}
    save_file(tensors | bundle, workdir / "lora/pytorch_lora_weights.safetensors")
    capsys.readouterr()
    assert start(*PHOTO, "--lora", "lora", "--tokenizer", untrained / "tokenizer", "--out", "second") == 0
    assert "note: the LoRA's file also has embeddings (word), which are not used" in capsys.readouterr().out
    edits = [(workdir / name / "edited.png").read_bytes() for name in ("first", "second")]
    assert edits[0] == edits[1]
    values = json.loads((workdir / "second/run.json").read_text())
    assert values["tokenizer"] == str((untrained / "tokenizer").resolve())
    assert values["lora"] == str((workdir / "lora/pytorch_lora_weights.safetensors").resolve())
    assert start("--from", "second/run.json", "--out", "third") == 0
    assert start(*PHOTO, "--tokenizer", "nowhere") == 2
    assert "neither nowhere nor nowhere/tokenizer has a vocab.json" in complaint(capsys)


def test_a_lora_that_is_not_finite_is_refused(
    start: Callable[..., int], workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(*PHOTO, "--out", "first") == 0
    poisoned = {name: x * torch.nan for name, x in load_file(workdir / "first/lora.safetensors").items()}
    save_file(poisoned, workdir / "nan.safetensors")
    before = listing(workdir)
    assert start(*PHOTO, "--lora", "nan.safetensors") == 2
    assert "has numbers that are not finite: its training has failed" in complaint(capsys)
    assert listing(workdir) == before


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        MemoryError(),
    ],
)
def test_out_of_memory_names_what_needs_less(
    start: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    monkeypatch.setattr(session, "drag_edit", raising(error))
    assert start(*PHOTO) == 2
    settings = "--dtype float16, --checkpointing, --lora-batch 1, or a smaller --size"
    assert complaint(capsys) == f"minidrag: out of memory: try {settings}"
    assert not Path("runs").exists()


def test_the_allocators_own_error_is_recognized(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "train_lora", lambda *arguments: torch.empty(2**50))
    assert start(*PHOTO) == 2
    assert "out of memory: try --dtype float16" in complaint(capsys)


def test_a_mistake_in_the_program_is_not_hidden(
    start: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "drag_edit", raising(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        start(*PHOTO)
    assert not Path("runs").exists()


# Interruptions


def test_ctrl_c_keeps_a_finished_lora(
    start: Callable[..., int],
    workdir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(session, "train_lora", raising(KeyboardInterrupt()))
        assert start(*PHOTO) == 130
    assert complaint(capsys) == "minidrag: stopped: nothing was finished"
    assert not (workdir.parent / "cache").exists()
    monkeypatch.setattr(results, "write", raising(KeyboardInterrupt()))
    assert start(*PHOTO) == 130
    (cached,) = (workdir.parent / "cache/lora").iterdir()
    assert complaint(capsys) == f"minidrag: stopped: the LoRA was trained and cached in {cached}"
    assert cached.suffix == ".safetensors" and not Path("runs").exists()


INTERRUPTED = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from minidrag.app import command_line as demo
signal.signal(signal.SIGINT, signal.default_int_handler)  # which tests run in the background do not have

class Progress(demo.Progress):
    def __call__(self, name, items, total):
        for item in super().__call__(name, items, total):
            yield item
            if name == "drag":
                os.kill(os.getpid(), signal.SIGINT)

demo.Progress = Progress
sys.exit(demo.main(sys.argv[1:]))
"""


def test_a_signal_in_the_drag_keeps_the_lora(
    start: Callable[..., int], untrained: Path, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*FAST, *PHOTO, "--model", untrained]
    command = [sys.executable, "-c", INTERRUPTED, *map(str, options)]
    done = subprocess.run(
        command, cwd=workdir, env=dict(os.environ), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("minidrag: stopped: the LoRA was trained and cached in ")
    assert "inversion : 100%" in done.stderr and "denoising" not in done.stderr
    assert not Path("runs").exists() and len(list((workdir.parent / "cache/lora").iterdir())) == 1
    assert start(*PHOTO) == 0
    assert "LoRA: reused from " in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["LoRA", "inversion", "drag", "denoising", "animation"])
def test_a_signal_in_any_stage_leaves_no_folder_before_the_edit_is_finished(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    class Interrupting(Progress):
        def __call__(self, name: str, items: Iterable[T], total: int) -> Iterator[T]:
            for item in super().__call__(name, items, total):
                yield item
                if name == stage:
                    signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(demo, "Progress", Interrupting)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by tests in the background
    try:
        assert start(*PHOTO) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    if stage == "animation":
        assert complaint(capsys) == "minidrag: stopped: the edit is in runs/photo-1"
        assert sorted(path.name for path in Path("runs/photo-1").iterdir()) == without("process.gif")
        return
    kept = "nothing was finished" if stage == "LoRA" else "the LoRA was trained and cached in "
    assert f"stopped: {kept}" in complaint(capsys)
    assert not Path("runs").exists()


def without(name: str) -> list[str]:
    return [other for other in WRITTEN if other != name]


FULL = OSError(28, "No space left on device")
EXTRAS = {  # what fails after the edit, the error, and what is missing then
    "animation": (draw, "save_gif", FULL, "process.gif is missing: No space left on device"),
    "no memory": (draw, "save_gif", MemoryError(), "process.gif is missing: out of memory"),
    "frame": (
        results,
        "decode",
        FloatingPointError("decoding: a number is not finite"),
        "process.gif",
    ),
    "LoRA": (lora_file, "write", FULL, "lora.safetensors is missing: No space left on device"),
    "LoRA of its writer": (
        files,
        "save_file",
        SafetensorError("I/O error"),
        "lora.safetensors is missing: I/O",
    ),
    "comparison": (
        draw,
        "side_by_side",
        RuntimeError("CUDA out of memory."),
        "comparison.png is missing: out of",
    ),
    "record": (results, "write_json", FULL, "run.json is missing: No space left on device"),
}


@pytest.mark.parametrize("case", EXTRAS)
def test_a_finished_edit_is_not_lost_to_what_comes_after_it(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    module, name, error, words = EXTRAS[case]
    monkeypatch.setattr(module, name, raising(error))
    assert start(*PHOTO, "--out", "out") == 0
    said = capsys.readouterr().out
    assert f"note: {words}" in said and "handle 1 moved" in said
    missing = [words.partition(" ")[0]] + (["process.gif"] if case == "comparison" else [])
    assert sorted(path.name for path in Path("out").iterdir()) == [
        name for name in WRITTEN if name not in missing
    ]
    with Image.open("out/edited.png") as edited:
        edited.load()


def test_a_disk_that_is_full_before_the_edit_leaves_nothing(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image.Image, "save", raising(FULL))
    Path("out").mkdir()
    Path("out/mine.txt").write_text("keep")
    assert start(*PHOTO, "--out", "out") == 2
    assert complaint(capsys) == "minidrag: No space left on device"
    assert listing(Path("out")) == {Path("mine.txt")}
