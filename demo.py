"""Drag the content of an image from one point to another and keep the rest.

python demo.py                                          # the small model and an image that ship
python demo.py photo.jpg --drag 120,200:180,190         # Stable Diffusion 1.5
python demo.py --model tiny --generate --prompt "a red ball in the middle, on grass, by day"
python demo.py --from runs/photo-1/run.json --seed 1    # an earlier run again, with another seed
python demo.py --page                                   # the same with a mouse, in the browser
"""

import sys

if __name__ == "__main__" and "--page" in sys.argv[1:]:  # before PyTorch is imported: the page opens at once
    from minidrag.page.serve import main as serve

    sys.exit(serve(sys.argv[1:]))

from collections.abc import Sequence
from pathlib import Path

from PIL.Image import Image

from minidrag import tiny
from minidrag.app import advice, runs
from minidrag.app.lora_cache import find_lora
from minidrag.app.options import Options, build_parser, open_input, open_model, read_options
from minidrag.edit import drag_edit, prepare
from minidrag.method.lora import LoRA
from minidrag.method.progress import Progress
from minidrag.model import Model
from minidrag.system import console
from minidrag.weights import lora_file

LESS_MEMORY = "try --dtype float16, --checkpointing, --lora-batch 1, or a smaller --size"


def run(options: Options, out: Path | None, report: bool = False) -> None:
    """Edit the image and write the results to a folder; None: a new one."""
    image, mask = open_input(options) if options.image else (None, None)
    prompt, config, clean, progress = options.prompt, options.config, None, Progress(show=True)
    with runs.output(out, options.image or Path("generated")) as folder:
        say(f"model: {options.model}, {options.dtype} on {options.device}")
        with progress.timed("model"):
            model = open_model(options)
        if image is None:
            image, clean = runs.generate_image(model, options, progress)
            image.save(folder / "generated.png")
            if not options.drags:
                return say(f"made {folder.parent.resolve() / 'generated.png'}: add --drag X,Y:X,Y to edit it")
            image, mask = open_input(options, folder / "generated.png")
        prepare(model, image.size, options.handles, options.targets, mask, config)  # before the long training
        say(*(f"note: {caution}" for caution in advice.before(model, image, mask, options)))
        lora, origin = obtain_lora(model, image, options, progress)
        try:
            given = {"mask": mask, "prompt": prompt, "config": config, "lora": lora, "clean": clean}
            edit = drag_edit(model, image, options.handles, options.targets, **given, progress=progress)
            missing = runs.write(folder, model, image, mask, options, edit, progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"the LoRA was {origin}") from None
        names = ", ".join(sorted(file.name for file in folder.iterdir()))
    parts = ", ".join(f"{name} {time:.1f}" for name, time in progress.seconds.items())
    found = [*advice.after(edit, options), *advice.about_fidelity(edit, image, options)]
    say("", *found, *advice.about_missing(missing), f"LoRA: {origin}")
    say(
        f"seconds: {parts}, total {sum(progress.seconds.values()):.1f}",
        f"files: {names} in {folder.parent.resolve()}",
    )
    if report and not missing:
        from minidrag.course.report import attempt  # not needed otherwise

        say(attempt(folder.parent, model, image, mask, options, edit))
    if any(isinstance(error, KeyboardInterrupt) for error in missing.values()):
        raise KeyboardInterrupt(f"the edit is in {folder.parent}")


def obtain_lora(model: Model, image: Image, options: Options, progress: Progress) -> tuple[LoRA, str]:
    """Read the LoRA that the options name, or find one for the image; return it and its origin in words."""
    if not options.lora:
        return find_lora(model, image, options.prompt, options.config, options.seed, progress)
    lora = lora_file.read(options.lora, model.unet, model.text_encoder)
    say(*(f"note: {left}" for left in lora_file.left_out(options.lora)))
    return lora, f"read from {options.lora}"


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


if __name__ == "__main__":
    sys.exit(main())
