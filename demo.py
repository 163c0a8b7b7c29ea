"""Edits one picture: what lies under a point goes where you say, and the rest stays.

python demo.py                                          # the small model and a picture that come along
python demo.py photo.jpg --drag 120,200:180,190         # Stable Diffusion 1.5
python demo.py --from runs/photo-1/run.json --seed 1    # an earlier run again, with another seed
"""

import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm

from minidrag import tiny
from minidrag.app import advice, runs
from minidrag.app.options import Request, build_parser, open_input, read_request
from minidrag.checks import check
from minidrag.edit import drag_edit
from minidrag.stages import stage
from minidrag.weights.model import load_model

MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # in PyTorch's errors, any device


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
    seconds: dict[str, float] = {}
    with runs.output(out) as folder, closing(Progress()) as progress:
        say(f"model: {asked.model}, {asked.dtype} on {asked.device}")
        with stage("model", 1, seconds, None):
            dtype = getattr(torch, str(asked.dtype))
            model = load_model(asked.model, vae=asked.vae, device=asked.device, dtype=dtype)
        check(model, picture.size, asked.handles, asked.targets, mask, asked.config)
        say(*(f"note: {caution}" for caution in advice.before(model, picture, mask, asked)))
        with stage("LoRA", 1, seconds, None):
            trained, origin = runs.find_lora(model, picture, asked, progress)
        try:
            edit = drag_edit(
                model,
                picture,
                asked.handles,
                asked.targets,
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
            raise KeyboardInterrupt(f"the LoRA was {origin}") from None
        names = ", ".join(sorted(file.name for file in folder.iterdir()))
    parts = ", ".join(f"{name} {time:.1f}" for name, time in seconds.items())
    say("", *advice.after(edit, asked), f"LoRA: {origin}")
    say(f"seconds: {parts}, in all {sum(seconds.values()):.1f}", f"files: {names} in {out.resolve()}")


def say(*lines: str) -> None:
    for line in lines:
        print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for what cannot be done, 130 for Ctrl-C."""
    asked = None
    try:
        given = vars(build_parser(__doc__).parse_args(arguments))
        if "picture" not in given:
            given.setdefault("base", tiny.DEMO / "drag.json")
        asked = read_request(given)
        run(asked, given.get("out") or runs.next_folder(asked.picture))
    except KeyboardInterrupt as stop:
        return fail(f"stopped: {str(stop) or 'nothing was finished'}", 130)
    except FloatingPointError as error:
        half = asked is not None and asked.dtype in ("float16", "bfloat16")
        return fail(f"{error}: try {'--dtype float32' if half else 'a smaller --drag-lr or --lora-lr'}")
    except OSError as error:
        named = error.filename and error.strerror
        return fail(f"{error.filename}: {error.strerror}" if named else str(error))
    except ValueError as error:
        return fail(str(error))
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error).lower() for words in MEMORY):
            raise
        settings = "--dtype float16, --checkpointing, --lora-batch 1 or a smaller --size"
        return fail(f"out of memory: try {settings}")
    return 0


def fail(message: str, status: int = 2) -> int:
    print("minidrag:", " ".join(message.split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
