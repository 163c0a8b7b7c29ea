"""Every kind of bad file, in every place that takes one: a sentence, nothing run, nothing written."""

import json
import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.command import PHOTO, demo, listing, raising
from support.dragbench import PAIRS, learned, set_meta, to_truth, write_case

from minidrag.bench import __main__ as bench
from minidrag.bench import harness, scenes
from minidrag.bench.cases import make_cases
from minidrag.bench.instructions import read_case
from minidrag.tiny import train

pytestmark = pytest.mark.usefixtures("workdir")

Put = Callable[[Path], object]
DRAG = PHOTO[1:]


def link(target: str) -> Put:
    return lambda path: path.symlink_to(target)


def text(content: str | bytes) -> Put:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def sparse(size: int) -> Put:
    def put(path: Path) -> None:
        path.touch()
        os.truncate(path, size)

    return put


def saved(image: Image.Image, cut: float = 1.0) -> Put:
    def put(path: Path) -> None:
        image.save(path, "PNG")
        path.write_bytes(path.read_bytes()[: int(cut * path.stat().st_size)])

    return put


ANY: dict[str, tuple[Put, str]] = {  # what is put at a path, and words of the complaint
    "missing": (lambda path: None, "there is no file|is missing"),
    "a folder": (Path.mkdir, "is a folder"),
    "a pipe": (os.mkfifo, "is not a regular file"),
    "a device": (link("/dev/zero"), "is not a regular file"),
    "a link to nothing": (link("nowhere"), "there is no file|is missing"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "cannot be opened: Too many levels"),
}
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 96 80\n%%EndComments\nshowpage\n%%EOF\n"
PICTURES = ANY | {
    "empty": (text(""), "is not an image in a known format"),
    "words": (text("hello"), "is not an image in a known format"),
    "EPS": (text(EPS), "is not an image in a known format"),
    "SVG": (text('<svg xmlns="http://www.w3.org/2000/svg"/>'), "is not an image in a known format"),
    "cut": (saved(Image.effect_noise((96, 80), 99), 0.5), "cannot be read: image file is truncated"),
    "huge": (text(b"P4 12000 9000 0"), "is too large, more than 64,000,000 pixels: make it smaller first"),
    "a bomb": (text(b"P4 90000 90000 0"), "is too large, more than 64,000,000 pixels: make it smaller first"),
}
DEEP, DIGITS = 100_000, "9" * 5000
JSONS = ANY | {
    "empty": (text(""), "cannot be read as JSON: it is not valid JSON"),
    "a picture": (text(b"\x89PNG\r\n\x1a\n"), "cannot be read as JSON: it is not text in UTF-8"),
    "UTF-16": (text('{"drags": []}'.encode("utf-16")), "cannot be read as JSON: it is not text in UTF-8"),
    "deep list": (text("[" * DEEP + "]" * DEEP), "nested too deeply"),
    "deep object": (text('{"drags":' * DEEP + "1" + "}" * DEEP), "nested too deeply"),
    "deep in a key": (
        text('{"config": ' + "[" * 900 + "]" * 900 + "}"),
        "nested too deeply|config cannot be|",
    ),
    "NaN": (text('{"drags": [{"handle": [NaN, 1], "target": [1, 1]}]}'), "NaN is not valid JSON"),
    "infinity": (text('{"seed": -Infinity}'), "-Infinity is not valid JSON"),
    "many digits": (text(f'{{"seed": {DIGITS}}}'), "a number in it is too long"),
    "a key twice": (text('{"drags": [], "drags": []}'), "the key drags is there more than once"),
    "too large": (
        sparse(50_000_000),
        "50,000,000 bytes, at most 20,000,000 are expected",
    ),
}


