"""Read the cases of DragBench: an image, its prompt, drag points and a mask.

    CATEGORY/CASE/original_image.png
    CATEGORY/CASE/meta_data.pkl         {"prompt": text, "points": [handle, target, ...], "mask": array}
    CATEGORY/CASE/drag_instruction.json     alternative to meta_data.pkl, with the mask in mask.png

Points are [x, y] in pixels. The mask has the size of the image and is nonzero (in mask.png: white) in the
editable region. An empty mask makes the whole image editable.
"""

import io
import pickle
from collections.abc import Sequence
from itertools import zip_longest
from os.path import lexists
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minidrag.app.options import check_prompt, shown, to_drag, with_drags
from minidrag.bench.cases import Case
from minidrag.points import Pixel, check_instruction
from minidrag.system import pictures
from minidrag.system.files import check_regular, read_json
from minidrag.system.pickles import SparingUnpickler

IMAGE = "original_image.png"
PICKLE = "meta_data.pkl"
JSON = "drag_instruction.json"
MASK = "mask.png"
NAMES = (IMAGE, PICKLE, JSON)
MASK_TYPES = ("u1", "b1")  # uint8 and bool
MAX_PICKLE = 20_000_000  # bytes; those of DragBench have 0.3 million


class NumpyStub:
    """Stand-in for a NumPy object in a pickle: keeps its arguments and state, and runs nothing."""

    def __init__(self, *arguments: Any):
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


# References of a pickled array. None is called: numpy.ndarray makes objects at any memory address from bytes,
# which amounts to running code.
ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),  # NumPy 1
    ("numpy._core.multiarray", "_reconstruct"),  # NumPy 2
    ("numpy.core.numeric", "_frombuffer"),  # both, with protocol 5
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


class ArrayUnpickler(SparingUnpickler):
    """Unpickler for plain values and arrays; raises UnpicklingError for anything else before importing it."""

    def find_class(self, module: str, name: str) -> type[NumpyStub]:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which may be harmful")
        return NumpyStub


def read_pickle(file: Path) -> dict[str, Any]:
    """Read prompt, points and mask, (H, W), bool, of meta_data.pkl. Raises ValueError if it is invalid."""
    try:
        data = check_regular(file, MAX_PICKLE).read_bytes()
        content = io.BytesIO(data)  # reading a file would reserve what the pickle declares
        values = dict(ArrayUnpickler(content).load())
        missing = [name for name in ("prompt", "points", "mask") if name not in values]
        mask = None if missing else to_mask(values["mask"])
    except Exception as error:  # damaged pickles raise almost any exception
        known = isinstance(error, OSError | pickle.UnpicklingError) or str(file) in str(error)
        raise ValueError(f"cannot read {PICKLE}: {error if known else 'it is damaged'}") from error
    if missing:
        raise ValueError(f"{PICKLE} has no {missing[0]}")
    return {"prompt": values["prompt"], "points": values["points"], "mask": mask}


def to_mask(array: NumpyStub) -> np.ndarray:
    """Build the mask, (H, W), bool, from a pickled array."""
    if array.state is None:  # protocol 5: the arguments of _frombuffer
        data, dtype, shape, order, *_ = array.arguments
    else:
        _, shape, dtype, column_major, data = array.state
        order = "F" if column_major else "C"
    kind = dtype.arguments[0]
    if kind not in MASK_TYPES or len(shape) != 2:
        raise pickle.UnpicklingError(f"the mask must be (H, W), uint8 or bool, got shape {shape} and {kind}")
    return np.frombuffer(data, np.uint8).reshape(shape, order=order) > 0


def read_points(flat: Any) -> tuple[list[Pixel], list[Pixel]]:
    """Split [handle, target, handle, target, ...] into handles and targets."""
    if not isinstance(flat, list):
        raise ValueError(f"points must be a list of [x, y]: got {shown(flat)}")
    drags = [to_drag(drag) for drag in with_drags({"points": flat})["drags"]]
    return [handle for handle, _ in drags], [target for _, target in drags]


def read_instruction(folder: Path, size: tuple[int, int]) -> dict[str, Any]:
    """Read prompt, points and mask in either form. size: (width, height) of the image."""
    file = folder / JSON
    if not lexists(file):
        if not lexists(folder / PICKLE):
            raise ValueError(f"{PICKLE} or {JSON} is missing")
        return read_pickle(folder / PICKLE)
    values = read_json(file)
    if not isinstance(values, dict):
        raise ValueError(f"{file} is not a JSON object")
    mask = pictures.load_mask(folder / MASK, size)
    return values | {"mask": np.zeros(size[::-1], bool) if mask is None else mask.numpy() > 0}


def read_case(folder: Path) -> Case:
    """Read a case. Raises ValueError, naming the case, if it cannot be edited."""
    name = f"{folder.parent.name}/{folder.name}"
    try:
        image = pictures.load_image(folder / IMAGE)
        values = read_instruction(folder, image.size)
        handles, targets = read_points(values.get("points"))
        prompt = values.get("prompt")
        mask = values["mask"] if values["mask"].any() else ~values["mask"]
        if not isinstance(prompt, str):
            raise ValueError("the prompt is missing")
        check_prompt(prompt)
        check_instruction(image.size, handles, targets, torch.from_numpy(mask))
    except (ValueError, OSError) as error:
        raise ValueError(f"{name}: {error}") from error
    return Case(name, folder.parent.name, image, mask, prompt, handles, targets)


def find_cases(folder: Path, categories: Sequence[str] | None, limit: int | None) -> list[Path]:
    """List case folders, cycling through the categories; None means all. Raises ValueError for no cases."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    known = {category.name: subfolders(category) for category in subfolders(folder)}
    if unknown := sorted(set(categories or ()) - known.keys()):
        raise ValueError(f"{folder} has no category {', '.join(unknown)}: choose from {', '.join(known)}")
    chosen = [cases for name, cases in known.items() if not categories or name in categories]
    cases = [case for row in zip_longest(*chosen) for case in row if case]
    if any(is_case(case) for case in cases):
        return cases[:limit]
    message = f"{folder} has no cases: expected CATEGORY/CASE/{IMAGE}"
    for case in filter(is_case, subfolders(folder)):
        hint = f"{case.name} is a CASE: give the folder above, with --category {folder.name}"
        raise ValueError(f"{message}, and {hint}")
    raise ValueError(message)


def is_case(folder: Path) -> bool:
    return any((folder / name).is_file() for name in NAMES)


def subfolders(folder: Path) -> list[Path]:
    """Sorted subfolders, without hidden ones and those of macOS archives."""
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))
    )
