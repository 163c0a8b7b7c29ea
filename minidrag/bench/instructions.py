"""Read the cases of DragBench: an image, its prompt, drag points and a mask.

    CATEGORY/CASE/original_image.png
    CATEGORY/CASE/meta_data.pkl         {"prompt": text, "points": [handle, target, ...], "mask": array}
    CATEGORY/CASE/drag_instruction.json     alternative to meta_data.pkl, with the mask in mask.png

Points are [x, y] in pixels. The mask has the size of the image and is nonzero (in mask.png: white) in the
editable region. An empty mask makes the whole image editable.
"""

import pickle
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minidrag import images
from minidrag.app.options import to_pixel
from minidrag.bench.cases import Case
from minidrag.points import Pixel, check_instruction
from minidrag.weights.configs import read_json

IMAGE, PICKLE, JSON, MASK = "original_image.png", "meta_data.pkl", "drag_instruction.json", "mask.png"
MASK_TYPES = ("u1", "b1")  # uint8 and bool


class NumpyStub:
    """Stand-in for a NumPy object in a pickle: keeps its arguments and state, and runs nothing."""

    def __init__(self, *arguments: Any):
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


# Classes that a pickled array refers to. They are not called either: numpy.ndarray can be given bytes that
# create objects at any memory address, which amounts to running code.
ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),  # NumPy 1
    ("numpy._core.multiarray", "_reconstruct"),  # NumPy 2
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


class Unpickler(pickle.Unpickler):
    """Unpickler for plain values and arrays; raises UnpicklingError for anything else before importing it."""

    def find_class(self, module: str, name: str) -> type[NumpyStub]:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which may be harmful")
        return NumpyStub


def read_pickle(file: Path) -> dict[str, Any]:
    """Read prompt, points and mask, (H, W), bool, of meta_data.pkl. Raises ValueError if it is invalid."""
    try:
        with open(file, "rb") as opened:
            values = Unpickler(opened).load()
        return {"prompt": values["prompt"], "points": values["points"], "mask": to_mask(values["mask"])}
    except FileNotFoundError:
        raise ValueError(f"{PICKLE} or {JSON} is missing") from None
    except KeyError as error:
        raise ValueError(f"{PICKLE} has no {error.args[0]}") from error
    except Exception as error:  # damaged pickles raise almost any exception
        raise ValueError(f"cannot read {PICKLE}: {error}") from error


def to_mask(array: NumpyStub) -> np.ndarray:
    """Build the mask, (H, W), bool, from a pickled array."""
    _, shape, dtype, column_major, data = array.state
    if dtype.arguments[0] not in MASK_TYPES or len(shape) != 2:
        raise ValueError(
            f"the mask must be (H, W), uint8 or bool, got shape {shape} and {dtype.arguments[0]}"
        )
    return np.frombuffer(data, np.uint8).reshape(shape, order="F" if column_major else "C") > 0


def read_points(flat: Any) -> tuple[list[Pixel], list[Pixel]]:
    """Split [handle, target, handle, target, ...] into handles and targets."""
    try:
        points = [to_pixel(entry) for entry in flat]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"points must be a list of [x, y]: {error}") from error
    if not points or len(points) % 2:
        raise ValueError(f"points must be pairs of handle and target, got {len(points)} points")
    return points[::2], points[1::2]


def read_instruction(folder: Path, size: tuple[int, int]) -> dict[str, Any]:
    """Read prompt, points and mask in either layout. size: (width, height) of the image."""
    if not (folder / JSON).is_file():
        return read_pickle(folder / PICKLE)
    values = read_json(folder / JSON)
    mask = images.load_mask(folder / MASK, size)
    return values | {"mask": np.zeros(size[::-1], bool) if mask is None else mask.numpy() > 0}


def read_case(folder: Path) -> Case:
    """Read a case. Raises ValueError, naming the case, if it cannot be edited."""
    name = f"{folder.parent.name}/{folder.name}"
    try:
        image = images.load_image(folder / IMAGE)
        values = read_instruction(folder, image.size)
        handles, targets = read_points(values.get("points"))
        prompt, mask = values.get("prompt"), values["mask"]
        mask = mask if mask.any() else ~mask
        if not isinstance(prompt, str):
            raise ValueError("the prompt is missing")
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
    found = [case for row in zip_longest(*chosen) for case in row if case]
    if not any((case / name).is_file() for case in found for name in (IMAGE, PICKLE, JSON)):
        raise ValueError(f"{folder} has no cases: expected CATEGORY/CASE/{IMAGE}")
    return found[:limit]


def subfolders(folder: Path) -> list[Path]:
    """Sorted subfolders, without hidden ones and those of macOS archives."""
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))
    )
