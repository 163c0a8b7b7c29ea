"""Check exercises: right, or off by how much and the likely slip.

    python -m minidrag.course check FOLDER [N ...] [--edit] [--seed SEED] [--json]

Exits with 0 if all that were checked are right, with 1 if not, and with 2 for a folder or number that does
not exist.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minidrag.course.catalog import EXERCISES, check_numbers, file_name
from minidrag.course.judge import EXACT, Verdict, edit_with, judge_file
from minidrag.course.real import EXPLAINED
from minidrag.course.sandbox import Stopped, in_process

EDIT_LIMIT = 300  # seconds for the edit of the demo, which takes about 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="as laid out by `new`")
    add("numbers", type=int, nargs="*", metavar="N", help="exercises (default: all)")
    add("--edit", action="store_true", help="edit an image with all that are right, to edit.png")
    add("--seed", type=int, default=0, help="of the inputs, one per student (default: 0)")
    add("--json", action="store_true", help="print JSON for a grader")
    limit = "seconds for an exercise (default: %(default)s)"
    add("--time-limit", type=float, default=10, metavar="SECONDS", help=limit)


def judge_all(folder: Path, numbers: list[int], seed: int, limit: float) -> Iterator[Verdict]:
    """Judge exercises, each in its own process."""
    for number in numbers:
        try:
            yield in_process(judge_file, folder / file_name(number), number, seed, limit=limit)
        except Stopped as stop:
            yield Verdict(number, EXERCISES[number - 1].name, problem=str(stop))


def describe(verdict: Verdict) -> str:
    """Lines on one exercise."""
    exercise = EXERCISES[verdict.number - 1]
    state = "right" if verdict.right else verdict.problem if not verdict.outputs else "not right yet"
    lines = [f"{verdict.number:2} {verdict.name:16} {state}"]
    for name, difference in verdict.outputs.items():
        lines.append(f"   {name + ':':28} {in_words(difference, exercise.tolerance)}")
    if verdict.outputs and verdict.problem:
        lines.append(f"   {verdict.problem}")
    if verdict.slip:
        lines.append(f"   likely slip: {verdict.slip}. {verdict.hint}")
    elif verdict.outputs and not verdict.right and not verdict.problem:
        lines.append("   this matches no known mistake: compare with the formula, term by term")
    return "\n".join(lines)


def in_words(difference: float | str, tolerance: float) -> str:
    if isinstance(difference, str):
        return difference
    rounding = " (rounding, which is right too)" if difference <= tolerance else ""
    return "exact" if difference <= EXACT else f"largest difference {difference:.2g}{rounding}"


def edit(folder: Path, verdicts: list[Verdict]) -> dict[str, Any]:
    """The edit with all exercises that are right; the project's own functions do the rest."""
    files = {verdict.number: file_name(verdict.number) for verdict in verdicts if verdict.right}
    if not files:
        return {"problem": "no edit: none of these exercises is right yet"}
    try:
        return {"exercises": list(files)} | in_process(edit_with, folder, files, limit=EDIT_LIMIT)
    except Stopped as stop:
        return {"exercises": list(files), "problem": f"the edit stops: {stop}"}


def describe_edit(folder: Path, numbers: dict[str, Any]) -> str:
    if "problem" in numbers:
        return numbers["problem"]
    values = ", ".join(f"{name} {value}" for name, value in numbers.items() if name != "exercises")
    exercises = ", ".join(map(str, numbers["exercises"]))
    return f"edit with your exercises {exercises}: {folder / 'edit.png'}\n   {values}\n{EXPLAINED}"


def run(args: argparse.Namespace) -> int:
    check_arguments(args)
    folder = args.folder.resolve()  # the processes may have started in another one
    numbers = args.numbers or list(range(1, len(EXERCISES) + 1))
    verdicts: list[Verdict] = []
    for verdict in judge_all(folder, numbers, args.seed, args.time_limit):
        verdicts.append(verdict)
        if not args.json:
            print(describe(verdict), flush=True)
    edited = edit(folder, verdicts) if args.edit else {}
    right = sum(verdict.right for verdict in verdicts)
    if args.json:
        values = {"seed": args.seed, "right": right, "of": len(verdicts)}
        values |= {"exercises": list(map(asdict, verdicts))} | ({"edit": edited} if edited else {})
        json.dump(values, sys.stdout, indent=1, allow_nan=False)
        print()
    else:
        print(
            f"{right} of {len(verdicts)} right",
            *([describe_edit(folder, edited)] if edited else []),
            sep="\n",
        )
    return int(right < len(verdicts) or "problem" in edited)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for what cannot be checked."""
    if not args.folder.is_dir():
        raise ValueError(f"there is no folder {args.folder}: make it with `python -m minidrag.course new`")
    check_numbers(args.numbers)
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed must be 0 to 2**63 - 1, got {args.seed}")
