"""Edits one picture: what lies under a point goes where you say, and the rest stays.

python demo.py                                          # the small model and a picture that come along
python demo.py photo.jpg --drag 120,200:180,190         # Stable Diffusion 1.5
python demo.py --from runs/photo-1/run.json --seed 1    # an earlier run again, with another seed
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub.utils import tqdm
from PIL import Image
from torch import Tensor

from minidrag import advice, images, request, runs, tiny
from minidrag.edit import EditConfig, check, check_config, check_points, drag_edit, stage
from minidrag.request import Request
from minidrag.weights import Model, load_model

CONFIGS = {"paper": EditConfig(), "official": EditConfig.official()}
MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # in PyTorch's errors, any device
HELP = {  # every field of EditConfig
    "steps": "DDIM steps from noise to picture",
    "edited_step": "how many steps up from the picture lies the latent that is dragged: more, freer",
    "block": "the UNet's up block that the features are from, 1 to 4",
    "drag_steps": "steps of the drag at most: more for far drags",
    "drag_rate": "how much a step changes: more is faster and rougher",
    "motion_radius": "radius of the patch that is pulled, in grid units of 2 pixels at working size",
    "track_radius": "radius in which a handle is looked for again, in grid units",
    "mask_weight": "how strongly the outside of the mask is held",
    "tolerance": "how near a handle must come to its target, in grid units",
    "motion_loss": "sum or mean over the patch's features",
    "lora_rank": "the LoRA's rank",
    "lora_targets": "projections of the attention that get one: qk, qkv or qkvo",
    "lora_steps": "training steps: fewer are faster and keep the picture less well",
    "lora_batch": "samples in a step: fewer need less memory",
    "lora_rate": "its learning rate",
    "control_from": "denoising step from which on the edit looks at the original's keys and values",
    "size": "shorter side that the model works at, in pixels (default: what it was trained on)",
    "keep_outside": "keep the original's own pixels outside the mask",
    "checkpointing": "need less memory and more time",
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help lists all options)")


def build_parser() -> Parser:
    # SUPPRESS: what was not given is not there, and does not override what --from says.
    summary, _, examples = str(__doc__).partition("\n\n")
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        "demo.py", "demo.py [PHOTO] [options]", summary, examples, formatter_class=form, allow_abbrev=False
    )
    parser.argument_default = argparse.SUPPRESS
    add = parser.add_argument_group("what to do").add_argument
    add("picture", nargs="?", metavar="PHOTO", help="a picture; without one, one that comes along")
    add("--drag", action="append", metavar="X,Y:X,Y", help="from where to where, in pixels; once per handle")
    add("--points", type=Path, metavar="FILE.json", help="drags from a file in the form of run.json")
    add("--mask", metavar="MASK.png", help="white where the picture may change; none: everywhere")
    add("--prompt", help="what the picture shows")
    add("--from", dest="base", type=Path, metavar="run.json", help="repeat a run; other options change it")
    add("--out", type=Path, metavar="DIR", help="folder for the results (default: a new one in runs)")
    add = parser.add_argument_group("the model").add_argument
    add("--model", help="sd15, tiny, a folder, a .safetensors file or a hub id (default for a PHOTO: sd15)")
    add("--vae", help="folder, file or hub id of another VAE; none: the model's own")
    add("--lora", metavar="FILE", help="a LoRA to use in place of training one; none: train")
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    add("--dtype", help=f"{', '.join(request.FLOATS)} (default: float16 on cuda, else float32)")
    add("--seed", type=int, help="of the LoRA's training (default: 0)")
    add_settings(parser)
    return parser


def add_settings(parser: Parser) -> None:
    """An option for every field of EditConfig."""
    everything = parser.add_argument_group("all settings at once")
    everything.add_argument("--config", choices=CONFIGS, help="paper, or official: the authors' program")
    groups = {"lora": parser.add_argument_group("the LoRA, which is trained on the picture")}
    rest = parser.add_argument_group("the edit")
    for field in fields(EditConfig):
        name, text = "--" + field.name.replace("_", "-"), HELP[field.name]
        paper, official = (getattr(config, field.name) for config in CONFIGS.values())
        if paper is not None:
            text += f" ({paper})" if paper == official else f" (paper {paper}, official {official})"
        add = groups.get(field.name.partition("_")[0], rest).add_argument
        if field.type is bool:
            add(name, action=argparse.BooleanOptionalAction, help=text)
        else:
            kind = field.type if field.type in (float, str) else int
            add(name, type=kind, metavar=kind.__name__.upper(), help=text)


def read_request(given: dict[str, Any]) -> Request:
    """Puts together what the options, or else the run to repeat, or else the defaults say."""
    own = {name: value for name, value in given.items() if name in request.KINDS}
    own |= {name: None for name in ("mask", "vae", "lora") if own.get(name) == "none"}
    own |= {name: Path(own[name]).expanduser() for name in request.FILES if own.get(name)}
    base = given.get("base", None if "picture" in given else tiny.DEMO / "drag.json")
    values = request.read(base, replaced=own) if base else {}
    drags = [request.parse_drag(text) for text in given.get("drag", [])]
    if "points" in given:
        drags += request.read(given["points"], replaced=request.FILES).get("drags", [])
    values |= own | ({"drags": drags} if "points" in given or drags else {})
    config = CONFIGS[given["config"]] if "config" in given else values.get("config", EditConfig())
    settings = {field.name: given[field.name] for field in fields(EditConfig) if field.name in given}
    values["config"] = replace(config, **settings)
    if "picture" not in values:
        raise ValueError(f"{base} names no picture: give one")
    if not values.get("drags"):
        raise ValueError("no drag: give at least one --drag X,Y:X,Y, from where to where in pixels")
    if not 0 <= values.get("seed", 0) < 2**63:
        raise ValueError(f"--seed {values['seed']} is not possible: choose 0 to 2**63 - 1")
    values["device"], values["dtype"] = request.choose_device(values.get("device"), values.get("dtype"))
    return Request(**values)


class Progress:
    """A bar for every stage, with the time that it still takes."""

    def __init__(self) -> None:
        self.name, self.bar = "", None

    def __call__(self, name: str, done: int, total: int) -> None:
        if name != self.name:
            self.close()
            self.name, self.bar = name, tqdm(desc=f"{name:10}", total=total, initial=done)
        elif self.bar is not None:
            self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def run(asked: Request, out: Path) -> None:
    """Edits the picture and writes the results to a folder."""
    picture, mask = open_input(asked)
    handles, targets, seconds = asked.handles, asked.targets, {}
    with runs.output(out) as folder, closing(Progress()) as progress:
        say(f"model: {asked.model}, {asked.dtype} on {asked.device}")
        with stage("model", 1, seconds, None):
            model = load(asked)
        check(model, picture.size, handles, targets, mask, asked.config)
        say(*(f"note: {caution}" for caution in advice.before(model, picture, mask, asked)))
        with stage("LoRA", 1, seconds, None):
            trained, origin = runs.find_lora(model, picture, asked, progress)
        try:
            edit = drag_edit(
                model,
                picture,
                handles,
                targets,
                mask=mask,
                prompt=asked.prompt,
                config=asked.config,
                trained=trained,
                on_stage=progress,
            )
            seconds |= edit.seconds
            with stage("pictures", 1, seconds, None):
                runs.write(folder, model, picture, mask, asked, edit, progress)
            runs.write_json(folder / "run.json", asked, edit, seconds)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"; the LoRA was {origin}") from None
        names = sorted(file.name for file in folder.iterdir())
    parts = ", ".join(f"{name} {time:.1f}" for name, time in seconds.items())
    say("", *advice.after(edit, asked), f"LoRA: {origin}")
    say(
        f"seconds: {parts}, in all {sum(seconds.values()):.1f}",
        f"files: {', '.join(names)} in {out.resolve()}",
    )


def open_input(asked: Request) -> tuple[Image.Image, Tensor | None]:
    """The picture and its mask; all that can be checked before a model is loaded is checked."""
    picture = images.load_picture(asked.picture)
    mask = images.load_mask(asked.mask, picture.size) if asked.mask else None
    check_points(picture.size, asked.handles, asked.targets, mask)
    check_config(asked.config)
    if asked.lora and not asked.lora.is_file():
        raise ValueError(f"there is no LoRA file {asked.lora}")
    return picture, mask


def load(asked: Request) -> Model:
    source = tiny.MODEL if asked.model == "tiny" else asked.model
    return load_model(source, vae=asked.vae, device=asked.device, dtype=getattr(torch, str(asked.dtype)))


def say(*lines: str) -> None:
    for line in lines:
        print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for what cannot be done, 130 for Ctrl-C."""
    asked = None
    try:
        given = vars(build_parser().parse_args(arguments))
        asked = read_request(given)
        run(asked, given.get("out") or runs.next_folder(asked.picture))
    except KeyboardInterrupt as stop:
        return fail(f"stopped{stop}", 130)
    except FloatingPointError as error:
        half = asked is not None and asked.dtype in ("float16", "bfloat16")
        return fail(f"{error}: try {'--dtype float32' if half else 'a smaller --drag-rate or --lora-rate'}")
    except OSError as error:
        return fail(
            f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        )
    except ValueError as error:
        return fail(str(error))
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or any(words in str(error).lower() for words in MEMORY):
            return fail(
                "out of memory: try --dtype float16, --checkpointing, --lora-batch 1 or a smaller --size"
            )
        raise
    return 0


def fail(message: str, status: int = 2) -> int:
    print("minidrag:", " ".join(message.split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
