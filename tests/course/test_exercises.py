"""Exercises: every stub fails, every solution passes, and every slip differs from all others."""

import ast
import inspect
import sys
from pathlib import Path

import pytest
from course.solutions import SOLUTIONS

from minidrag.course import real
from minidrag.course.catalog import EXERCISES, STUBS, check_numbers, file_name
from minidrag.course.exercise import Exercise, Slip, Unfit, compare, likely_slip, near
from minidrag.course.sandbox import load

SEEDS = range(20)
NUMBERS = range(1, len(EXERCISES) + 1)

WRITTEN = [  # exercise, a part of the solution, what a student writes in its place, the slip
    (1, " + (1 - a_end).sqrt() * noise", "", "no noise put back"),
    (1, "latent - (", "latent + (", "noise added where it is taken away"),
    (2, "range(1, levels + 1)", "range(levels, 0, -1)", "levels from the top down"),
    (2, "range(1, levels + 1)", "range(1, levels)", "one level too few"),
    (2, "denoiser(latent, level)", "denoiser(latent, level - 1)", "UNet called at the level below"),
    (
        3,
        "(features, points):",
        "(features, points):\n    points = points[:, [1, 0]]",
        "row and column swapped",
    ),
    (
        2,
        "    for level in",
        "    yield latent\n    for level in",
        "clean latent yielded too",
    ),
    (3, "d, e = row - r, column - c", "d, e = 1 - (row - r), 1 - (column - c)", "weights exchanged"),
    (4, "features.detach()", "features", "no stop-gradient"),
    (4, "start - torch.tensor(handle)", "0 * start", "original read at the present handle"),
    (4, "(g - h)", "(h - g)", "handle and target swapped"),
    (4, " * (2 * config.motion_radius + 1) ** 2", "", "mean without the area"),
    (5, "reference = origin.view.features", "reference = features", "reference and search in the same image"),
    (
        5,
        "int(start.row), int(start.column)",
        "int(handle.row), int(handle.column)",
        "reference follows the handle",
    ),
    (4, "(sample(features, q + d)", "(sample(features.detach(), q + d)", "no gradient at all"),
    (5, "patch(handle, radius", "patch(handle, 99", "whole image searched"),
    (6, "(1 - mask.to(previous))", "mask.to(previous)", "mask inverted"),
    (6, "sum()", "mean()", "mean for sum"),
    (6, "sum()", "sum().item()", "no gradient"),
    (7, "layer.scale * ", "", "scale left out"),
    (7, "layer.base(x) + ", "", "base layer left out"),
    (8, "add_noise(latent, noise", "add_noise(noise, latent", "latent and noise swapped in the mix"),
    (8, "mse_loss", "l1_loss", "absolute value for square"),
    (9, "key_value[1]", "layer.to_v(context)", "keys replaced, values not"),
    (9, "key_value[0], key_value[1]", "key_value[1], key_value[0]", "keys and values swapped"),
    (10, "torch.cos(angle), torch.sin(angle)", "torch.sin(angle), torch.cos(angle)", "sine before cosine"),
    (10, "/ half)", "/ (half - 1))", "one frequency too few"),
    (11, "(0, 1, 0, 1)", "(1, 1, 1, 1)", "symmetric padding"),
    (11, "(0, 1, 0, 1)", "(1, 0, 1, 0)", "padding on the left and the top"),
    (12, "= last.previous", "= last.latent", "no step down"),
    (12, "observe(path[level])", "observe(path[top])", "original at the wrong level"),
    (12, "Origin(task.handles", "Origin(handles", "original's handles move along"),
    (12, "idle == 3", "idle == 300", "handles that stand still go unnoticed"),
]
UNNAMED = [  # exercise, a part of the solution, what a student writes in its place
    (4, "min(config.motion_step, max(distance, 1.0))", "config.motion_step"),
    (4, "max(distance, 1.0)", "distance"),
    (4, ".abs()", ".square()"),
    (5, ".abs()", ".square()"),
    (5, "patch(handle, radius", "patch(handle, radius - 1"),
    (12, "idle == 3", "idle == 2"),
    (12, "drag_levels, 0", "drag_levels, 1"),
]
NO_CELLS = [  # in place of the list that `track` returns, and its name in the sentence
    ("[tuple(cell) for cell in matches]", "a list of 4"),
    ("[Cell(*torch.tensor(cell)) for cell in matches]", "a list of 4"),
    ("torch.tensor(matches)", "a Tensor"),
]


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
            slipped = exercise.run(exercise.with_slip(slip), exercise.inputs(seed))
            # A hundred times the tolerance: two right solutions may be at its opposite ends.
            far = 100 * exercise.tolerance
            same = [other for other, outputs in known.items() if near(compare(outputs, slipped), far)]
            assert not same, (seed, slip.name, same)
            known[slip.name] = slipped


