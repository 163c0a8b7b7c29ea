"""Edit an image under each known slip, and put the results on one sheet with their numbers.

    python -m minidrag.course slips [--out DIR] [--exercises N ...]

Shows what each test of the exercises is for: some slips ruin an edit, others hardly show. Takes minutes.
"""

import argparse
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.utils import tqdm
from PIL import Image

from minidrag.app.draw import grid
from minidrag.course import real
from minidrag.course.catalog import EXERCISES, check_numbers
from minidrag.images import WHITE
from minidrag.method.lora import LoRA
from minidrag.system.files import write_whole

TRAINING = ("lora_forward", "lora_loss")  # exercises that a LoRA is trained anew for
SIDE = 240  # pixels: height of an image on the sheet
COLUMNS = 8


class Row(NamedTuple):
    """One edit."""

    exercise: str
    slip: str
    image: Image.Image | None  # None: the edit stopped
    numbers: dict[str, Any]


def edits(numbers: list[int]) -> Iterator[Row]:
    """Edit without a slip, then with each slip of some exercises."""
    edit, right = real.demo_edit()
    yield Row("", "no slip", edit.raw, right)
    for number in numbers:
        exercise = EXERCISES[number - 1]
        lora = None if exercise.name in TRAINING else edit.lora
        for slip in exercise.slips:
            with real.in_place(exercise, exercise.with_slip(slip)):
                image, values = attempt(lora)
            same = image is not None and image.tobytes() == edit.raw.tobytes()
            yield Row(exercise.name, slip.name, image, values | {"same image": same})


def attempt(lora: LoRA | None) -> tuple[Image.Image | None, dict[str, Any]]:
    try:
        edit, numbers = real.demo_edit(lora)
    except Exception as error:  # a wrong function may fail in any way: that is a result too
        return None, {"problem": f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"}
    return edit.raw, numbers


def describe(numbers: dict[str, Any]) -> list[str]:
    """Numbers in lines of text."""
    if "problem" in numbers:
        return ["the edit stops:", *textwrap.wrap(numbers["problem"], 36)]
    ball = "no ball" if numbers["ball"] is None else f"ball {numbers['ball']} px off"
    return [
        f"{'arrived' if numbers['arrived'] else 'not arrived'}, {numbers['remaining']} px left",
        f"{ball}, loss {'-' if numbers['loss'] is None else numbers['loss']}",
        f"background {numbers['background']}, reconstr. {numbers['reconstruction']}",
        *(["not a pixel differs"] if numbers.get("same image") else []),
    ]


def sheet(rows: list[Row]) -> Image.Image:
    """All images with their labels, the one without a slip first; white where an edit stopped."""
    images = [row.image or Image.new("RGB", (SIDE, SIDE), WHITE) for row in rows]
    labels = ["\n".join([row.exercise, row.slip, *describe(row.numbers)]) for row in rows]
    return grid(images, COLUMNS, labels, SIDE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/slips"), help="default: %(default)s")
    parser.add_argument("--exercises", type=int, nargs="+", metavar="N", help="default: all")


def run(args: argparse.Namespace) -> int:
    numbers = args.exercises or list(range(1, len(EXERCISES) + 1))
    check_numbers(numbers)
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    total = 1 + sum(len(EXERCISES[number - 1].slips) for number in numbers)
    for row in tqdm(edits(numbers), total=total, desc="edits"):
        rows.append(row)
        name = f"{row.exercise}: {row.slip}" if row.exercise else row.slip
        tqdm.write(f"{name:60} {'; '.join(describe(row.numbers))}")
    write_whole(args.out / "slips.png", sheet(rows).save)
    print(f"{real.EXPLAINED}\n{args.out / 'slips.png'} is written")
    return 0
