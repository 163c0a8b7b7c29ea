"""Options of a run, as JSON and combined with those of the command line, and their checks.

There is one form of JSON: a finished run writes it and can be repeated from it, and a person may write just
an image and drags. Checks that every caller needs are elsewhere: of images and masks in `images.py`, of
points in `points.py`, of settings in `config.py`.
"""

import json
import math
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minidrag.config import EditConfig
from minidrag.model import Model
from minidrag.points import Pixel, check_instruction
from minidrag.system import pictures
from minidrag.system.files import check_regular, read_json, sha256, shorten
from minidrag.weights.device import check_device, default_device
from minidrag.weights.load import load_model
from minidrag.weights.lora_file import find_file

Drag = tuple[Pixel, Pixel]  # handle and target

DTYPES = {"cpu": "float32", "cuda": "float16", "mps": "float32"}  # default by device type
CONFIGS = {"paper": EditConfig.paper(), "official": EditConfig.official(), "fast": EditConfig.fast()}
FLOATS = ("float16", "bfloat16", "float32", "float64")
NAMED = ("sd15", "tiny")  # models that have a name
PLACES = ("model", "vae", "tokenizer")  # options that may be files or folders
FILES = ("image", "mask", "lora")
MAX_PROMPT = 100_000  # characters; the model reads about 300
KINDS: dict[str, Any] = {  # JSON types by key
    "image": str | None,
    "drags": list,
    "mask": str | None,
    "prompt": str,
    "negative": str,
    "guidance": int | float,
    "model": str,
    "vae": str | None,
    "tokenizer": str | None,
    "lora": str | None,
    "config": dict,
    "seed": int,
    "device": str | None,
    "dtype": str | None,
}
EXTRAS = {"sha256": dict, "versions": dict, "result": dict, "scene": dict}  # keys that are not options


@dataclass(frozen=True)
class Options:
    """Everything that decides the result of a run."""

    image: Path | None  # None: generate one
    drags: list[Drag]  # of a generated image may be empty
    mask: Path | None = None  # None: everything is editable
    prompt: str = ""
    negative: str = ""  # as for `generate`
    guidance: float = 7.5  # as for `generate`
    model: str = "sd15"  # as for `load_model`
    vae: str | None = None  # as for `load_model`
    tokenizer: str | None = None  # a folder, as for `load_model`
    lora: Path | None = None  # a file; None: train one
    config: EditConfig = field(default_factory=EditConfig)
    seed: int = 0
    device: str | None = None  # as for `choose_device`
    dtype: str | None = None  # as for `choose_device`

    @property
    def handles(self) -> list[Pixel]:
        return [handle for handle, _ in self.drags]

    @property
    def targets(self) -> list[Pixel]:
        return [target for _, target in self.drags]


def presets_help() -> str:
    """The presets, each with the first line of its docstring."""
    lines = {name: (getattr(EditConfig, name).__doc__ or "").rstrip(".") for name in CONFIGS}
    return "; ".join(f"{name}: {line[0].lower()}{line[1:]}" for name, line in lines.items())


def path(text: str) -> Path:
    """A path on the command line; an empty one, which would mean the current folder, is refused."""
    if not text:
        raise ValueError("a file name is empty")
    return Path(os.path.expanduser(text))


def read_options(given: dict[str, Any]) -> Options:
    """Combine the command line, the run to repeat, and the defaults, in this order of precedence.

    given: command-line options by name, without those that were not given; `base`, the run to repeat, may be
    the content of its file. Raises ValueError, one sentence.
    """
    own = {name: value for name, value in given.items() if name in KINDS and name != "config"}
    if "image" in own:
        own["image"] = path(own["image"])  # not by argparse, which would convert its absence too
    own |= {name: None for name in ("mask", "vae", "tokenizer", "lora") if str(own.get(name)) == "none"}
    base = given.get("base", {})
    values = parse(base, Path(), own) if isinstance(base, dict) else read(base, own)
    drags = [parse_drag(text) for text in given.get("drag", [])]
    if "points" in given:
        drags += read(given["points"], replaced=FILES).get("drags", [])
    values |= own | ({"drags": drags} if "points" in given or drags else {})
    config = CONFIGS[given["config"]] if "config" in given else values.get("config", EditConfig())
    settings = {entry.name: given[entry.name] for entry in fields(EditConfig) if entry.name in given}
    values["config"] = replace(config, **settings)
    if "generate" in given:
        if "image" in own:
            raise ValueError("--generate makes an image: give no PHOTO with it")
        values["image"] = None
        values["config"] = replace(values["config"], **{"lora_steps": 0} | settings)
    if "image" not in values:
        raise ValueError(f"{'the command' if isinstance(base, dict) else base} names no image: give one")
    if values["image"] is None:
        check_generation(values)
    elif not values.get("drags"):
        raise ValueError("no drag: give at least one --drag X,Y:X,Y, handle and target in pixels")
    check_ranges(values)
    if values.get("lora"):
        values["lora"] = find_file(values["lora"])
    values["device"], values["dtype"] = choose_device(values.get("device"), values.get("dtype"))
    options = Options(**values)
    check_prompt(options.prompt)
    check_prompt(options.negative)
    check_repetition(options.handles)
    return options


