"""What is asked of a run: as options on the command line, as JSON, and whether it makes sense.

One form of JSON serves for all: a finished run writes it and can be repeated from it, and a person may write
as little of it as a picture and drags. Checks that hold for every caller are elsewhere: of pictures and masks
in `images.py`, of points in `checks.py`, of settings in `config.py`. The method can be read without this.
"""

import argparse
import hashlib
import json
import math
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image
from torch import Tensor

from minidrag import images
from minidrag.checks import check_points
from minidrag.config import EditConfig
from minidrag.method.drag import Point
from minidrag.weights.model import default_device

Drag = tuple[Point, Point]  # handle and target

DTYPES = {"cpu": "float32", "cuda": "float16", "mps": "float32"}  # each kind of device's default
CONFIGS = {
    "paper": EditConfig.paper(),
    "official": EditConfig.official(),
    "thorough": EditConfig.thorough(),
}
CONFIG_HELP = "paper: to its letter; official: the authors' program; thorough: further, and slower"
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

RENAMED = {  # settings in a run.json of version 0.1
    "edited_step": "inversion_steps",
    "keep_outside": "keep_background",
    "control_from": "control_start",
    "lora_rate": "lora_lr",
    "drag_rate": "drag_lr",
}
HELP = {  # every field of EditConfig
    "steps": "DDIM steps from noise to picture",
    "inversion_steps": "how many steps up from the picture lies the latent that is dragged: more, freer",
    "block": "the UNet's up block that the features are from, 1 to 4",
    "drag_steps": "steps of the drag at most: more for far drags",
    "drag_lr": "how much a step changes: more is faster and rougher",
    "motion_radius": "radius of the patch that is pulled, in grid units of 2 pixels at working size",
    "motion_step": "how far ahead it is pulled in a step, in grid units",
    "motion_reference": "what it shall look like there: moving, as it does now; start, as in the original",
    "track_radius": "radius in which a handle is looked for again, in grid units",
    "mask_weight": "how strongly the outside of the mask is held",
    "tolerance": "how near a handle must come to its target, in grid units",
    "motion_loss": "sum or mean over the patch's features",
    "lora_rank": "the LoRA's rank",
    "lora_targets": "projections of the attention that get one: qk, qkv or qkvo",
    "lora_steps": "training steps: fewer are faster and keep the picture less well",
    "lora_batch": "samples in a step: fewer need less memory",
    "lora_lr": "its learning rate",
    "control_start": "denoising step from which on the edit looks at the original's keys and values",
    "control_blocks": "in how many of the UNet's up blocks it does, counted from the last",
    "size": "shorter side that the model works at, in pixels (default: what it was trained on)",
    "keep_background": "keep the original's own pixels outside the mask",
    "checkpointing": "need less memory and more time",
}


