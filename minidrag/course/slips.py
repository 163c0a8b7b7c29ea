"""Edit an image under each known slip, and put the results on one sheet with their numbers.

    python -m minidrag.course slips [--out DIR] [--exercises N ...]

Shows what each test of the exercises is for: some slips ruin an edit, others hardly show. Takes minutes.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.utils import tqdm
from PIL import Image, ImageDraw, ImageFont

from minidrag.app.draw import INK, RED
from minidrag.course import real
from minidrag.course.catalog import EXERCISES, check_numbers
from minidrag.images import WHITE
from minidrag.method.lora import LoRA
from minidrag.system.files import write_whole

TRAINING = ("lora_forward", "lora_loss")  # exercises that a LoRA is trained anew for
SIDE, GAP, LINES, LETTERS = 192, 12, 5, 15  # of the sheet: pixels, lines of text, and their size


class Row(NamedTuple):
    """One edit."""

    exercise: str
    slip: str
    image: Image.Image | None  # None: the edit stopped
    numbers: dict[str, Any]


def edits(numbers: list[int]) -> Iterator[Row]:
    """Edit without a slip, then with each of those of some exercises."""
    edit, found = real.demo_edit()
    yield Row("", "no slip", edit.raw, found)
    for number in numbers:
        exercise = EXERCISES[number - 1]
        lora = None if exercise.name in TRAINING else edit.lora
        for slip in exercise.slips:
            with real.in_place(exercise, slip.function):
                image, found = attempt(lora)
            same = image is not None and image.tobytes() == edit.raw.tobytes()
            yield Row(exercise.name, slip.name, image, found | {"same picture": same})


def attempt(lora: LoRA | None) -> tuple[Image.Image | None, dict[str, Any]]:
    try:
        edit, found = real.demo_edit(lora)
    except Exception as error:  # a wrong function may fail in any way: that is a result too
        return None, {"problem": f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"}
    return edit.raw, found


def described(numbers: dict[str, Any]) -> list[str]:
    """Numbers in lines of text."""
    if "problem" in numbers:
        return ["the edit stops:", *wrapped(numbers["problem"])]
    ball = "no ball" if numbers["ball"] is None else f"ball {numbers['ball']} px off"
    same = ["not a pixel differs"] if numbers.get("same picture") else []
    return same + [
        f"{'arrived' if numbers['arrived'] else 'not arrived'}, {numbers['remaining']} px left",
        f"{ball}, loss {'-' if numbers['loss'] is None else numbers['loss']}",
        f"background {numbers['background']}, reconstr. {numbers['reconstruction']}",
    ]


def wrapped(text: str) -> list[str]:
    """Text in lines that fit a picture."""
    font, lines = ImageFont.load_default(LETTERS), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > SIDE:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def sheet(rows: list[Row]) -> Image.Image:
    """The pictures of each exercise in a row, with their labels below; the one without a slip is first."""
    names = list(dict.fromkeys(row.exercise for row in rows))
    columns = max(sum(row.exercise == name for row in rows) for name in names)
    wide, high = SIDE + GAP, SIDE + (LINES + 3) * LETTERS + 3 * GAP
    page = Image.new("RGB", (max(columns, 4) * wide + GAP, len(names) * high + GAP), WHITE)
    draw, title = ImageDraw.Draw(page), ImageFont.load_default(LETTERS + 5)
    for line, name in enumerate(names):
        top = GAP + line * high
        heading = name.replace("_", " ") or "every function right"
        draw.text((GAP, top), heading, INK, title)
        for column, row in enumerate(row for row in rows if row.exercise == name):
            cell(page, row, GAP + column * wide, top + 2 * LETTERS)
    return page


def cell(page: Image.Image, row: Row, left: int, top: int) -> None:
    """Draw one picture and its label."""
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(LETTERS - 1)
    if row.image is not None:
        page.paste(row.image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, top))
    draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), outline=INK)
    height = top + SIDE + 4
    for text, color in [(x, RED) for x in wrapped(row.slip)] + [(x, INK) for x in described(row.numbers)]:
        draw.text((left, height), text, color, font)
        height += LETTERS + 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/slips"), help="default: %(default)s")
    some = "those of some exercises (default: all)"
    parser.add_argument("--exercises", type=int, nargs="+", metavar="N", help=some)


def run(args: argparse.Namespace) -> int:
    numbers = args.exercises or list(range(1, len(EXERCISES) + 1))
    check_numbers(numbers)
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    total = 1 + sum(len(EXERCISES[number - 1].slips) for number in numbers)
    for row in tqdm(edits(numbers), total=total, desc="edits"):
        rows.append(row)
        name = f"{row.exercise}: {row.slip}" if row.exercise else row.slip
        tqdm.write(f"{name:60} {'; '.join(described(row.numbers))}")
    write_whole(args.out / "slips.png", sheet(rows).save)
    values = [{"exercise": row.exercise or None, "slip": row.slip} | row.numbers for row in rows]
    text = json.dumps(values, indent=1, allow_nan=False) + "\n"
    write_whole(args.out / "slips.json", lambda path: path.write_text(text, encoding="utf-8"))
    print(f"{real.EXPLAINED}\n{args.out / 'slips.png'} and slips.json are written")
    return 0
