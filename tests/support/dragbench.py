"""Folders in DragBench's layout, editors and metrics that need no model."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from minidrag.bench.cases import Case, Edited, Measures, SceneCase, make_case

# Cases of a folder: one pair of points, two pairs of which one has no length, one pair in an odd image size.
PAIRS = {
    "animals/a": [[40, 50], [43, 54]],
    "animals/b": [[60, 60], [60, 68], [30, 90], [30, 90]],
    "land_scape/c": [[20, 30], [32, 35]],
}
SIZES = {"land_scape/c": (101, 75)}
LENGTHS = [5.0, 8.0, 0.0, 13.0]  # of all pairs
TINY = ["--model", "tiny", "--metric-model", "tiny"]
TINY += ["--set", "lora_steps=1", "lora_batch=1", "steps=4", "inversion_steps=2", "drag_steps=1"]


def write_case(root: Path, name: str, points: list, size: tuple[int, int] = (128, 128)) -> Path:
    """Write a rendered scene as a case, as JSON if its name ends in b and else as a pickle."""
    folder = root / name
    folder.mkdir(parents=True)
    image = make_case("object", len(name) + ord(name[-1]), 0).before.resize(size)
    image.save(folder / "original_image.png")
    mask = np.zeros(size[::-1], np.uint8)
    mask[10:100, 10:90] = 1
    values: dict[str, Any] = {"prompt": "a box, on grass", "points": points}
    if name.endswith("b"):
        (folder / "drag_instruction.json").write_text(json.dumps(values))
        Image.fromarray(mask * 255).save(folder / "mask.png")
    else:
        (folder / "meta_data.pkl").write_bytes(pickle.dumps(values | {"mask": mask}, protocol=4))
    return folder


def write_folder(root: Path) -> Path:
    for name, points in PAIRS.items():
        write_case(root, name, points, SIZES.get(name, (128, 128)))
    return root


def meta(**values: Any) -> dict[str, Any]:
    """Contents of a meta_data.pkl that can be edited, with some values replaced."""
    usual = {"prompt": "a", "points": [[20, 20], [30, 30]], "mask": np.ones((128, 128), np.uint8)}
    return usual | values


def set_meta(case: Path, **values: Any) -> None:
    (case / "meta_data.pkl").write_bytes(pickle.dumps(meta(**values), 4))


def to_truth(case: Case) -> Edited:
    """An editor that returns the true result; `raw` is darker, also where the mask hides it."""
    assert isinstance(case, SceneCase)
    raw = Image.fromarray(np.asarray(case.truth) // 2 + 64)
    return Edited(case.truth, raw, {"drag": 2.0})


def shift(case: Case) -> Edited:
    """An editor that moves the raw image down by 6 pixels."""
    return Edited(
        case.before.copy(), Image.fromarray(np.roll(np.asarray(case.before), 6, axis=0)), {"drag": 2.0}
    )


class Counting:
    """An editor that counts its calls and raises an error at one of them."""

    def __init__(
        self,
        edit: Callable[[Case], Edited],
        stop: int = 0,
        error: type[BaseException] = KeyboardInterrupt,
    ):
        self.edit = edit
        self.calls, self.stop, self.error = 0, stop, error

    def __call__(self, case: Case) -> Edited:
        self.calls += 1
        if self.calls == self.stop:
            raise self.error("stop")
        return self.edit(case)


def learned(case: Case, image: Image.Image) -> Measures:
    """Something that depends on the result, in place of MD and IF."""
    level = float(np.asarray(image).mean())
    return {"MD": level, "IF": level / 255}


class Distance(nn.Module):
    """Mean absolute difference of two images, in place of LPIPS."""

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        assert one.shape == other.shape == (1, 3, 224, 224) and one.abs().max() <= 1
        return (one - other).abs().mean().reshape(1, 1, 1, 1)