@dataclass(frozen=True)
class Request:
    """All that decides what comes out of a run.

    drags: (x, y) in the picture's pixels. mask: None: everything may change. model, vae: as for
    `load_model`. lora: a file, None: train one. device, dtype: as for `choose_device`.
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


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help lists all options)")


def build_parser(description: str | None = None) -> Parser:
    # SUPPRESS: what was not given is not there, and does not override what --from says.
    parser = Parser("demo.py", "demo.py [PHOTO] [options]", description, allow_abbrev=False)
    parser.formatter_class, parser.argument_default = argparse.RawDescriptionHelpFormatter, argparse.SUPPRESS
    add = parser.add_argument_group("what to do").add_argument
    add("picture", nargs="?", metavar="PHOTO", help="a picture; without one, one that comes along")
    add("--drag", action="append", metavar="X,Y:X,Y", help="from where to where, in pixels; once per handle")
    add("--points", type=path, metavar="FILE.json", help="drags from a file in the form of run.json")
    add("--mask", type=path, metavar="MASK.png", help="white where it may change; none: everywhere")
    add("--prompt", help="what the picture shows")
    add("--from", dest="base", type=path, metavar="run.json", help="repeat a run; other options change it")
    add("--out", type=path, metavar="DIR", help="folder for the results (default: a new one in runs)")
    add = parser.add_argument_group("the model").add_argument
    add("--model", help="sd15, tiny, a folder, a .safetensors file or a hub id (default for a PHOTO: sd15)")
    add("--vae", help="folder, file or hub id of another VAE; none: the model's own")
    add("--lora", type=path, metavar="FILE", help="a LoRA to use in place of training one; none: train")
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    add("--dtype", help=f"{', '.join(FLOATS)} (default: float16 on cuda, else float32)")
    add("--seed", type=int, help="of the LoRA's training (default: 0)")
    add_settings(parser)
    return parser


def add_settings(parser: Parser) -> None:
    """An option for every field of EditConfig."""
    everything = parser.add_argument_group("all settings at once")
    everything.add_argument("--config", choices=CONFIGS, help=CONFIG_HELP)
    groups = {"lora": parser.add_argument_group("the LoRA, which is trained on the picture")}
    rest = parser.add_argument_group("the edit")
    for entry in fields(EditConfig):
        name, text = "--" + entry.name.replace("_", "-"), HELP[entry.name]
        values = {which: getattr(config, entry.name) for which, config in CONFIGS.items()}
        others = [f"; {which} {value}" for which, value in values.items() if value != entry.default]
        if entry.default is not None:
            text += f" ({entry.default}{''.join(others)})"
        add = groups.get(entry.name.partition("_")[0], rest).add_argument
        if entry.type is bool:
            add(name, action=argparse.BooleanOptionalAction, help=text)
        else:
            kind = entry.type if entry.type in (float, str) else int
            add(name, type=kind, metavar=kind.__name__.upper(), help=text)


def path(text: str) -> Path:
    """A path on the command line; refuses an empty one, which would mean the folder that one is in."""
    if not text:
        raise ValueError("the name of a file is empty")
    return Path(os.path.expanduser(text))


def read_request(given: dict[str, Any]) -> Request:
    """Puts together what the options, or else the run to repeat, or else the defaults say.

    given: the options by name, those that were not given left out. Raises ValueError, one sentence.
    """
    own = {name: value for name, value in given.items() if name in KINDS and name != "config"}
    if "picture" in own:
        own["picture"] = path(own["picture"])  # here, as argparse would convert its absence too
    own |= {name: None for name in ("mask", "vae", "lora") if str(own.get(name)) == "none"}
    values = read(given["base"], replaced=own) if "base" in given else {}
    drags = [parse_drag(text) for text in given.get("drag", [])]
    if "points" in given:
        drags += read(given["points"], replaced=FILES).get("drags", [])
    values |= own | ({"drags": drags} if "points" in given or drags else {})
    config = CONFIGS[given["config"]] if "config" in given else values.get("config", EditConfig())
    settings = {entry.name: given[entry.name] for entry in fields(EditConfig) if entry.name in given}
    values["config"] = replace(config, **settings)
    if "picture" not in values:
        raise ValueError(f"{given.get('base', 'the command')} names no picture: give one")
    if not values.get("drags"):
        raise ValueError("no drag: give at least one --drag X,Y:X,Y, from where to where in pixels")
    if not 0 <= values.get("seed", 0) < 2**63:
        raise ValueError(f"--seed {values['seed']} is not possible: choose 0 to 2**63 - 1")
    values["device"], values["dtype"] = choose_device(values.get("device"), values.get("dtype"))
    return Request(**values)


def open_input(asked: Request) -> tuple[Image.Image, Tensor | None]:
    """The picture and its mask; all that can be checked before a model is loaded is checked.

    Raises ValueError, one sentence.
    """
    picture = images.load_picture(asked.picture)
    mask = images.load_mask(asked.mask, picture.size) if asked.mask else None
    check_points(picture.size, asked.handles, asked.targets, mask)
    if asked.lora and not asked.lora.is_file():
        raise ValueError(f"there is no LoRA file {asked.lora}")
    return picture, mask


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
    except (OSError, ValueError, RecursionError) as error:  # the last for very deep brackets
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
        numbers = [type(number) in (int, float) for name in ("handle", "target") for number in entry[name]]
        if len(entry) == 2 and all(numbers):
            return point(entry["handle"]), point(entry["target"])
    except (LookupError, ValueError, TypeError, OverflowError):  # the last for an absurdly long number
        pass
    form = '{"handle": [x, y], "target": [x, y]}'
    raise ValueError(f"{shown(entry)} is no drag: write {form}, in pixels")


def configured(config: EditConfig, values: dict[str, Any]) -> EditConfig:
    """The config with other values; ValueError for unknown names and values of the wrong kind."""
    kinds: dict[str, Any] = {entry.name: entry.type for entry in fields(EditConfig)}
    values = {RENAMED.get(name, name): value for name, value in values.items()}
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
