"""Exercises: every stub fails, every solution passes, and every slip differs from all others."""

import ast
import inspect
import pkgutil
import sys
from pathlib import Path

import pytest
from course.solutions import SOLUTIONS

from minidrag.course import real
from minidrag.course.catalog import EXERCISES, STUBS, check_numbers, file_name
from minidrag.course.exercise import Exercise, compare, likely_slip, near
from minidrag.course.sandbox import load

SEEDS = range(20)
NUMBERS = range(1, len(EXERCISES) + 1)


@pytest.fixture(params=NUMBERS, ids=[exercise.name for exercise in EXERCISES])
def number(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def exercise(number: int) -> Exercise:
    return EXERCISES[number - 1]


def test_the_stub_has_the_signature_of_the_project_and_is_not_written(
    number: int, exercise: Exercise
) -> None:
    stub = load(STUBS / file_name(number), exercise.reference.__name__)
    ours = inspect.signature(exercise.reference).parameters
    assert list(inspect.signature(stub).parameters)[1:] == list(ours)[1:]
    assert [list(inputs) for inputs in exercise.inputs(0)] == [
        list(inspect.signature(stub).parameters)
    ] * len(exercise.inputs(0))
    with pytest.raises(NotImplementedError):
        exercise.run(stub, exercise.inputs(0))


def test_there_is_a_stub_for_each_exercise_and_no_other() -> None:
    assert [path.name for path in sorted(STUBS.glob("[0-9]*.py"))] == [
        file_name(number) for number in NUMBERS
    ]
    with pytest.raises(ValueError, match="no exercise 13"):
        check_numbers([1, 13])


def test_the_solution_and_the_slips_are_told_apart(number: int, exercise: Exercise, tmp_path: Path) -> None:
    """By their outputs alone, on the inputs of every seed."""
    path = tmp_path / file_name(number)
    path.write_text(SOLUTIONS[number])
    solution = load(path, exercise.reference.__name__)
    assert len(exercise.slips) >= 3
    for seed in SEEDS:
        right = exercise.run(exercise.reference, exercise.inputs(seed))
        assert near(compare(right, exercise.run(solution, exercise.inputs(seed))), exercise.tolerance), seed
        known = {"right": right}
        for slip in exercise.slips:
            found = exercise.run(slip.function, exercise.inputs(seed))
            # A hundred times the tolerance: two right solutions may be at its opposite ends.
            same = [
                name for name, other in known.items() if near(compare(other, found), 100 * exercise.tolerance)
            ]
            assert not same, (seed, slip.name, same)
            known[slip.name] = found


def test_every_slip_is_named(exercise: Exercise) -> None:
    for slip in exercise.slips:
        found = likely_slip(exercise, 3, exercise.run(slip.function, exercise.inputs(3)))
        assert found and found.name == slip.name
    assert likely_slip(exercise, 3, exercise.run(exercise.reference, exercise.inputs(3))) is None


def test_names_of_slips_are_short_and_hints_are_sentences(exercise: Exercise) -> None:
    assert len({slip.name for slip in exercise.slips}) == len(exercise.slips)
    for slip in exercise.slips:
        assert len(slip.name) <= 45 and len(slip.hint) <= 110 and slip.hint.endswith(".")


def test_a_solution_takes_less_than_twenty_lines(number: int) -> None:
    (function,) = [x for x in ast.parse(SOLUTIONS[number]).body if isinstance(x, ast.FunctionDef)]
    assert function.end_lineno and function.end_lineno - function.lineno < 20


def test_a_function_is_put_wherever_the_project_has_it(exercise: Exercise) -> None:
    """Also where a module has imported it by name, and for the time of the context only."""
    holders = {
        f"{name}.{key}"
        for name, module in list(sys.modules.items())
        if name.startswith("minidrag.") and not name.startswith("minidrag.course")
        for key, value in vars(module).items()
        if value is exercise.reference
    }
    assert holders <= set(exercise.places)
    assert all(pkgutil.resolve_name(place) is exercise.reference for place in exercise.places)
    with real.in_place(exercise, max):
        assert all(pkgutil.resolve_name(place) is max for place in exercise.places)
    assert all(pkgutil.resolve_name(place) is exercise.reference for place in exercise.places)