def one_sentence(capsys: pytest.CaptureFixture[str], words: str, count: int = 1) -> None:
    """Check the complaints of a run: `count` lines, the first of which has words, none in Python's."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == count, lines
    for line in lines:
        assert line.startswith("minidrag: ") and len(line) < 600
        foreign = (
            r"Traceback|object|NoneType|codec|Error\b|<|subscript|unpack|literal|\bint\(|recursion|tuple"
        )
        assert not re.search(foreign, line.replace("JSON object", "")), line
    assert re.search(words, lines[0]), lines[0]


def in_json(name: str, value: Any, other: str = "--from") -> list[str]:
    """A run.json that names a file; the options that read it."""
    values = {"image": "photo.png", "drags": [{"handle": [30, 40], "target": [48, 42]}]}
    Path("in.json").write_text(json.dumps(values | {name: value}))
    return [other, "in.json"]


AS_PICTURE: dict[str, Callable[[str], list[str]]] = {  # the arguments that give a file to a command
    "photo": lambda name: [name, *DRAG],
    "photo in JSON": lambda name: in_json("image", name),
    "mask": lambda name: [*PHOTO, "--mask", name],
    "mask in JSON": lambda name: in_json("mask", name),
}
AS_JSON: dict[str, Callable[[str], list[str]]] = {
    "from": lambda name: ["--from", name],
    "from with all": lambda name: [*PHOTO, "--from", name],
    "points": lambda name: ["photo.png", "--points", name],
}


def refused_by_demo(capsys: pytest.CaptureFixture[str], options: list[str], words: str) -> None:
    before = listing(Path())
    assert demo.main([*options, "--model", "tiny", "--device", "cpu"]) == 2
    one_sentence(capsys, words)
    assert listing(Path()) == before


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    put, words = PICTURES[kind]
    put(Path("bad.png"))
    for arguments in AS_PICTURE.values():
        options = arguments("bad.png")
        refused_by_demo(capsys, options, words)
    for images in (["bad.png", "photo.png"], ["photo.png", "bad.png"]):
        assert bench.main(["features", *images]) == 2
        one_sentence(capsys, words)
    for name, file in (("animals/a", "original_image.png"), ("animals/b", "mask.png")):
        case = write_case(Path(f"bench of {file}"), name, PAIRS[name])
        (case / file).unlink()
        put(case / file)
        assert bench.main(["dragbench", f"bench of {file}", "--model", "tiny"]) == 2
        one_sentence(capsys, words, count=2)  # and that no case is left
    assert not Path("runs").exists()


@pytest.mark.parametrize("kind", JSONS)
def test_json(kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    put, words = JSONS[kind]
    put(Path("bad.json"))
    for arguments in AS_JSON.values():
        refused_by_demo(capsys, arguments("bad.json"), words)
    case = write_case(Path("bench"), "animals/b", PAIRS["animals/b"])
    if kind != "missing" and kind != "a link to nothing":
        (case / "drag_instruction.json").unlink()
        put(case / "drag_instruction.json")
        assert bench.main(["dragbench", "bench", "--model", "tiny"]) == 2
        one_sentence(capsys, f"{words}|points must be", count=2)


@pytest.mark.parametrize("kind", [*ANY, "words", "too large"])
def test_pickles(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    others: dict[str, tuple[Put, str]] = {
        "words": (text("hello"), "cannot read meta_data.pkl"),
        "too large": (sparse(10**9), "1,000,000,000 bytes, at most"),
    }
    put, words = (ANY | others)[kind]
    case = write_case(Path("bench"), "animals/a", PAIRS["animals/a"])
    (case / "meta_data.pkl").unlink()
    put(case / "meta_data.pkl")
    assert bench.main(["dragbench", "bench", "--model", "tiny"]) == 2
    one_sentence(capsys, words, count=2)


@pytest.mark.parametrize("kind", ANY)
def test_loras(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    put, words = ANY[kind]
    put(Path("bad.safetensors"))
    words = {"a folder": "has neither pytorch_lora_weights.safetensors nor"}.get(kind, words)
    refused_by_demo(capsys, [*PHOTO, "--lora", "bad.safetensors"], f"{words}|there is no LoRA file")


@pytest.mark.parametrize("kind", JSONS)
def test_results_of_an_earlier_measurement(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    put, words = JSONS[kind]
    cases, out = make_cases(1, ["light"], 0), Path("out")
    harness.run_cases(cases, to_truth, learned, out, compare=False)
    file = out / "cases" / cases[0].name / "result.json"
    file.unlink()
    put(file)
    if kind == "missing":
        return
    words = f"{words}|is not a result of"
    with pytest.raises(ValueError, match=f"({words}).*: delete it and run the command again") as caught:
        harness.results_of(cases, out)
    assert str(file) in str(caught.value)


def test_damaged_pictures_of_an_earlier_measurement() -> None:
    cases, out = make_cases(1, ["light"], 0), Path("out")
    results = harness.run_cases(cases, to_truth, learned, out, compare=False)
    file = out / "cases" / cases[0].name / "truth.png"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ValueError, match="truth.png cannot be read"):
        scenes.sheet(results, out)


# Values in JSON

WRONG = [None, True, 0, 1.5, "", "text", [], ["x"], {}, {"x": 1}, "\ud800", "\udcff", "a\0b", "~nosuchuser/x"]
KEYS = [
    "image",
    "drags",
    "mask",
    "prompt",
    "model",
    "vae",
    "lora",
    "config",
    "seed",
    "device",
    "dtype",
    "sha256",
]
KEYS += ["versions", "result", "scene", "points"]
FINE = {  # are what they should be, or mean that nothing is given
    "mask": [None],
    "vae": [None],
    "lora": [None],
    "device": [None],
    "dtype": [None],
    "config": [{}],
    "seed": [0],
    "sha256": [{}, {"x": 1}],
    "result": [{}, {"x": 1}],
    "scene": [{}, {"x": 1}],
    "versions": [{}, {"x": 1}],
    "prompt": ["", "text", "a\0b", "~nosuchuser/x"],
    "points": [],
    "model": ["text", "~nosuchuser/x"],
}


@pytest.mark.parametrize("key", KEYS)
def test_values_of_every_key(
    key: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "open_model", raising(ValueError("loaded")))
    for value in WRONG:
        options = in_json(key, value)
        before = listing(Path())
        assert demo.main([*options, "--dtype", "float32"] if key != "dtype" else options) == 2
        said = capsys.readouterr().err
        fine = any(value == other and type(value) is type(other) for other in FINE.get(key, []))
        assert (said == "minidrag: loaded\n") == fine or key in ("vae", "model"), (key, value, said)
        assert said.count("\n") == 1 and not re.search("Traceback|codec|NoneType|object has", said), (
            value,
            said,
        )
        assert listing(Path()) == before


def test_drags_of_other_programs_and_doubled_ones(capsys: pytest.CaptureFixture[str]) -> None:
    Path("points.json").write_text('{"points": [[30, 40], [48, 42], [60, 60], [61, 62]]}')
    options = demo.read_options(
        vars(demo.build_parser().parse_args(["photo.png", "--points", "points.json"]))
    )
    assert options.drags == [((30, 40), (48, 42)), ((60, 60), (61, 62))]
    doubled = ["photo.png", "--points", "points.json", "--drag", "60,60:1,1"]
    refused_by_demo(capsys, doubled, "drag 3 has the handle of drag 1, 60,60: leave one of them out")
    Path("points.json").write_text('{"points": [[30, 40], [48, 42], [60, 60]]}')
    refused_by_demo(
        capsys, ["photo.png", "--points", "points.json"], "pairs of handle and target, got 3 points"
    )


# The command line

HABITS = {  # arguments, and what is said
    "link": (["https://example.org/photo.jpg", *DRAG], "is a link: download it first, and give the file"),
    "link in capitals": (["HTTPS://example.org/photo.jpg", *DRAG], "is a link: download it first"),
    "guidance that is no number": ([*PHOTO, "--guidance", "nan"], "--guidance must be 0 to 100, got NaN"),
    "link to a mask": ([*PHOTO, "--mask", "http://example.org/m.png"], "is a link: download it first"),
    "link to points": (
        ["photo.png", "--points", "https://example.org/p.json"],
        "is a link: download it first",
    ),
    "link to a LoRA": ([*PHOTO, "--lora", "https://example.org/l"], "there is no LoRA file|is a link"),
    "dash": (["-photo.png", *DRAG], r"write \./-photo.png for a file"),
    "h": (["-hat.png", *DRAG], r"write \./-hat.png for a file"),
    "negative": (["photo.png", "--drag", "-1,40:48,42"], "write --drag=-1,40:48,42 "),
    "dash mask": ([*PHOTO, "--mask", "-mask.png"], "write --mask=-mask.png "),
    "empty device": ([*PHOTO, "--device", ""], "unknown device ''"),
    "empty dtype": ([*PHOTO, "--dtype", ""], "dtype '' does not work"),
    "meta": ([*PHOTO, "--device", "meta"], "device 'meta' is not available: use "),
    "long prompt": ([*PHOTO, "--prompt", "x" * 100_001], "the prompt has 100,001 characters: give at most"),
    "bytes": (
        [*PHOTO, "--prompt", "caf\udce9"],
        "the prompt 'caf.udce9' is not valid Unicode: write it in UTF-8",
    ),
    "long name": (["x" * 5000, *DRAG], "cannot be opened: File name too long"),
}


@pytest.mark.parametrize("case", HABITS)
def test_habits_of_people(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, words = HABITS[case]
    before = listing(Path())
    assert demo.main(arguments) == 2
    one_sentence(capsys, words)
    assert listing(Path()) == before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("https://huggingface.co/runs/model-1", "is a link: give runs/model-1"),
        ("https://huggingface.co/runs/model-1/tree/main", "is a link: give runs/model-1"),
        (
            "https://example.org/model.safetensors",
            "download it first, and give the file, or a hub id OWNER/NAME",
        ),
        ("FILE:///tmp/model.safetensors", "is a link: download it first, and give the file"),
        ("~nosuchuser/model", "does not exist: give a folder"),
        ("", "the name of the model is empty"),
    ],
)
def test_names_of_models(name: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--model", "--vae"):
        assert demo.main([*PHOTO, "--model", "tiny", option, name, "--device", "cpu"]) == 2
        one_sentence(capsys, words)
    case = write_case(Path("bench"), "animals/a", PAIRS["animals/a"])
    for command in (
        ["tiny", name],
        ["features", "--model", name],
        ["dragbench", str(case.parents[1]), "--model", name],
    ):
        assert bench.main(command) == 2
        one_sentence(capsys, words)
    assert not Path("runs").exists()


BENCHES = [
    ["scenes"],
    ["dragbench", "bench"],
    ["ablate", "--over", "block", "--values", "3"],
    ["speed"],
    ["networks"],
]
NUMBERS = {
    "--cases": (0, 1, 3),
    "--limit": (1,),
    "--seed": (0, 2, 1, 3),
    "--runs": (4,),
}


@pytest.mark.parametrize("number", ["0", "-1", "1000000000000000000000", "nan", "inf", "1.5", "", "x"])
@pytest.mark.parametrize("option", NUMBERS)
def test_counts_of_measurements(option: str, number: str, capsys: pytest.CaptureFixture[str]) -> None:
    if (option, number) in (("--seed", "0"), ("--limit", "1000000000000000000000")):
        return
    for index in NUMBERS[option]:
        assert bench.main([*BENCHES[index], f"{option}={number}"]) == 2
        one_sentence(capsys, option)


@pytest.mark.parametrize("device", ["foo", "", "meta", "mps", "cuda", "cuda:99", "cpu:7"])
def test_devices_that_are_not_there(
    device: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    words = "unknown device|is not available: use "
    assert bench.main(["networks", "--device", device]) == 2
    one_sentence(capsys, words)
    assert demo.main([*PHOTO, "--device", device]) == 2
    one_sentence(capsys, words)
    monkeypatch.setattr(sys, "argv", ["train", "out", "--device", device])
    assert train.main() == 2
    one_sentence(capsys, words)
    assert not Path("out").exists()


PLACES = [("RANK", "-1"), ("RANK", "1"), ("RANK", "x"), ("WORLD_SIZE", "-2"), ("WORLD_SIZE", "1.5")]


@pytest.mark.parametrize(("name", "value"), PLACES)
def test_places_among_processes_that_cannot_be(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"^{name} must be .*, got '?{value}'?$"):
        harness.place_among_processes()


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("order", ["C", "F", "empty", "sliced"])
def test_masks_of_every_protocol_of_python_3(
    protocol: int, order: str, capsys: pytest.CaptureFixture[str]
) -> None:
    case = write_case(Path("bench"), "animals/a", PAIRS["animals/a"])
    mask = np.random.default_rng(0).integers(0, 2, (128, 128)).astype(np.uint8)
    mask[50, 40] = 1
    shown = {
        "C": mask,
        "F": np.asfortranarray(mask),
        "empty": 0 * mask,
        "sliced": np.repeat(mask, 2, 1)[:, ::2],
    }
    set_meta(case, mask=shown[order], points=PAIRS["animals/a"])
    values = pickle.loads((case / "meta_data.pkl").read_bytes())
    (case / "meta_data.pkl").write_bytes(pickle.dumps(values | {"mask": shown[order]}, protocol))
    found = read_case(case)
    assert np.array_equal(found.mask, np.ones_like(mask) > 0 if order == "empty" else mask > 0)
