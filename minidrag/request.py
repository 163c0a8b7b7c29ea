"""What is asked of a run, and its form in JSON.

One form serves for all: a finished run writes it and can be repeated from it, and a person may write as
little of it as a picture and drags. The method can be read without this.
"""

import hashlib
import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from minidrag.drag import Point
from minidrag.edit import EditConfig
from minidrag.weights import default_device

Drag = tuple[Point, Point]  # handle and target

DTYPES = {"cpu": "float32", "cuda": "float16", "mps": "float32"}  # each kind of device's default
FLOATS = ("float16", "bfloat16", "float32", "float64")
NAMED = ("sd15", "tiny")  # models that go by a name
FILES = ("picture", "mask", "lora")
KINDS: dict[str, Any] = {  # what the keys of a request hold in JSON
    "picture": str,
    "drags": list,
    "mask": str | None,
    "prompt": str,
    "model": str,
    "vae": str | None,
    "lora": str | None,
    "config": dict,
    "seed": int,
    "device": str | None,
    "dtype": str | None,
}
EXTRAS = {"sha256": dict, "versions": dict, "result": dict, "scene": dict}  # keys that ask for nothing


@dataclass(frozen=True)
class Request:
    """All that decides what comes out of a run.

    drags: (x, y) in the picture's pixels. mask: None: everything may change. model: "tiny", or what
    `load_model` takes, as for vae. lora: a file, None: train one. device, dtype: as for `choose_device`.
    """

    picture: Path
    drags: list[Drag]
    mask: Path | None = None
    prompt: str = ""
    model: str = "sd15"
    vae: str | None = None
    lora: Path | None = None
    config: EditConfig = field(default_factory=EditConfig)
    seed: int = 0
    device: str | None = None
    dtype: str | None = None

    @property
    def handles(self) -> list[Point]:
        return [handle for handle, _ in self.drags]

    @property
    def targets(self) -> list[Point]:
        return [target for _, target in self.drags]


def parse_drag(text: str) -> Drag:
    """Reads "X,Y:X,Y"."""
    try:
        handle, target = (point(at.split(",")) for at in text.split(":"))
    except ValueError:
        raise ValueError(f"{text!r} is no drag: write X,Y:X,Y, handle and target in pixels") from None
    return handle, target


def point(values: Sequence[Any]) -> Point:
    """Two finite numbers out of two numbers or texts; ValueError or TypeError for anything else."""
    x, y = (float(value) for value in values)
    if not (math.isfinite(x) and math.isfinite(y)):
        raise ValueError(f"{x},{y} is no point")
    return x, y


def read(path: Path, replaced: Collection[str] = ()) -> dict[str, Any]:
    """Reads the fields of a Request that a JSON file has, but for those to be `replaced`.

    Paths in it start from its folder. Raises ValueError, one sentence, for a broken file, unknown keys,
    values of the wrong kind, and files that are no longer what they were when it was written.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    try:
        check_kinds(values)
        kept = [name for name in values if name in KINDS and name not in replaced]
        found = {name: convert(name, values[name], path.parent) for name in kept}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for name in set(FILES) & found.keys() & values.get("sha256", {}).keys():
        if found[name] and found[name].is_file() and sha256(found[name]) != values["sha256"][name]:
            raise ValueError(
                f"{found[name]} has changed since {path} was written: to use it all the same, name it on the "
                "command line"
            )
    return found


def check_kinds(values: Any) -> None:
    """Raises ValueError unless `values` is an object with known keys and values of the right kinds."""
    known = KINDS | EXTRAS
    if not isinstance(values, dict):
        raise ValueError("this is no JSON object")
    if unknown := sorted(values.keys() - known.keys()):
        raise ValueError(f"unknown keys {', '.join(unknown)}: there are {', '.join(KINDS)}")
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, known[name]):
            raise ValueError(f"{name} cannot be {shown(value)}")


def shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def convert(name: str, value: Any, folder: Path) -> Any:
    """A JSON value as the field of a Request that it is for."""
    if name == "config":
        return configured(EditConfig(), value)
    if name == "drags":
        return [drag_of(entry) for entry in value]
    if value and name in FILES:
        return folder / Path(value).expanduser()
    if value and name in ("model", "vae") and value not in NAMED and (folder / value).exists():
        return str((folder / value).resolve())
    return value


def drag_of(entry: Any) -> Drag:
    """A drag out of {"handle": [x, y], "target": [x, y]}."""
    try:
        if set(entry) == {"handle", "target"}:
            return point(entry["handle"]), point(entry["target"])
    except (ValueError, TypeError, OverflowError):  # the last for an absurdly long number
        pass
    form = '{"handle": [x, y], "target": [x, y]}'
    raise ValueError(f"{shown(entry)} is no drag: write {form}, in pixels")


def configured(config: EditConfig, values: dict[str, Any]) -> EditConfig:
    """The config with other values; ValueError for unknown names and values of the wrong kind."""
    kinds: dict[str, Any] = {entry.name: entry.type for entry in fields(EditConfig)}
    for name, value in values.items():
        if name not in kinds:
            raise ValueError(f"{name} is no setting: there are {', '.join(kinds)}")
        kind = int | float if kinds[name] is float else kinds[name]
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind):
            raise ValueError(f"the setting {name} cannot be {shown(value)}")
    return replace(config, **values)


def to_json(request: Request) -> dict[str, Any]:
    """What `read` reads, with paths that hold from anywhere and the files' checksums."""
    values = {entry.name: getattr(request, entry.name) for entry in fields(Request)}
    values["drags"] = [{"handle": handle, "target": target} for handle, target in request.drags]
    values["config"] = asdict(request.config)
    for name in ("model", "vae"):
        if values[name] and values[name] not in NAMED and Path(values[name]).expanduser().exists():
            values[name] = str(Path(values[name]).expanduser().resolve())
    files = {name: values[name].resolve() for name in FILES if values[name]}
    values |= {name: str(file) for name, file in files.items()}
    return values | {"sha256": {name: sha256(file) for name, file in files.items()}}


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def choose_device(device: str | None, dtype: str | None) -> tuple[str, str]:
    """The device and the dtype's name to compute with; None: the best there is, and what suits it.

    Raises ValueError where there is no such thing.
    """
    name = device or default_device()
    try:
        kind, index = torch.device(name).type, torch.device(name).index or 0
    except RuntimeError:
        raise ValueError(f"{name} is no device: choose cpu, cuda or mps") from None
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if index >= count.get(kind, 0):
        raise ValueError(f"there is no device {name} here: choose another, such as {default_device()}")
    if (dtype or DTYPES[kind]) not in FLOATS or (kind, dtype) == ("mps", "float64"):
        raise ValueError(
            f"{dtype} is no dtype to compute with on {kind}: choose one of {', '.join(FLOATS[:3])}"
        )
    return name, dtype or DTYPES[kind]
