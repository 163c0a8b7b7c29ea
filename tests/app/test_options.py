"""Options on the command line and in JSON files."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command import PHOTO

from minidrag.app.command_line import build_parser
from minidrag.app.options import (
    Options,
    choose_device,
    open_input,
    parse_drag,
    read,
    read_options,
    to_json,
    to_pixel,
)
from minidrag.config import EditConfig
from minidrag.points import Pixel
from minidrag.system.files import sha256

pytestmark = pytest.mark.usefixtures("workdir")


def parse(*arguments: str) -> Options:
    return read_options(vars(build_parser().parse_args(arguments)))


# The command line


def test_every_setting_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    other: dict[Any, str] = {int: "8", float: "0.25", int | None: "16"}
    other |= {"steps": "60", "block": "2", "motion_loss": "sum", "motion_reference": "moving"}
    other |= {"lora_targets": "qkvo", "control_blocks": "3"}
    for field in fields(EditConfig):
        name = "--" + field.name.replace("_", "-")
        if field.type is bool:
            options = [f"--no-{name[2:]}" if field.default else name]
        else:
            options = [name, other.get(field.name) or other[field.type]]
        config = parse(*PHOTO, *options).config
        changed = {key for key, value in asdict(config).items() if value != getattr(EditConfig(), key)}
        assert changed == {field.name}


def test_help_gives_the_default_and_the_paper_where_it_differs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^0$"):
        build_parser().parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(" ".join(field.metadata["help"].split()) in text for field in fields(EditConfig))
    for values in ("(mean; paper: sum; official: mean)", "(qk; paper: qkv; official: qkvo)", "(7; paper: 1)"):
        assert values in text
    assert "(on; paper: off)" in text and "(off)" in text and "(16)" in text and "None" not in text
    assert "paper: the paper to the letter; official: the authors' program; fast: the default" in text


def test_presets_are_starting_points() -> None:
    assert parse(*PHOTO).config == EditConfig()
    assert parse(*PHOTO, "--config", "official").config == EditConfig.official()
    assert parse(*PHOTO, "--config", "paper").config == EditConfig.paper()
    assert parse(*PHOTO, "--config", "fast").config == EditConfig.fast()
    settings = ("--config", "official", "--lora-targets", "qkv")
    assert parse(*PHOTO, *settings).config == replace(EditConfig.official(), lora_targets="qkv")


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    drags = [(Pixel(30, 40), Pixel(48, 42))]
    assert parse(*PHOTO) == Options(Path("photo.png"), drags, device="cpu", dtype="float32")
    assert parse(*PHOTO).handles == [(30, 40)] and parse(*PHOTO).targets == [(48, 42)]


def test_drags_on_the_command_line() -> None:
    drags = parse("photo.png", "--drag", "1.5,2:-0.25,4e1", "--drag", "5,6:7,8").drags
    assert drags == [(Pixel(1.5, 2), Pixel(-0.25, 40)), (Pixel(5, 6), Pixel(7, 8))]
    assert all(type(point) is Pixel for drag in drags for point in drag)
    for text in ("", "1,2", "1,2:3", "1,2:3,4:5,6", "a,2:3,4", "1,2:3,inf", "1;2:3;4"):
        with pytest.raises(ValueError) as error:
            parse_drag(text)
        wanted = f"invalid drag {text!r}: expected X,Y:X,Y, handle and target in pixels"
        assert str(error.value) == wanted


def test_to_pixel() -> None:
    assert to_pixel([3, "4.5"]) == Pixel(x=3, y=4.5) and type(to_pixel([3, 4])) is Pixel
    for values in (["3"], [1, 2, 3], ["x", 1], [float("nan"), 1], [1, float("-inf")]):
        with pytest.raises(ValueError):
            to_pixel(values)
    with pytest.raises(TypeError):
        to_pixel([None, 1])


def test_none_removes_a_file() -> None:
    options = parse(*PHOTO, "--mask", "none", "--vae", "none", "--lora", "none")
    assert (options.mask, options.vae, options.lora) == (None, None, None)


# Devices


def test_dtype_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("cuda", None) == ("cuda", "float16")
    assert choose_device("cuda:0", "float32") == ("cuda:0", "float32")
    assert choose_device("cpu", None) == ("cpu", "float32")
    with pytest.raises(ValueError, match="^device 'cuda:1' is not available: use "):
        choose_device("cuda:1", None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("mps", None) == ("mps", "float32")
    message = "^dtype 'float64' does not work on mps: use one of float16, bfloat16, float32$"
    with pytest.raises(ValueError, match=message):
        choose_device("mps", "float64")
    assert choose_device("cpu", "float64") == ("cpu", "float64")


# JSON


def test_points_from_a_file() -> None:
    Path("points.json").write_text('{"drags": [{"handle": [30, 40], "target": [48, 42.5]}]}')
    drags = parse("photo.png", "--points", "points.json", "--drag", "1,2:3,4").drags
    assert drags == [((1, 2), (3, 4)), ((30, 40), (48, 42.5))]


def test_paths_in_a_file_are_relative_to_its_folder(workdir: Path) -> None:
    Path("in").mkdir()
    Path("in/mine.json").write_text('{"image": "../photo.png", "vae": "../photo.png", "model": "tiny"}')
    found = read(Path("in/mine.json"))
    assert found["image"].samefile("photo.png") and found["vae"] == str(workdir / "photo.png")
    assert found["model"] == "tiny"


def test_options_survive_json(workdir: Path) -> None:
    config = EditConfig(drag_steps=3, size=64, keep_background=False)
    drags = [(Pixel(30, 40), Pixel(48, 42.5)), (Pixel(60, 60), Pixel(60, 60))]
    options = Options(
        workdir / "photo.png",
        drags,
        mask=workdir / "mask.png",
        prompt="a ball",
        model="tiny",
        config=config,
        seed=3,
        device="cpu",
        dtype="float64",
    )
    Path("run.json").write_text(json.dumps(to_json(options)))
    assert read_options({"base": Path("run.json")}) == options
    assert to_json(options)["sha256"] == {name: sha256(workdir / f"{name}.png") for name in ("mask",)} | {
        "image": sha256(workdir / "photo.png")
    }


def test_options_override_a_file() -> None:
    Path("run.json").write_text(json.dumps(to_json(parse(*PHOTO, "--mask", "mask.png", "--seed", "3"))))
    given = ["--from", "run.json", "--drag", "35,40:40,45", "--mask", "none", "--drag-steps", "1"]
    options = parse(*given, "--no-keep-background")
    assert options.drags == [((35, 40), (40, 45))] and options.mask is None and options.seed == 3
    assert options.config == EditConfig(drag_steps=1, keep_background=False)


def test_a_changed_file_is_refused_unless_named_again() -> None:
    Path("run.json").write_text(json.dumps(to_json(parse(*PHOTO, "--mask", "mask.png"))))
    Path("photo.png").write_bytes(Path("photo.png").read_bytes() + b"more")
    with pytest.raises(ValueError) as error:
        parse("--from", "run.json")
    assert str(error.value) == (
        f"{Path('photo.png').resolve()} has changed since run.json was written: to use it anyway, name it "
        "on the command line"
    )
    assert parse("photo.png", "--from", "run.json").image == Path("photo.png")
    Path("mask.png").unlink()
    assert parse("photo.png", "--from", "run.json").mask == Path("mask.png").resolve()
    with pytest.raises(ValueError, match="there is no file .*mask.png"):
        open_input(parse("photo.png", "--from", "run.json"))
