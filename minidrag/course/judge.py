"""A student's file, judged: right, off by how much, and the likely slip."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minidrag.course import real
from minidrag.course.catalog import EXERCISES
from minidrag.course.exercise import Function, Inputs, Unfit, compare, contents, difference, likely_slip, near
from minidrag.course.sandbox import explained, load, silent

EXACT = 1e-9  # a difference that a different order of operations makes


@dataclass
class Verdict:
    """Judgment of one exercise."""

    number: int
    name: str
    right: bool = False
    outputs: dict[str, float | str] = field(default_factory=dict)  # largest difference, or a sentence
    slip: str | None = None
    hint: str | None = None
    problem: str | None = None  # a sentence on what kept it from being compared, or what else is wrong


def judge_file(path: Path, number: int, seed: int) -> Verdict:
    """Judge a file; nothing that it does raises."""
    torch.set_num_threads(1)  # the inputs are small
    exercise = EXERCISES[number - 1]
    verdict = Verdict(number, exercise.name)
    try:
        with silent() as printed:
            judge(verdict, load(path, exercise.reference.__name__), path, seed)
        if text := printed.getvalue().strip():
            verdict.right = False
            printing = f"it prints {text.splitlines()[0][:60]!r}: an edit would print it all the time"
            verdict.problem = verdict.problem or printing
    except Unfit as error:
        verdict.problem = str(error)
    return verdict


def judge(verdict: Verdict, function: Function, path: Path, seed: int) -> None:
    """Compare a function with the project's own and with the known slips."""
    exercise = EXERCISES[verdict.number - 1]
    right = exercise.run(exercise.reference, exercise.inputs(seed))
    calls = exercise.inputs(seed)
    with explained(path, "it raises"):
        outputs = exercise.run(function, calls)
    for inputs, before in zip(calls, exercise.inputs(seed), strict=True):
        if name := changed_input(inputs, before):
            raise Unfit(f"it changes its input `{name}`: compute a new one, without +=, clamp_(), or append")
    verdict.outputs = compare(right, outputs)
    verdict.right = near(verdict.outputs, exercise.tolerance)
    if not verdict.right and (slip := likely_slip(exercise, seed, right, outputs)):
        verdict.slip = slip.name
        verdict.hint = slip.hint


def changed_input(inputs: Inputs, before: Inputs) -> str | None:
    """The name of an input that a call changed."""
    for name in inputs:
        now, then = ([x.detach() for _, x in contents({name: some[name]})] for some in (inputs, before))
        if difference(then, now):
            return name
    return None


def edit_with(folder: Path, files: dict[int, str]) -> dict[str, Any]:
    """Edit the demo's image with functions from files, by exercise, and write edit.png into the folder.

    Returns the numbers of the edit, or a sentence under "problem".
    """
    try:
        with ExitStack() as stack:
            stack.enter_context(silent())
            # One after the other, so that a file that imports an earlier function gets the student's.
            for number, name in sorted(files.items()):
                exercise = EXERCISES[number - 1]
                function = load(folder / name, exercise.reference.__name__)
                stack.enter_context(real.in_place(exercise, function))
            with explained(folder, "the edit stops"):
                edit, numbers = real.demo_edit()
        edit.raw.save(folder / "edit.png")
        return numbers
    except (Unfit, OSError) as error:
        return {"problem": str(error)}
