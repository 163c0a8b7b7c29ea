"""Options on the command line and in JSON files, those of version 0.1 among them."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command import PHOTO

from minidrag.app.options import (
    EARLIER,
    HELP,
    RENAMED,
    Options,
    build_parser,
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
    other: dict[Any, str] = {int: "8", float: "0.25", int | None: "96"}
    other |= {"steps": "60", "block": "2"}
    other |= {"motion_loss": "sum", "motion_reference": "moving", "lora_targets": "qkvo"}
    other |= {"control_blocks": "3"}
    for field in fields(EditConfig):
        name = "--" + field.name.replace("_", "-")
        if field.type is bool:
            options = [f"--no-{name[2:]}" if field.default else name]
        else:
            options = [name, other.get(field.name) or other[field.type]]
        config = parse(*PHOTO, *options).config
        changed = {key for key, value in asdict(config).items() if value != getattr(EditConfig(), key)}
        assert changed == {field.name}
    with pytest.raises(SystemExit) as end:
        build_parser().parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and HELP.keys() == {field.name for field in fields(EditConfig)}
    assert all(" ".join(help.split()) in text for help in HELP.values())
    assert "(mean; paper sum)" in text and "(qk; paper qkv; official qkvo)" in text
    assert (
        "(7; paper 1; official 1)" in text
        and "(40; paper 80; official 80; fast 0)" in text
        and "(12; paper 3; official 3)" in text
    )
    assert "(start; paper moving; official moving)" in text and "(2; paper 3)" in text


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


# JSON of version 0.1


OLD_SETTINGS = {  # as version 0.1 wrote them, each with another value than its default
    "steps": 4,
    "edited_step": 3,
    "block": 2,
    "drag_steps": 2,
    "drag_rate": 0.02,
    "motion_radius": 2,
    "motion_step": 1.5,
    "motion_reference": "moving",
    "track_radius": 2,
    "mask_weight": 0.3,
    "tolerance": 1.5,
    "motion_loss": "sum",
    "lora_rank": 4,
    "lora_targets": "qkvo",
    "lora_steps": 3,
    "lora_batch": 1,
    "lora_rate": 0.001,
    "control_from": 1,
    "size": 64,
    "keep_outside": False,
    "checkpointing": True,
}
SAME_SETTINGS = EditConfig(
    steps=4,
    inversion_steps=3,
    block=2,
    warp_start=False,
    drag_levels=1,
    hold_steps=0,
    scale_radii=False,
    control_blocks=2,
    drag_steps=2,
    drag_lr=0.02,
    motion_radius=2,
    motion_step=1.5,
    motion_reference="moving",
    track_radius=2,
    mask_weight=0.3,
    tolerance=1.5,
    motion_loss="sum",
    lora_rank=4,
    lora_targets="qkvo",
    lora_steps=3,
    lora_batch=1,
    lora_lr=0.001,
    lora_lr_ratio=1.0,
    control_start=1,
    size=64,
    keep_background=False,
    checkpointing=True,
)


def write_old_run(workdir: Path, **values: Any) -> Path:
    """A run.json as version 0.1 wrote it."""
    old = {
        "picture": str(workdir / "photo.png"),
        "drags": [{"handle": [30.0, 40.0], "target": [48.0, 42.0]}],
        "mask": str(workdir / "mask.png"),
        "prompt": "a ball",
        "model": "tiny",
        "vae": None,
        "lora": None,
        "config": OLD_SETTINGS,
        "seed": 5,
        "device": "cpu",
        "dtype": "float32",
        "sha256": {"picture": sha256(workdir / "photo.png"), "mask": sha256(workdir / "mask.png")},
        "versions": {"python": "3.11.2", "torch": "2.9.0", "minidrag": "0.1.0"},
        "result": {
            "reason": "steps",
            "distances": [18.1],
            "remaining": [17.2],
            "paths": [[[30.0, 40.0], [31.0, 40.0], [31.0, 41.0]]],
            "losses": [2.5, 2.25],
            "seconds": {"model": 0.1, "LoRA": 0.5},
        },
    }
    Path("old.json").write_text(json.dumps(old | values, indent=1))
    return Path("old.json")


def test_a_run_of_version_0_1_is_read(workdir: Path) -> None:
    changed = {name for name, value in asdict(SAME_SETTINGS).items() if value != getattr(EditConfig(), name)}
    known = {RENAMED.get(name, name) for name in OLD_SETTINGS}
    assert known | EARLIER.keys() == asdict(EditConfig()).keys(), "a setting of today is forgotten"
    assert changed == asdict(EditConfig()).keys() - {"control_blocks"}, "every setting would show"
    assert read_options({"base": write_old_run(workdir)}) == Options(
        workdir / "photo.png",
        [(Pixel(30, 40), Pixel(48, 42))],
        mask=workdir / "mask.png",
        prompt="a ball",
        model="tiny",
        config=SAME_SETTINGS,
        seed=5,
        device="cpu",
        dtype="float32",
    )


def test_a_run_before_motion_step_and_motion_reference_is_read(workdir: Path) -> None:
    later = ("motion_step", "motion_reference")
    first = {name: value for name, value in OLD_SETTINGS.items() if name not in later}
    options = read_options({"base": write_old_run(workdir, config=first)})
    assert options.config == replace(SAME_SETTINGS, motion_step=1.0, motion_reference="moving")


def test_renamed_names_are_of_version_0_1_and_of_today() -> None:
    settings = {old: new for old, new in RENAMED.items() if old != "picture"}
    assert RENAMED["picture"] == "image" and "image" in {field.name for field in fields(Options)}
    assert settings.keys() == OLD_SETTINGS.keys() - asdict(EditConfig()).keys()
    assert set(settings.values()) <= asdict(EditConfig()).keys() - OLD_SETTINGS.keys()
    assert len(set(settings.values())) == len(settings)


def test_options_override_a_run_of_version_0_1(workdir: Path) -> None:
    write_old_run(workdir)
    options = parse("photo.png", "--from", "old.json", "--drag-lr", "0.5")
    assert options.image == Path("photo.png") and options.mask == workdir / "mask.png"
    assert options.config == replace(SAME_SETTINGS, drag_lr=0.5)


@pytest.mark.parametrize("name", ["photo", "mask"])
def test_a_file_changed_since_a_run_of_version_0_1_is_refused(workdir: Path, name: str) -> None:
    write_old_run(workdir)
    file = workdir / f"{name}.png"
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(ValueError, match=f"{name}.png has changed since old.json was written"):
        parse("--from", "old.json")
    again = ["photo.png"] if name == "photo" else ["--mask", "mask.png"]
    assert parse(*again, "--from", "old.json").config == SAME_SETTINGS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"edited_step": 2.5}, "old.json: the setting inversion_steps cannot be 2.5"),
        ({"keep_outside": 1}, "old.json: the setting keep_background cannot be 1"),
        ({"steps": 4, "edited_step": 5}, "old.json: inversion_steps must be at most 4, got 5"),
        ({"drag_rate": 1.0, "drag_lr": 2.0}, "old.json: the key drag_lr is there more than once, by its old"),
        ({"edited_steps": 3}, "old.json: unknown setting edited_steps, did you mean hold_steps?"),
    ],
)
def test_wrong_settings_of_version_0_1_are_refused(
    workdir: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        read(write_old_run(workdir, config=settings))
    assert str(error.value).startswith(message)
