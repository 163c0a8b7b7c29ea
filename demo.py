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

from minidrag import tiny
from minidrag.app import advice, results
from minidrag.app.options import Options, build_parser, open_input, open_model, read_options
from minidrag.app.session import Session, generate_image, open_session
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
        from minidrag.course.report import attempt  # not needed otherwise

        say(attempt(folder.parent, session, edit))
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


if __name__ == "__main__":
    sys.exit(main())
