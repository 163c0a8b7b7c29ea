"""Lay out the exercises in a folder, without touching files that are there.

python -m minidrag.course new FOLDER
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from minidrag.course import diffusion, dragging, networks
from minidrag.course.exercise import Exercise

EXERCISES: tuple[Exercise, ...] = (  # in the order in which they build on each other; numbers are from 1
    diffusion.DDIM_STEP,
    diffusion.INVERSION,
    dragging.BILINEAR,
    dragging.MOTION_LOSS,
    dragging.TRACKING,
    dragging.BACKGROUND_LOSS,
    diffusion.LORA_FORWARD,
    diffusion.LORA_LOSS,
    networks.KEY_VALUE,
    networks.TIME_EMBEDDING,
    networks.PADDING,
    dragging.ALTERNATION_STEP,
)
STUBS = Path(__file__).parent / "exercises"


def file_name(number: int) -> str:
    """Name of the file of an exercise, 1 to 12."""
    return f"{number:02}_{EXERCISES[number - 1].name}.py"


def check_numbers(numbers: Sequence[int]) -> None:
    """Raise ValueError for a number that no exercise has."""
    for number in numbers:
        if not 1 <= number <= len(EXERCISES):
            raise ValueError(f"there is no exercise {number}: they are 1 to {len(EXERCISES)}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="made if it does not exist")


def run(args: argparse.Namespace) -> int:
    args.folder.mkdir(parents=True, exist_ok=True)
    names = [file_name(number) for number in range(1, len(EXERCISES) + 1)]
    missing = [name for name in names if not (args.folder / name).exists()]
    for name in missing:
        (args.folder / name).write_bytes((STUBS / name).read_bytes())
    rest = len(names) - len(missing)
    note = f", {rest} were there and are kept" if rest else ""
    print(f"{args.folder}: {len(missing)} exercises laid out{note}")
    print(f"Write the first, then: python -m minidrag.course check {args.folder} 1")
    return 0
