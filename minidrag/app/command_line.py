"""Drag the content of an image from one point to another and keep the rest.

minidrag                                          # the small model and an image that ship
minidrag photo.jpg --drag 120,200:180,190         # Stable Diffusion 1.5
minidrag --model tiny --generate --prompt "a red ball in the middle, on grass, by day"
minidrag --from runs/photo-1/run.json --seed 1    # an earlier run again, with another seed
minidrag page                                     # the same with a mouse, in the browser
minidrag course, minidrag bench                   # learn and measure: --help lists what they do
minidrag check FILE                               # describe a model's file and check that it loads

In a clone, python demo.py does the same as minidrag.
"""

import argparse
from collections.abc import Sequence
from dataclasses import Field, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from minidrag import tiny
from minidrag.app import advice, results
from minidrag.app.options import (
    CONFIGS,
    FLOATS,
    Options,
    open_input,
    open_model,
    path,
    presets_help,
    read_options,
)
from minidrag.app.session import Session, generate_image, open_session
from minidrag.config import EditConfig
from minidrag.edit import Edit
from minidrag.method.progress import Progress
from minidrag.system import console

LESS_MEMORY = "try --dtype float16, --checkpointing, --lora-batch 1, or a smaller --size"


def run(options: Options, out: Path | None, report: bool = False) -> None:
    """Edit the image and write the results to a folder; None: a new one."""
    if options.image:
        open_input(options)  # a file that cannot be used is refused before the model is loaded
    progress = Progress(show=True)
    with results.output(out, options.image or Path("generated")) as folder:
        say(f"model: {options.model}, {options.dtype} on {options.device}")
        with progress.timed("model"):
            model = open_model(options)
        generated = None
        if not options.image:
            generated = generate_image(model, options, progress)
            generated[0].save(folder / "generated.png")
        if not options.drags:
            file = folder.parent.resolve() / "generated.png"
            return say(f"generated {file}; to edit it, add --drag X,Y:X,Y")
        session = open_session(model, options, progress, generated)
        edit, missing = drag(session, folder)
        names = ", ".join(sorted(file.name for file in folder.iterdir()))
    say("", *advice.after(session, edit), *advice.about_missing(missing), f"LoRA: {session.origin}")
    seconds = progress.seconds | {"total": sum(progress.seconds.values())}
    say("seconds: " + ", ".join(f"{name} {time:.1f}" for name, time in seconds.items()))
    say(f"files: {names} in {folder.parent.resolve()}")
    if report and not missing:
        course = import_module("minidrag.course.report")  # by name: it stands on top of this
        say(course.attempt(folder.parent, session, edit))
    if any(isinstance(error, KeyboardInterrupt) for error in missing.values()):
        raise KeyboardInterrupt(f"the edit is in {folder.parent}")


def drag(session: Session, folder: Path) -> tuple[Edit, dict[str, BaseException]]:
    """Edit and write the results; return what could not be written too. Says what Ctrl-C leaves."""
    say(*(f"note: {caution}" for caution in advice.before(session)))
    session.find_lora()
    try:
        edit = session.edit()
        return edit, results.write(folder, session, edit)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the LoRA was {session.origin}") from None


def say(*lines: str) -> None:
    for line in lines:
        print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0, 2 for what cannot be done, 130 for Ctrl-C."""

    def job() -> None:
        given = vars(build_parser(__doc__).parse_args(arguments))
        if "image" not in given and "generate" not in given:
            given.setdefault("base", tiny.DEMO / "drag.json")
        options = read_options(given)
        try:
            run(options, given.get("out"), given.get("report", False))
        except FloatingPointError as error:
            half = options.dtype in ("float16", "bfloat16")
            remedy = "--dtype float32" if half else "a smaller --drag-lr or --lora-lr"
            raise FloatingPointError(f"{error}: try {remedy}") from error

    return console.command(job, LESS_MEMORY)


def build_parser(description: str | None = None) -> console.Parser:
    # SUPPRESS: an option that is not given is absent, and does not override --from.
    parser = console.Parser("minidrag", "minidrag [PHOTO] [options]", description)
    parser.formatter_class, parser.argument_default = argparse.RawDescriptionHelpFormatter, argparse.SUPPRESS
    add = parser.add_argument_group("edit").add_argument
    add("image", nargs="?", metavar="PHOTO", help="an image (default: the one that ships)")
    add("--drag", action="append", metavar="X,Y:X,Y", help="handle and target in pixels; once per handle")
    add("--points", type=path, metavar="FILE.json", help="drags from a file in the form of run.json")
    add("--mask", type=path, metavar="MASK.png", help="white where the image may change; none: everywhere")
    add("--prompt", help="description of the image")
    add("--generate", action="store_true", help="make an image from --prompt and --seed, and drag in that")
    add("--negative", help="with --generate: what the image must not show")
    add("--guidance", type=float, help="with --generate: how closely it follows the prompt (default: 7.5)")
    add("--from", dest="base", type=path, metavar="run.json", help="repeat a run; other options override it")
    add("--out", type=path, metavar="DIR", help="folder for the results (default: a new one in runs)")
    add("--report", action="store_true", help="also write report.html: each step explained on this image")
    add("--page", action="store_true", help="edit with a mouse, in the browser, as minidrag page does")
    add = parser.add_argument_group("model").add_argument
    add("--model", help="sd15, tiny, a folder, a .safetensors file, or a hub id (default for a PHOTO: sd15)")
    add("--vae", help="folder, file, or hub id of another VAE; none: the model's own")
    add(
        "--tokenizer",
        metavar="FOLDER",
        help="a tokenizer, for a single file without one; none: the model's own",
    )
    add(
        "--lora",
        type=path,
        metavar="FILE",
        help="file or folder of a LoRA, instead of training one; none: train one",
    )
    add("--device", help="cpu, cuda, or mps (default: the fastest available)")
    add("--dtype", help=f"{', '.join(FLOATS)} (default: float16 on cuda, else float32)")
    add("--seed", type=int, help="of the LoRA training (default: 0)")
    add_settings(parser)
    return parser


def add_settings(parser: console.Parser) -> None:
    """Add an option for every setting."""
    presets = parser.add_argument_group("presets")
    presets.add_argument("--config", choices=CONFIGS, help=presets_help())
    groups = {"lora": parser.add_argument_group("LoRA, trained on the image")}
    rest = parser.add_argument_group("settings")
    for entry in fields(EditConfig):
        name = "--" + entry.name.replace("_", "-")
        add = groups.get(entry.name.partition("_")[0], rest).add_argument
        if entry.type is bool:
            add(name, action=argparse.BooleanOptionalAction, help=setting_help(entry))
        else:
            kind = entry.type if entry.type in (float, str) else int
            add(name, type=kind, metavar=kind.__name__.upper(), help=setting_help(entry))


def setting_help(entry: Field[Any]) -> str:
    """Help of a setting with its default and, where they differ, the paper's and the authors' value."""
    about = entry.metadata
    if entry.default is None:
        return about["help"]
    sources = [source for source in ("paper", "official") if source in about]
    values = [value_name(entry.default), *(f"{source}: {value_name(about[source])}" for source in sources)]
    return f"{about['help']} ({'; '.join(values)})"


def value_name(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
