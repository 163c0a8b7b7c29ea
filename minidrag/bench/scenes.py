"""Edit scenes whose true result is known, and measure how close the edits come.

    python -m minidrag.bench scenes [--cases 60] [--kinds object light ...] [--set lora_steps=40]

Finished cases are kept: the same command resumes a stopped run and makes the same table.
"""

import argparse
from pathlib import Path
from typing import Any

from PIL import Image

from minidrag import images
from minidrag.app import draw
from minidrag.bench.cases import learned_measures, make_cases
from minidrag.bench.harness import (
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
from minidrag.system import pictures
from minidrag.system.files import write_whole

ACROSS, TILE = 3, 240  # cases per row of the contact sheet, and their height in pixels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    add_scene_arguments(parser)
    parser.add_argument("--no-references", action="store_true", help="measure only the edits")


def write_report(results: list[dict[str, Any]], out: Path) -> str:
    """Write all tables and sheet.png; return the text to print."""
    write_whole(out / "sheet.png", sheet(results, out).save)
    return write_tables(results, out)


def sheet(results: list[dict[str, Any]], out: Path) -> Image.Image:
    """Contact sheet: the original with its drags, the edit, and the truth of each case, with its outcome."""
    tiles = []
    for result in results:
        folder, row = out / "cases" / result["case"], result["rows"]["edit"]
        tiled = [pictures.read(folder / f"{name}.png") for name in ("drag", "edit", "truth")]
        outcome = "lost" if row["lost"] else f"{row['distance']:.1f} px off, {row['remaining']:.0%} remaining"
        tile = draw.side_by_side(tiled, [result["drag"], outcome, "truth"])
        tiles.append(images.resize(tile, (round(tile.width * TILE / tile.height), TILE)))
    gap, (width, height) = 24, tiles[0].size
    across, rows = min(ACROSS, len(tiles)), -(-len(tiles) // ACROSS)
    size = (width + gap) * across + gap, (height + gap) * rows + gap
    page = Image.new("RGB", size, images.WHITE)
    for i, tile in enumerate(tiles):
        page.paste(tile, (gap + (width + gap) * (i % ACROSS), gap + (height + gap) * (i // ACROSS)))
    return page


def measure_scenes(args: argparse.Namespace) -> int:
    config, compare = read_config(args), not args.no_references
    model, network = load(args), fidelity()
    settings = settings_of(model, config, args.seed, compare, network, args.back) | {"style": args.style}
    out, cases = open_out(args.out, settings), make_cases(args.cases, args.kinds, args.seed, args.style)
    edit, learned = editor(model, config, args.seed, args.back), learned_measures(model, network)
    run_cases(cases, edit, learned, out, model, compare)
    return finish(cases, out, write_report)


def run(args: argparse.Namespace) -> int:
    return measure_scenes(args)
