"""The cost of an edit, counted against what the settings ask for."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.command import write_untrained

from minidrag.bench import authors, memory, speed
from minidrag.bench.cases import make_case
from minidrag.config import EditConfig
from minidrag.edit import drag_edit
from minidrag.model import decode
from minidrag.weights.load import load_model

CONFIG = replace(
    EditConfig.official(),
    steps=5,
    inversion_steps=4,
    drag_steps=3,
    tolerance=0.0,
    lora_steps=2,
    lora_batch=3,
    size=64,
)


def test_evaluations_are_those_that_the_settings_ask_for(tmp_path: Path) -> None:
    model = load_model(write_untrained(tmp_path), device="cpu")
    case = make_case("light", 0, 0)
    counter = speed.cost(model, case, CONFIG)
    # LoRA: 2 steps of 3 samples, forward and backward. Drag: 4 looks and 3 backward passes.
    assert counter.evaluations == {"LoRA": 2 * 3 * 2, "inversion": 4, "drag": 4 + 3, "denoising": 2 * 4}
    assert counter.seconds.keys() == {"LoRA", "inversion", "drag", "denoising"}
    assert not model.unet._forward_pre_hooks

    turn = replace(CONFIG, drag_levels=2, drag_steps=1, lora_steps=0)
    counter = speed.cost(model, case, turn)
    # At each level a look at the original, two at the edit, and one backward pass; denoising goes on from the
    # second.
    assert counter.evaluations == {"LoRA": 0, "inversion": 4, "drag": 2 * (1 + 2 + 1), "denoising": 2 * 3}
    assert torch.is_grad_enabled()


def test_the_authors_program_does_the_same_work_to_the_same_end(tmp_path: Path) -> None:
    model = load_model(write_untrained(tmp_path), device="cpu")
    case, config = make_case("light", 0, 0), replace(CONFIG, lora_steps=0, size=None)
    counter = speed.EvaluationCounter((pipeline := authors.load_pipeline(model)).unet)
    pair = authors.edit(model, pipeline, case, config, counter)
    assert counter.evaluations == {"LoRA": 0, "inversion": 4, "drag": 4 + 3, "denoising": 2 * 4}
    given = {"mask": torch.from_numpy(case.mask), "prompt": case.prompt, "config": config}
    expected = drag_edit(model, case.before, case.handles, case.targets, **given)
    for latent, image in zip(pair, (expected.reconstruction, expected.raw), strict=True):
        difference = np.asarray(decode(model, latent[None]), int) - np.asarray(image, int)
        assert np.abs(difference).max() <= 1
    trained = authors.edit(model, pipeline, case, replace(config, lora_steps=1), counter)
    assert counter.evaluations["LoRA"] == 2 * 3 and not torch.equal(trained, pair)


def test_the_report_has_means_and_fractions() -> None:
    def counted(evaluations: int, seconds: float) -> speed.EvaluationCounter:
        counter = speed.EvaluationCounter.__new__(speed.EvaluationCounter)
        counter.evaluations = {"LoRA": 0, "inversion": 0, "drag": evaluations, "denoising": 0}
        counter.seconds = {"drag": seconds}
        return counter

    counters = {"one": [counted(10, 1.0), counted(20, 3.0)], "two": [counted(60, 4.0)] * 2}
    table = speed.report(counters, {"one": 3_000_000, "two": 4_400_000})
    assert [cell.strip() for cell in table.splitlines()[2].split("|")[1:-1]] == [
        *("one", "0", "0", "15", "0", "15", "0.25", "2.0", "0.50", "3"),
    ]
    assert table.splitlines()[0].count("of two") == 2


def test_two_steps_need_as_much_memory_as_all(tmp_path: Path) -> None:
    """A larger batch needs more; weights are always there."""
    model = load_model(write_untrained(tmp_path), device="cpu")
    case, long = make_case("light", 0, 0), replace(CONFIG, lora_steps=6, drag_steps=6)
    few, large = (speed.peak(model, case, replace(long, lora_batch=batch)) for batch in (3, 9))
    networks = model.unet, model.vae, model.text_encoder
    weights = sum(x.numel() * 4 for network in networks for x in network.parameters())
    with memory.MemoryCounter(*networks) as counter:
        speed.cost(model, case, long)
    # Not to the byte, as Python frees some cycles late; measured 0.03 %.
    assert weights < few == pytest.approx(counter.peak, rel=0.01)
    assert large > 1.2 * few