def check_ranges(values: dict[str, Any]) -> None:
    """Raise ValueError for numbers that no edit can use."""
    if not 0 <= (guidance := values.get("guidance", 1.0)) <= 100:
        raise ValueError(f"--guidance must be 0 to 100, got {shown(guidance)}")
    if not 0 <= values.get("seed", 0) < 2**63:
        raise ValueError(f"--seed must be 0 to 2**63 - 1, got {shown(values['seed'])}")


def check_prompt(prompt: str) -> None:
    """Raise ValueError for a prompt that no tokenizer takes."""
    if len(prompt) > MAX_PROMPT:
        raise ValueError(f"the prompt has {len(prompt):,} characters: give at most {MAX_PROMPT:,}")
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes of another encoding, or half a pair of \\u in JSON
        raise ValueError(
            f"the prompt {shorten(ascii(prompt))} is not valid Unicode: write it in UTF-8"
        ) from None


def check_repetition(handles: Sequence[Pixel]) -> None:
    """Raise ValueError for a handle that is given twice."""
    seen: dict[Pixel, int] = {}
    for number, (x, y) in enumerate(handles, 1):
        first = seen.setdefault(Pixel(x, y), number)
        if first != number:
            raise ValueError(
                f"drag {number} has the handle of drag {first}, {x:g},{y:g}: leave one of them out"
            )


def check_generation(values: dict[str, Any]) -> None:
    """Raise ValueError for options from which no image can be generated."""
    if not values.get("prompt", "").strip():
        raise ValueError("--generate needs a --prompt that describes the image")
    values.setdefault("drags", [])


def open_model(options: Options) -> Model:
    """Load the model that the options name."""
    others = {"vae": options.vae, "tokenizer": options.tokenizer}
    return load_model(
        options.model, **others, device=options.device, dtype=getattr(torch, str(options.dtype))
    )


def open_input(options: Options, generated: Image.Image | None = None) -> tuple[Image.Image, Tensor | None]:
    """Load the image and its mask, and check everything that can be checked without a model.

    generated: the image, if the options name none. Raises ValueError, one sentence.
    """
    image = pictures.load_image(options.image) if options.image else generated
    if image is None:
        raise ValueError("the options name no image: it is still to be generated")
    mask = pictures.load_mask(options.mask, image.size) if options.mask else None
    check_instruction(image.size, options.handles, options.targets, mask)
    if options.lora and not os.path.lexists(options.lora):
        raise ValueError(f"there is no LoRA file {options.lora}")
    if options.lora:
        check_regular(options.lora)
    return image, mask


def parse_drag(text: str) -> Drag:
    """Read "X,Y:X,Y"."""
    try:
        handle, target = (to_pixel(point.split(",")) for point in text.split(":"))
    except ValueError:
        raise ValueError(f"invalid drag {text!r}: expected X,Y:X,Y, handle and target in pixels") from None
    return handle, target


def to_pixel(values: Sequence[Any]) -> Pixel:
    """Two finite numbers from two numbers or strings; ValueError or TypeError for anything else."""
    x, y = (float(value) for value in values)
    if not (math.isfinite(x) and math.isfinite(y)):
        raise ValueError(f"{x},{y} is not a point")
    return Pixel(x, y)


def read(path: Path, replaced: Collection[str] = ()) -> dict[str, Any]:
    """Read the options in a JSON file, except for those to be `replaced`.

    Paths in it are relative to its folder. Raises ValueError, one sentence, for a broken file, unknown keys,
    values of the wrong type, and files that have changed since it was written.
    """
    values = read_json(path)
    try:
        options = parse(values, path.parent, replaced)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    checksums = values.get("sha256", {})
    for name in set(FILES) & options.keys() & checksums.keys():
        file = options[name]
        if file and file.is_file() and sha256(file) != checksums[name]:
            raise ValueError(
                f"{file} has changed since {path} was written: to use it anyway, name it on the command line"
            )
    return options


def parse(values: Any, folder: Path, replaced: Collection[str] = ()) -> dict[str, Any]:
    """Options in JSON values. folder: of relative paths."""
    try:
        values = with_drags(values)
        check_kinds(values)
        names = [name for name in values if name in KINDS and name not in replaced]
        return {name: convert(name, values[name], folder) for name in names}
    except RecursionError:
        raise ValueError("a value is nested too deeply") from None


