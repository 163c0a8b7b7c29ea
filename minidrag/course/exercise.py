"""An exercise, and how the outputs of a function differ from the right ones.

The right function is the project's own, so an exercise knows just random inputs for it and the mistakes
that change its source. A student's function is compared with all of them on the same inputs.
"""

import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

Function = Callable[..., Any]
Inputs = dict[str, Any]  # arguments by name, in order
Outputs = dict[str, list[Tensor]]  # by name, over all calls

MOST = 1000  # items taken from a generator, which may never end


class Slip(NamedTuple):
    """A well-known mistake."""

    name: str
    hint: str  # a sentence
    changes: dict[str, str]  # pieces of the right function's source, and what a student writes instead


@dataclass(frozen=True)
class Exercise:
    """A function of the project for students to write."""

    name: str  # of its file
    reference: Function  # the project's own
    make_inputs: Callable[[Generator], list[Inputs]]  # several calls, the same for the same generator
    slips: Sequence[Slip]
    returns: Sequence[str] = ("result",)  # names of the values it returns
    tolerance: float = 1e-6  # tables of the schedule are float32, and not all round them alike
    part: type | None = None  # a named tuple of numbers: the result is a list of these, as an edit needs them

    def inputs(self, seed: int) -> list[Inputs]:
        return self.make_inputs(Generator().manual_seed(seed))

    def with_slip(self, slip: Slip) -> Function:
        """The project's function with a slip. Raises ValueError if its source does not have those pieces."""
        bare = inspect.unwrap(self.reference)
        source = textwrap.dedent(inspect.getsource(bare))
        for right, wrong in slip.changes.items():
            if right not in source:
                raise ValueError(f"exercise {self.name}: the source has no {right!r}")
            source = source.replace(right, wrong)
        names = {"torch": torch, "F": F} | bare.__globals__
        exec(source, names)
        return names[bare.__name__]

    def run(self, function: Function, calls: list[Inputs]) -> Outputs:
        """Make all calls; raises Unfit for a result of the wrong kind, and what the function raises."""
        outputs: Outputs = {}
        for inputs in calls:
            for name, values in self.call(function, inputs).items():
                outputs.setdefault(name, []).extend(values)
        return outputs

    def call(self, function: Function, inputs: Inputs) -> Outputs:
        """Outputs of one call, and the gradients of its inputs."""
        result = function(*inputs.values())
        if len(self.returns) == 1:
            result = (result,)
        elif not isinstance(result, tuple) or len(result) != len(self.returns):
            raise Unfit(f"it returns {kind(result)}, expected a tuple of {' and '.join(self.returns)}")
        outputs: Outputs = {}
        for name, value in zip(self.returns, result, strict=True):
            if value is None:
                raise Unfit("it returns None: is the return statement missing?")
            if self.part and not is_list_of(value, self.part):
                expected = f"a list of {self.part.__name__} of numbers: .tolist() makes numbers of a tensor"
                raise Unfit(f"it returns {kind(value)}, expected {expected}")
            for label, tensor in tensors(value, name):
                outputs.setdefault(label, []).append(tensor)
        roots = [tensor for values in outputs.values() for tensor in values if tensor.requires_grad]
        slopes = gradients(roots, [pair for pair in contents(inputs) if pair[1].requires_grad])
        return {name: [x.detach() for x in values] for name, values in outputs.items()} | slopes


class Unfit(Exception):
    """A result that cannot be compared; the message is a sentence."""


def kind(value: Any) -> str:
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (tuple, list)) else "")


def is_list_of(value: Any, part: type) -> bool:
    """True for a list of named tuples of numbers."""
    return isinstance(value, (list, tuple)) and all(isinstance(x, part) and is_row(x) for x in value)


def tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Name every tensor and number in a value; numbers in a row, such as a cell, become one tensor.

    Fields of a named tuple have their own names; the parts of anything else have the name of the whole.
    """
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, nn.Module):
        yield from ((f"{name}.{path}", parameter) for path, parameter in value.named_parameters())
    elif isinstance(value, (int, float)) or is_row(value):
        yield name, torch.tensor(value, dtype=torch.float64)
    elif isinstance(value, (list, tuple, Iterator)):
        labels = getattr(value, "_fields", None)
        for i, part in enumerate(islice(value, MOST + 1)):
            if i == MOST:
                raise Unfit(f"its {name} has more than {MOST} parts: does a loop never end?")
            yield from tensors(part, labels[i] if labels else name)
    elif value is not None:
        raise Unfit(f"its {name} is {kind(value)}, expected tensors or numbers")


def is_row(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple)) and bool(value) and all(isinstance(x, (int, float)) for x in value)
    )


def contents(inputs: Inputs) -> list[tuple[str, Tensor]]:
    """Tensors and numbers in the inputs, without schedules, settings, and functions."""
    parts = ((name, x) for name, x in inputs.items() if isinstance(x, (Tensor, nn.Module, list, tuple)))
    return [pair for name, value in parts for pair in tensors(value, name)]


def gradients(roots: Sequence[Tensor], inputs: Sequence[tuple[str, Tensor]]) -> Outputs:
    """Gradients of a fixed mix of the outputs by the inputs; zero where nothing leads to an input."""
    # Not the plain sum: its gradient is the same wherever in an output a number is.
    weights = [torch.arange(1, x.numel() + 1, dtype=x.dtype).cos().reshape(x.shape) for x in roots]
    slopes: Sequence[Tensor | None] = [None] * len(inputs)
    if roots and inputs:
        slopes = torch.autograd.grad(roots, [x for _, x in inputs], weights, allow_unused=True)
    named: Outputs = {}
    for (name, x), slope in zip(inputs, slopes, strict=True):
        named.setdefault(f"gradient of {name}", []).append(torch.zeros_like(x) if slope is None else slope)
    return named


def difference(right: Sequence[Tensor], values: Sequence[Tensor] | None) -> float | str:
    """Largest absolute difference, or in words why there is none."""
    if values is None or len(values) != len(right):
        return f"{len(values or ())} values, expected {len(right)}"
    for one, other in zip(right, values, strict=True):
        if one.shape != other.shape:
            return f"shape {tuple(other.shape)}, expected {tuple(one.shape)}"
        if one.dtype != other.dtype:
            return f"{str(other.dtype)[6:]}, expected {str(one.dtype)[6:]}"
        if not (one - other).isfinite().all():  # two huge numbers may differ by infinity
            return "a number is not finite"
    gaps = [(one - other).abs().max().item() for one, other in zip(right, values, strict=True) if one.numel()]
    return max(gaps, default=0.0)


def compare(right: Outputs, outputs: Outputs) -> dict[str, float | str]:
    """Difference of every output."""
    return {name: difference(values, outputs.get(name)) for name, values in right.items()}


def near(differences: dict[str, float | str], tolerance: float) -> bool:
    return all(not isinstance(x, str) and x <= tolerance for x in differences.values())


def matching(right: Outputs, outputs: Outputs, tolerance: float) -> set[str]:
    """Names of the outputs that are right."""
    return {name for name, off in compare(right, outputs).items() if near({name: off}, tolerance)}


def likely_slip(exercise: Exercise, seed: int, right: Outputs, outputs: Outputs) -> Slip | None:
    """The slip that shares most outputs with a student's, among them one that is wrong.

    Not all of them: somebody may make two slips, or return what a slip used in another way.
    """
    wrong = set(right) - matching(right, outputs, exercise.tolerance)
    likely = None
    most = 0
    for slip in exercise.slips:
        slipped = exercise.run(exercise.with_slip(slip), exercise.inputs(seed))
        same = matching(slipped, outputs, exercise.tolerance)
        if same & wrong and len(same) > most:
            likely = slip
            most = len(same)
    return likely


def normal(rng: Generator, *shape: int, grad: bool = False) -> Tensor:
    """Random numbers, float64."""
    return torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_(grad)


def whole(rng: Generator, low: int, high: int) -> int:
    """A random whole number from low to high."""
    return int(torch.randint(low, high + 1, (), generator=rng))


def filled(layer: Any, rng: Generator) -> Any:
    """A layer with random parameters, float64, without gradients."""
    layer = layer.double().requires_grad_(False)
    for parameter in layer.parameters():
        parameter.copy_(normal(rng, *parameter.shape))
    return layer
