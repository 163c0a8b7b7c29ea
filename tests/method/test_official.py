"""The method against the authors' own program, in float64 on the small model that ships.

tests/data/official holds outputs of Yujun-Shi/DragDiffusion at commit ebe659a with diffusers 0.24.0 and
torch 2.13.0, no LoRA: the inversion, a number of drag updates, and denoising with the original's keys and
values in the last two up blocks. The program has points in (row, column) on the same feature grid as ours.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from minidrag.config import EditConfig
from minidrag.method.ddim import denoise, invert
from minidrag.method.drag import Cell
from minidrag.method.dragdiffusion import Task, dragdiffusion
from minidrag.weights.model import Model, load_model

DATA = Path(__file__).parents[1] / "data/official"
# The program computes directions in float32, so only along an axis are they exact: there the bound is that of
# float64. Elsewhere they are off by up to 6e-8; measured after 20 updates: 5.0e-7 (light), 9.7e-7 (carry).
BOUNDS = {"peak-000": 1e-12, "light-000": 1.5e-6, "carry-000": 1.5e-6}
FIRST = ["peak-000", *(pytest.param(name, marks=pytest.mark.slow) for name in ("light-000", "carry-000"))]
FIRST_TWO = ["peak-000", "light-000", pytest.param("carry-000", marks=pytest.mark.slow)]


# Inversion amplifies rounding: noise of 1e-7 on the clean latent moves its end by 1e-5. Measured: 3.4e-6.
# From the end of the program's own inversion on, everything agrees to the bounds above.
INVERSION_BOUND = 1e-5


class Case(NamedTuple):
    clean: Tensor
    text: Tensor
    inverted: Tensor
    edited: Tensor
    final: Tensor
    task: Task
    last: list[tuple[int, int]]  # handles at the program's last tracking, which is before its last update
    config: EditConfig


@cache
def model() -> Model:
    return load_model("tiny", device="cpu", dtype=torch.float64)


@cache
def case(name: str) -> Case:
    data = np.load(DATA / f"{name}.npz")
    tensors = {key: torch.from_numpy(data[key]) for key in ("clean", "text", "inverted", "edited", "final")}
    handles, targets = ([Cell(*map(float, point)) for point in data[key]] for key in ("handles", "targets"))
    mask = torch.from_numpy(data["mask"]).double() if data["mask"].size else None
    config = replace(EditConfig.official(), drag_steps=int(data["steps"]))
    last = [(int(row), int(column)) for row, column in data["last"]]
    return Case(**tensors, task=Task(handles, targets, mask, (64, 64)), last=last, config=config)


def test_the_constants_of_the_drag_are_those_of_the_official_preset() -> None:
    official, used = EditConfig.official(), case("peak-000").config
    for name in ("block", "motion_radius", "motion_step", "motion_reference", "motion_loss", "track_radius"):
        assert getattr(official, name) == getattr(used, name)
    for name in ("steps", "inversion_steps", "drag_lr", "mask_weight", "control_start", "control_blocks"):
        assert getattr(official, name) == getattr(used, name)


@pytest.mark.parametrize("name", FIRST)
def test_inversion_equals_the_official_program(name: str, compare: Callable) -> None:
    given = case(name)
    *_, found = invert(model().unet, model().schedule, given.clean, given.text, given.config)
    compare("official program, inversion", found, given.inverted, INVERSION_BOUND)


@pytest.mark.parametrize("name", FIRST_TWO)
def test_drag_equals_the_official_program(name: str, compare: Callable) -> None:
    given = case(name)
    path = [given.clean] * given.config.inversion_steps + [given.inverted]
    steps = list(dragdiffusion(model().unet, model().schedule, path, given.text, given.task, given.config))
    axis = "along an axis" if BOUNDS[name] < 1e-9 else "other directions (its points are float32)"
    compare(f"official program, drag {axis}", steps[-1].latent, given.edited, BOUNDS[name])
    assert len(steps) == given.config.drag_steps + 1 and list(steps[-2].handles) == given.last
    assert list(steps[-2].handles) != list(given.task.handles), "no handle moved: this proves little"


@pytest.mark.parametrize("name", FIRST)
def test_denoising_equals_the_official_program(name: str, compare: Callable) -> None:
    given, level = case(name), EditConfig().inversion_steps
    pair = [given.inverted, given.edited]
    *_, found = denoise(model().unet, model().schedule, pair, given.text, level, given.config)
    compare("official program, denoising", torch.cat(found), given.final, 1e-12)