def with_drags(values: Any) -> Any:
    """Take GoodDrag's {"points": [handle, target, ...]}, each [x, y], for drags; leave anything else."""
    if (
        not isinstance(values, dict)
        or not isinstance(flat := values.get("points"), list)
        or "drags" in values
    ):
        return values
    if len(flat) % 2:
        raise ValueError(f"points must be pairs of handle and target, got {len(flat)} points")
    drags = [
        {"handle": handle, "target": target} for handle, target in zip(flat[::2], flat[1::2], strict=True)
    ]
    return {name: value for name, value in values.items() if name != "points"} | {"drags": drags}


def check_kinds(values: Any) -> None:
    """Raise ValueError unless `values` is an object with known keys and values of the right types."""
    known = KINDS | EXTRAS
    if not isinstance(values, dict):
        raise ValueError("expected a JSON object")
    if unknown := sorted(values.keys() - known.keys()):
        raise ValueError(f"unknown keys {shorten(', '.join(unknown))}: the keys are {', '.join(KINDS)}")
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, known[name]):
            raise ValueError(f"{name} cannot be {shown(value)}")


def shown(value: Any) -> str:
    return shorten(json.dumps(value, default=lambda _: "an object"))


def convert(name: str, value: Any, folder: Path) -> Any:
    """Convert a JSON value to the type of its option."""
    if name == "config":
        return configured(EditConfig(), value)
    if name == "drags":
        return [to_drag(entry) for entry in value]
    if value is not None and name in (*FILES, *PLACES):
        return place(name, value, folder)
    return value


def place(name: str, value: str, folder: Path) -> Path | str:
    """Resolve a name in a JSON file in `folder`: a Path for FILES, else a path as text if it exists."""
    try:
        if not value or b"\0" in os.fsencode(value):
            raise ValueError(value)
    except ValueError:  # empty, or half a pair of \\u
        raise ValueError(f"{name} is {shown(value)}, which names no file") from None
    if name in FILES:
        return folder / path(value)
    if value not in NAMED and (folder / value).exists():
        return str((folder / value).resolve())
    return value


def to_drag(entry: Any) -> Drag:
    """A drag from {"handle": [x, y], "target": [x, y]}."""
    try:
        numbers = [type(number) in (int, float) for name in ("handle", "target") for number in entry[name]]
        if len(entry) == 2 and all(numbers):
            return to_pixel(entry["handle"]), to_pixel(entry["target"])
    except (LookupError, ValueError, TypeError, OverflowError):  # OverflowError: a number of many digits
        pass
    form = '{"handle": [x, y], "target": [x, y]}'
    raise ValueError(f"invalid drag {shown(entry)}: expected {form}, in pixels")


def configured(config: EditConfig, values: dict[str, Any]) -> EditConfig:
    """The config with other values; ValueError for unknown names and values of the wrong type."""
    kinds: dict[str, Any] = {entry.name: entry.type for entry in fields(EditConfig)}
    for name, value in values.items():
        if name not in kinds:
            near = "".join(f", did you mean {word}?" for word in get_close_matches(name, kinds, 1))
            raise ValueError(f"unknown setting {name}{near} (--help lists all settings)")
        kind = int | float if kinds[name] is float else kinds[name]
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind):
            raise ValueError(f"the setting {name} cannot be {shown(value)}")
    return replace(config, **values)


def to_json(options: Options) -> dict[str, Any]:
    """Inverse of `read`, with absolute paths and the files' checksums."""
    values = {entry.name: getattr(options, entry.name) for entry in fields(Options)}
    values["drags"] = [{"handle": handle, "target": target} for handle, target in options.drags]
    values["config"] = asdict(options.config)
    for name in PLACES:
        if values[name] and values[name] not in NAMED and Path(os.path.expanduser(values[name])).exists():
            values[name] = str(Path(os.path.expanduser(values[name])).resolve())
    files = {name: values[name].resolve() for name in FILES if values[name]}
    values |= {name: str(file) for name, file in files.items()}
    return values | {"sha256": {name: sha256(file) for name, file in files.items()}}


def choose_device(device: str | None, dtype: str | None) -> tuple[str, str]:
    """Names of the device and dtype to compute with; None: the fastest device, and the dtype that suits it.

    Raises ValueError for one that does not exist.
    """
    name = default_device() if device is None else device
    kind = check_device(name).type
    if (DTYPES[kind] if dtype is None else dtype) not in FLOATS or (kind, dtype) == ("mps", "float64"):
        raise ValueError(f"dtype {dtype!r} does not work on {kind}: use one of {', '.join(FLOATS[:3])}")
    return name, dtype or DTYPES[kind]
