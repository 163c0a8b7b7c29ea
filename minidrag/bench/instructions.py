"""DragBench's cases from their folders: a picture, what it shows, where to drag what, and a mask.

    CATEGORY/CASE/original_image.png
    CATEGORY/CASE/meta_data.pkl         {"prompt": text, "points": [handle, target, ...], "mask": array}
    CATEGORY/CASE/drag_instruction.json     in place of it, with the mask in mask.png

Points are [x, y] in pixels. The mask is of the picture's size and not 0, in mask.png white, where the picture
may change; one without any mark leaves everything free.
"""

import pickle
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minidrag import images
from minidrag.app.options import point
from minidrag.bench.cases import Case
from minidrag.checks import check_points
from minidrag.images import Point
from minidrag.networks.tokenizer import read_json

PICTURE, PICKLE, JSON, MASK = "original_image.png", "meta_data.pkl", "drag_instruction.json", "mask.png"
NUMBERS = ("u1", "b1")  # kinds of numbers that a mask may hold: bytes and truth values


class Said:
    """Stands in for an object of numpy: holds what a pickle says of it and makes nothing of that."""

    def __init__(self, *made_of: Any):
        self.made_of = made_of
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


# An array in a pickle names these. Not even they are called: numpy.ndarray, given the right bytes, makes
# objects at any address in memory, which is as good as running code.
ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),  # as numpy 1 spells it
    ("numpy._core.multiarray", "_reconstruct"),  # as numpy 2 does
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


class Unpickler(pickle.Unpickler):
    """Reads plain values and arrays; anything else raises UnpicklingError and is neither imported nor run."""

    def find_class(self, module: str, name: str) -> type[Said]:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which no array needs: it may be harmful"
            )
        return Said


def read_pickle(file: Path) -> dict[str, Any]:
    """The values of meta_data.pkl, its mask (H, W), bool; raises ValueError for anything else."""
    try:
        with open(file, "rb") as opened:
            values = Unpickler(opened).load()
        return {"prompt": values["prompt"], "points": values["points"], "mask": mask_of(values["mask"])}
    except FileNotFoundError:
        raise ValueError(f"there is no {PICKLE} and no {JSON}") from None
    except KeyError as error:
        raise ValueError(f"{PICKLE} has no {error.args[0]}") from error
    except Exception as error:  # damaged pickles make the reader raise almost anything
        raise ValueError(f"{PICKLE} cannot be read: {error}") from error


def mask_of(said: Said) -> np.ndarray:
    """The array that a pickle described, as (H, W), bool."""
    _, shape, kind, by_columns, data = said.state
    if kind.made_of[0] not in NUMBERS or len(shape) != 2:
        raise ValueError(f"the mask has the shape {shape} and the type {kind.made_of[0]}, not H, W and bytes")
    return np.frombuffer(data, np.uint8).reshape(shape, order="F" if by_columns else "C") > 0


def read_points(flat: Any) -> tuple[list[Point], list[Point]]:
    """Handles and targets out of [handle, target, handle, target, ...]."""
    try:
        points = [point(entry) for entry in flat]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"the points are no list of [x, y]: {error}") from error
    if not points or len(points) % 2:
        raise ValueError(f"{len(points)} points are no pairs of handle and target")
    return points[::2], points[1::2]


def read_instruction(folder: Path, size: tuple[int, int]) -> dict[str, Any]:
    """Prompt, points and mask, from whichever of the two layouts is there. size: the picture's."""
    if not (folder / JSON).is_file():
        return read_pickle(folder / PICKLE)
    values = read_json(folder / JSON)
    marked = images.load_mask(folder / MASK, size)
    return values | {"mask": np.zeros(size[::-1], bool) if marked is None else marked.numpy() > 0}


def read_case(folder: Path) -> Case:
    """The case in a folder; raises ValueError, saying which and why, for one that cannot be edited."""
    name = f"{folder.parent.name}/{folder.name}"
    try:
        picture = images.load_picture(folder / PICTURE)
        values = read_instruction(folder, picture.size)
        handles, targets = read_points(values.get("points"))
        prompt, mask = values.get("prompt"), values["mask"]
        mask = mask if mask.any() else ~mask
        if not isinstance(prompt, str):
            raise ValueError("there is no prompt")
        check_points(picture.size, handles, targets, torch.from_numpy(mask))
    except (ValueError, OSError) as error:
        raise ValueError(f"{name}: {error}") from error
    return Case(name, folder.parent.name, picture, mask, prompt, handles, targets)


def find_cases(folder: Path, categories: Sequence[str] | None, limit: int | None) -> list[Path]:
    """The folders of so many cases, the categories by turns; None: all. ValueError where there are none."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    known = {category.name: folders_in(category) for category in folders_in(folder)}
    if unknown := sorted(set(categories or ()) - known.keys()):
        raise ValueError(f"{folder} has no category {', '.join(unknown)}: there are {', '.join(known)}")
    chosen = [cases for name, cases in known.items() if not categories or name in categories]
    found = [case for turn in zip_longest(*chosen) for case in turn if case]
    if not any((case / name).is_file() for case in found for name in (PICTURE, PICKLE, JSON)):
        raise ValueError(f"{folder} holds no cases: they are expected as CATEGORY/CASE/{PICTURE}")
    return found[:limit]


def folders_in(folder: Path) -> list[Path]:
    """Its folders by name, without those that file systems and archives hide in it."""
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))
    )
