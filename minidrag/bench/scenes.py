"""Edit scenes whose true result is known, and measure how close the edits come.

    python -m minidrag.bench scenes [--cases 60] [--kinds object light ...] [--set lora_steps=40] [--sheet]

Finished cases are kept: the same command resumes a stopped run and makes the same table.
"""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from minidrag.app import draw
from minidrag.bench.cases import learned_measures, make_cases
from minidrag.bench.harness import (
    Benchmark,
    add_common_arguments,
    add_scene_arguments,
    editor,
    fidelity,
    finish,
    load,
    open_out,
    read_config,
    run_cases,
    settings_of,
    write_tables,
)
from minidrag.bench.large import LARGE
from minidrag.bench.tables import Results
from minidrag.config import EditConfig
from minidrag.system import pictures
from minidrag.system.files import write_whole

ACROSS = 3  # cases per row of the contact sheet
TILE = 192  # pixels: height of its images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    add_scene_arguments(parser)
    large = parser.add_mutually_exclusive_group()
    add = partial(large.add_argument, dest="large", action="store_const", default="")
    add("--sheet", const="sheet", help="scenes in the middle of a sheet of nine")
    add("--texture", const="texture", help="scenes of 1024x1024 pixels with fine texture")


def write_report(results: Results, out: Path) -> str:
    """Write all tables and sheet.png; return the text to print."""
    write_whole(out / "sheet.png", sheet(results, out).save)
    return write_tables(results, out)


def sheet(results: Results, out: Path) -> Image.Image:
    """Contact sheet: the original with its drags, the edit, and the truth of each case, with its outcome."""
    tiles = []
    labels = []
    for result in results:
        folder = out / "cases" / result["case"]
        row = result["rows"]["edit"]
        tiles += [pictures.read(folder / f"{name}.png") for name in ("drag", "edit", "truth")]
        outcome = "lost" if row["lost"] else f"{row['distance']:.1f} px off, {row['remaining']:.0%} remaining"
        labels += [result["drag"], outcome, "truth"]
    return draw.grid(tiles, 3 * ACROSS, labels, TILE)


def scene_benchmark(args: argparse.Namespace, compare: bool, large: str = "") -> Benchmark:
    """Draw the cases and load the models. compare: baselines are measured too. large: key of LARGE."""
    model = load(args)
    network = fidelity()

    def settings(config: EditConfig) -> dict[str, Any]:
        measured = settings_of(model, config, args.seed, compare, network, args.back)
        special: dict[str, Any] = {"large": large} if large else {}
        if args.no_mask:
            special["masked"] = False
        return measured | {"style": args.style} | special

    cases = make_cases(args.cases, args.kinds, args.seed, args.style)
    cases = [replace(case, masked=not args.no_mask) for case in cases]
    if large:
        cases = [LARGE[large](case) for case in cases]
    return Benchmark(model, cases, learned_measures(model, network), settings)


def run(args: argparse.Namespace) -> int:
    config = read_config(args)
    benchmark = scene_benchmark(args, compare=True, large=args.large)
    out = open_out(args.out, benchmark.settings(config))
    edit = editor(benchmark.model, config, args.seed, args.back)
    run_cases(benchmark.cases, edit, benchmark.learned, out)
    return finish(benchmark, [out], lambda results: write_report(results[0], out), out)