def test_every_slip_is_named(exercise: Exercise) -> None:
    right = exercise.run(exercise.reference, exercise.inputs(3))
    for slip in exercise.slips:
        named = likely_slip(exercise, 3, right, exercise.run(exercise.with_slip(slip), exercise.inputs(3)))
        assert named and named.name == slip.name
    assert likely_slip(exercise, 3, right, right) is None


@pytest.mark.parametrize(("number", "right", "wrong", "name"), WRITTEN)
def test_slips_are_named_as_students_write_them(
    number: int, right: str, wrong: str, name: str, tmp_path: Path
) -> None:
    """A solution with one place changed, not the project's own function called in another way."""
    assert right in SOLUTIONS[number]
    path, exercise = tmp_path / file_name(number), EXERCISES[number - 1]
    path.write_text(SOLUTIONS[number].replace(right, wrong))
    function = load(path, exercise.reference.__name__)
    for seed in (0, 11):
        right_outputs = exercise.run(exercise.reference, exercise.inputs(seed))
        slip = likely_slip(exercise, seed, right_outputs, exercise.run(function, exercise.inputs(seed)))
        assert slip and slip.name == name


@pytest.mark.parametrize(("number", "right", "wrong"), UNNAMED)
def test_a_slip_without_a_name_is_not_right(number: int, right: str, wrong: str, tmp_path: Path) -> None:
    assert right in SOLUTIONS[number]
    path, exercise = tmp_path / file_name(number), EXERCISES[number - 1]
    path.write_text(SOLUTIONS[number].replace(right, wrong))
    function = load(path, exercise.reference.__name__)
    for seed in SEEDS:
        right_outputs = exercise.run(exercise.reference, exercise.inputs(seed))
        outputs = exercise.run(function, exercise.inputs(seed))
        assert not near(compare(right_outputs, outputs), exercise.tolerance), seed


@pytest.mark.parametrize(("returned", "name"), NO_CELLS)
def test_cells_are_what_an_edit_needs(returned: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / file_name(5)
    path.write_text(SOLUTIONS[5].replace("return matches", f"return {returned}"))
    with pytest.raises(Unfit) as error:
        EXERCISES[4].run(load(path, "track"), EXERCISES[4].inputs(0))
    assert f"it returns {name}, expected a list of Cell of numbers" in str(error.value)


def test_names_of_slips_are_short_and_hints_are_sentences(exercise: Exercise) -> None:
    assert len({slip.name for slip in exercise.slips}) == len(exercise.slips)
    for slip in exercise.slips:
        assert len(slip.name) <= 45 and len(slip.hint) <= 110 and slip.hint.endswith(".")


def test_a_solution_takes_less_than_twenty_lines(number: int) -> None:
    (function,) = [x for x in ast.parse(SOLUTIONS[number]).body if isinstance(x, ast.FunctionDef)]
    assert function.end_lineno and function.end_lineno - function.lineno < 20


def test_a_function_is_put_wherever_the_project_has_it(exercise: Exercise) -> None:
    """Also where a module has imported it by name, and for the time of the context only."""

    def count() -> int:
        modules = [module for name, module in list(sys.modules.items()) if name.startswith("minidrag.")]
        classes = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
        holders = {id(holder): vars(holder) for holder in [*modules, *classes]}
        return sum(value is exercise.reference for holder in holders.values() for value in holder.values())

    before = count()
    with real.in_place(exercise, max):
        assert before > 0 and count() == 0
    assert count() == before


def test_a_slip_fails_where_the_source_has_changed() -> None:
    with pytest.raises(ValueError, match="the source has no 'no such piece'"):
        EXERCISES[0].with_slip(Slip("a slip", "A hint.", {"no such piece": ""}))
