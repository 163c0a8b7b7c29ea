"""Drag the content of an image from one point to another and keep the rest.

python demo.py                                          # the small model and an image that ship
python demo.py photo.jpg --drag 120,200:180,190         # Stable Diffusion 1.5
python demo.py --from runs/photo-1/run.json --seed 1    # an earlier run again, with another seed
python demo.py --page                                   # the same with a mouse, in the browser
"""

import sys

if __name__ == "__main__" and "--page" in sys.argv[1:]:  # before PyTorch is imported: the page opens at once
    from minidrag.page.serve import main as serve

    sys.exit(serve(sys.argv[1:]))

from collections.abc import Sequence
from pathlib import Path

import torch

from minidrag import tiny
from minidrag.app import advice, runs
from minidrag.app.lora_cache import find_lora
from minidrag.app.options import Options, build_parser, open_input, read_options
from minidrag.app.progress import Progress
from minidrag.edit import drag_edit
from minidrag.points import to_task
from minidrag.weights import lora_file
from minidrag.weights.model import load_model

MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # in PyTorch's errors, any device


def run(options: Options, out: Path | None) -> None:
    """Edit the image and write the results to a folder; None: a new one."""
    image, mask = open_input(options)
    prompt, config, seed = options.prompt, options.config, options.seed
    progress = Progress()
    with runs.output(out, options.image) as folder:
        say(f"model: {options.model}, {options.dtype} on {options.device}")
        with progress.timed("model"):
            dtype = getattr(torch, str(options.dtype))
            model = load_model(options.model, vae=options.vae, device=options.device, dtype=dtype)
        to_task(model, image.size, options.handles, options.targets, mask, config)  # before the long training
        say(*(f"note: {caution}" for caution in advice.before(model, image, mask, options)))
        if options.lora:
            lora = lora_file.read(options.lora, model.unet, model.text_encoder)
            origin = f"read from {options.lora}"
        else:
            lora, origin = find_lora(model, image, prompt, config, seed, progress)
        try:
            edit = drag_edit(
                model,
                image,
                options.handles,
                options.targets,
                mask=mask,
                prompt=prompt,
                config=config,
                lora=lora,
                progress=progress,
            )
            runs.write(folder, model, image, mask, options, edit, progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"the LoRA was {origin}") from None
        names = ", ".join(sorted(file.name for file in folder.iterdir()))
    parts = ", ".join(f"{name} {time:.1f}" for name, time in progress.seconds.items())
    say("", *advice.after(edit, options), f"LoRA: {origin}")
    say(
        f"seconds: {parts}, total {sum(progress.seconds.values()):.1f}",
        f"files: {names} in {folder.parent.resolve()}",
    )


def say(*lines: str) -> None:
    for line in lines:
        print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0, 2 for what cannot be done, 130 for Ctrl-C."""
    options = None
    try:
        given = vars(build_parser(__doc__).parse_args(arguments))
        if "image" not in given:
            given.setdefault("base", tiny.DEMO / "drag.json")
        options = read_options(given)
        run(options, given.get("out"))
    except KeyboardInterrupt as stop:
        return fail(f"stopped: {str(stop) or 'nothing was finished'}", 130)
    except FloatingPointError as error:
        half = options is not None and options.dtype in ("float16", "bfloat16")
        return fail(f"{error}: try {'--dtype float32' if half else 'a smaller --drag-lr or --lora-lr'}")
    except OSError as error:
        named = error.filename and error.strerror
        return fail(f"{error.filename}: {error.strerror}" if named else str(error))
    except ValueError as error:
        return fail(str(error))
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error).lower() for words in MEMORY):
            raise
        settings = "--dtype float16, --checkpointing, --lora-batch 1, or a smaller --size"
        return fail(f"out of memory: try {settings}")
    return 0


def fail(message: str, status: int = 2) -> int:
    print("minidrag:", " ".join(message.split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
