"""Cost of an edit by stage and preset, in UNet evaluations, seconds, and memory.

    python -m minidrag.bench speed [--cases 3] [--presets default fast authors]

An evaluation is a forward or a backward pass of the UNet on one sample. Their number is the same on every
machine; seconds are of this one. The presets take turns on each case, so that a busy machine slows all alike.
Memory is that of all tensors alive at once, weights included, in an edit of fewer updates. "authors" is their
program's work done with diffusers and peft (`authors.py`), and what the others are compared with where it
takes part.
"""

import argparse
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from minidrag.app.options import CONFIGS
from minidrag.bench import memory
from minidrag.bench.cases import Case, make_cases
from minidrag.bench.harness import add_dtype_argument, add_scene_arguments, load, open_case, seed
from minidrag.bench.tables import markdown
from minidrag.config import EditConfig
from minidrag.method.drag import Step
from minidrag.method.progress import Progress
from minidrag.model import Model

T = TypeVar("T")
PRESETS = {"default": EditConfig(), **CONFIGS}
AUTHORS = "authors"
PROGRAM = "minidrag.bench.authors"  # imported only where it takes part: it needs diffusers and peft
STAGES = ("LoRA", "inversion", "drag", "denoising")


class EvaluationCounter(Progress):
    """Progress that also counts the UNet's evaluations of each stage."""

    def __init__(self, unet: nn.Module):
        super().__init__(show=False)
        self.unet = unet
        self.evaluations: dict[str, int] = dict.fromkeys(STAGES, 0)

    def __call__(self, name: str, items: Iterable[T], total: int) -> Iterator[T]:
        def count(_: Any, inputs: tuple[Tensor, ...]) -> None:
            learned = torch.is_grad_enabled() and any(x.requires_grad for x in self.unet.parameters())
            self.evaluations[name] += len(inputs[0]) * (2 if learned else 1)

        handle = self.unet.register_forward_pre_hook(count)
        try:
            for item in super().__call__(name, items, total):
                if isinstance(item, Step) and item.loss is not None:
                    self.evaluations[name] += 1  # the backward pass of an update
                yield item
        finally:
            handle.remove()


def cost(model: Model, case: Case, config: EditConfig, pipeline: Any = None) -> EvaluationCounter:
    """Count evaluations and seconds of one edit, LoRA included; pipeline: by the authors' program."""
    if pipeline is not None:
        counter = EvaluationCounter(pipeline.unet)
        importlib.import_module(PROGRAM).edit(model, pipeline, case, config, counter)
        return counter
    counter = EvaluationCounter(model.unet)
    session = open_case(model, case, config, progress=counter)
    session.lora = session.train_lora()  # not one of the cache
    session.edit()
    return counter


def peak(model: Model, case: Case, config: EditConfig, pipeline: Any = None) -> int:
    """Most bytes of tensors at a time in an edit, weights included; two steps need as much as all."""
    few = {name: min(getattr(config, name), 2) for name in ("lora_steps", "drag_steps", "hold_steps")}
    source = model if pipeline is None else pipeline
    with memory.MemoryCounter(source.unet, source.vae, model.text_encoder) as counter:
        cost(model, case, replace(config, **few), pipeline)
    return counter.peak


def report(counters: dict[str, list[EvaluationCounter]], peaks: dict[str, int]) -> str:
    """Markdown table: evaluations (mean) and seconds (median), also as fractions of the most expensive."""
    evaluations = {name: [sum(x.evaluations.values()) for x in some] for name, some in counters.items()}
    seconds = {name: [sum(x.seconds.values()) for x in some] for name, some in counters.items()}
    most = AUTHORS if AUTHORS in counters else max(evaluations, key=lambda name: sum(evaluations[name]))
    rows = []
    for name, some in counters.items():
        row = [name, *(f"{np.mean([x.evaluations[stage] for x in some]):.0f}" for stage in STAGES)]
        row += [f"{np.mean(evaluations[name]):.0f}", f"{sum(evaluations[name]) / sum(evaluations[most]):.2f}"]
        ratios = [own / other for own, other in zip(seconds[name], seconds[most], strict=True)]
        row += [f"{np.median(seconds[name]):.1f}", f"{np.median(ratios):.2f}", f"{peaks[name] / 1e6:.0f}"]
        rows.append(row)
    head = ["preset", *STAGES, "evaluations", f"of {most}", "seconds", f"of {most}", "peak MB"]
    return markdown(head, rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="as for demo.py (default: tiny)")
    add_dtype_argument(parser)
    parser.add_argument("--seed", type=seed, default=0, help="of the scenes (default: %(default)s)")
    parser.add_argument("--presets", nargs="+", choices=[*PRESETS, AUTHORS], default=list(PRESETS))
    add_scene_arguments(parser)
    parser.set_defaults(cases=3)


def run(args: argparse.Namespace) -> int:
    model = load(args)
    counters = {name: [] for name in args.presets}
    peaks: dict[str, int] = {}
    pipeline = importlib.import_module(PROGRAM).load_pipeline(model) if AUTHORS in args.presets else None
    for case in make_cases(args.cases, args.kinds, args.seed, args.style):
        for name in args.presets:
            config = PRESETS.get(name, EditConfig.official())
            job = model, case, config, pipeline if name == AUTHORS else None
            counters[name].append(cost(*job))
            peaks[name] = peaks.get(name) or peak(*job)
    print(report(counters, peaks))
    return 0
