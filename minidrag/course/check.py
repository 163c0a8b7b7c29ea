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
from math import isfinite
from pathlib import Path
from typing import Any

from minidrag.course.catalog import EXERCISES, check_numbers, file_name
from minidrag.course.judge import EXACT, Verdict, edit_with, judge_file
from minidrag.course.real import EXPLAINED
from minidrag.course.sandbox import Stopped, in_process

EDIT_LIMIT = 300  # seconds for the edit of the demo, which takes about 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="as laid out by `new`")
    parser.add_argument("numbers", type=int, nargs="*", metavar="N", help="exercises (default: all)")
    parser.add_argument(
        "--edit", action="store_true", help="edit an image with all that are right, to edit.png"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the inputs, one per student (default: 0)")
    parser.add_argument("--json", action="store_true", help="print JSON for a grader")
    limit = "seconds for an exercise (default: %(default)s)"
    parser.add_argument("--time-limit", type=float, default=10, metavar="SECONDS", help=limit)


def verdicts(folder: Path, numbers: list[int], seed: int, limit: float) -> Iterator[Verdict]:
    """Judge exercises, each in its own process."""
    for number in numbers:
        try:
            yield in_process(judge_file, folder / file_name(number), number, seed, limit=limit)
        except Stopped as stop:
            yield Verdict(number, EXERCISES[number - 1].name, problem=str(stop))


def described(verdict: Verdict) -> str:
    """Lines on one exercise."""
    exercise = EXERCISES[verdict.number - 1]
    state = "right" if verdict.right else verdict.problem if not verdict.outputs else "not right yet"
    lines = [f"{verdict.number:2} {verdict.name:16} {state}"]
    for name, found in verdict.outputs.items():
        lines.append(f"   {name + ':':28} {in_words(found, exercise.tolerance)}")
    if verdict.outputs and verdict.problem:
        lines.append(f"   {verdict.problem}")
    if verdict.slip:
        lines.append(f"   likely slip: {verdict.slip}. {verdict.hint}")
    elif verdict.outputs and not verdict.right and not verdict.problem:
        unlike = any(isinstance(found, str) for found in verdict.outputs.values())
        formula, docstring = "compare with the formula, term by term", "begin with what the docstring returns"
        lines.append(f"   no known slip gives these numbers: {docstring if unlike else formula}")
    return "\n".join(lines)


def in_words(found: float | str, tolerance: float) -> str:
    if isinstance(found, str):
        return found
    rounding = " (rounding, which is right too)" if found <= tolerance else ""
    return "exact" if found <= EXACT else f"largest difference {found:.2g}{rounding}"


def as_json(verdict: Verdict) -> dict[str, Any]:
    """A verdict for JSON, which has no infinity."""
    values = asdict(verdict)
    values["outputs"] = {
        name: found if isinstance(found, str) or isfinite(found) else str(found)
        for name, found in verdict.outputs.items()
    }
    return values


def edit(folder: Path, found: list[Verdict]) -> dict[str, Any]:
    """The edit with all exercises that are right; the project's own functions do the rest."""
    files = {verdict.number: file_name(verdict.number) for verdict in found if verdict.right}
    if not files:
        return {"problem": "no edit: none of these exercises is right yet"}
    try:
        return {"exercises": list(files)} | in_process(edit_with, folder, files, limit=EDIT_LIMIT)
    except Stopped as stop:
        return {"exercises": list(files), "problem": f"the edit stops: {stop}"}


def tell_edit(folder: Path, numbers: dict[str, Any]) -> str:
    if "problem" in numbers:
        return numbers["problem"]
    shown = ", ".join(f"{name} {value}" for name, value in numbers.items() if name != "exercises")
    own = ", ".join(map(str, numbers["exercises"]))
    return f"edit with your exercises {own}: {folder / 'edit.png'}\n   {shown}\n{EXPLAINED}"


def run(args: argparse.Namespace) -> int:
    check_arguments(args)
    # Whole paths: the processes may have started in another folder.
    folder, numbers = args.folder.resolve(), args.numbers or list(range(1, len(EXERCISES) + 1))
    found: list[Verdict] = []
    for verdict in verdicts(folder, numbers, args.seed, args.time_limit):
        found.append(verdict)
        if not args.json:
            print(described(verdict), flush=True)
    edited = edit(folder, found) if args.edit else None
    right = sum(verdict.right for verdict in found)
    if args.json:
        values = {"seed": args.seed, "right": right, "of": len(found), "exercises": list(map(as_json, found))}
        json.dump(values | ({"edit": edited} if args.edit else {}), sys.stdout, indent=1, allow_nan=False)
        print()
    else:
        print(f"{right} of {len(found)} right", *([tell_edit(folder, edited)] if edited else []), sep="\n")
    return int(right < len(found) or bool(edited and "problem" in edited))


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for what cannot be checked."""
    if not args.folder.is_dir():
        raise ValueError(
            f"there is no folder {args.folder}: lay one out with `python -m minidrag.course new`"
        )
    check_numbers(args.numbers)
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed must be 0 to 2**63 - 1, got {args.seed}")
    if not 0 < args.time_limit < float("inf"):
        raise ValueError(f"--time-limit must be above 0, got {args.time_limit:g}")
