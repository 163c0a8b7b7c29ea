"""Edit the same images with several values of one constant, and tabulate the effect.

    python -m minidrag.bench ablate --over lora_steps --values 0 20 40 80 [--cases 60] [--set block=2]
    python -m minidrag.bench ablate --over lora_steps --values 0 80 --dragbench FOLDER [--limit 20]

As in the paper's Figure 7, with the placement on scenes beside MD and IF. Finished cases are kept.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from minidrag.app.options import configured
from minidrag.bench.cases import Case, Edited
from minidrag.bench.dragbench import add_folder_arguments, dragbench_benchmark, whole_image
from minidrag.bench.harness import (
    add_common_arguments,
    add_scene_arguments,
    editor,
    finish,
    open_out,
    read_config,
    run_cases,
    value_of,
)
from minidrag.bench.scenes import scene_benchmark
from minidrag.bench.tables import MEASURES, Results, entry, markdown, means
from minidrag.config import EditConfig
from minidrag.system.files import write_json, write_text

NO_EDIT = "no edit"

Table = dict[str, dict[str, dict[str, Any] | None]]  # value -> measure -> mean, low, high, count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [field.name for field in fields(EditConfig)]
    parser.add_argument("--over", required=True, choices=names, metavar="FIELD", help=", ".join(names))
    parser.add_argument("--values", required=True, nargs="+", metavar="VALUE", help="values of the field")
    parser.add_argument("--dragbench", type=Path, metavar="FOLDER", help="its images instead of scenes")
    add_common_arguments(parser)
    add_scene_arguments(parser)
    add_folder_arguments(parser)


def nothing(case: Case) -> Edited:
    """Return the original as the edit."""
    return Edited(case.before, case.before, {})


def report(field: str, table: Table) -> str:
    """Markdown table with a row for each value."""
    columns = [name for name in MEASURES if any(row[name] for row in table.values())]
    rows = [[value, *(entry(row[name], MEASURES[name]) for name in columns)] for value, row in table.items()]
    return markdown([field, *columns], rows)


def write_tables(field: str, results: dict[str, Results], out: Path) -> str:
    """Write FIELD.json and FIELD.md from the results of each value; return the text to print."""
    edits = {value: [result["rows"]["edit"] for result in some] for value, some in results.items() if some}
    table = {value: means(rows) for value, rows in edits.items()}
    text = report(field, table)
    write_json(out / f"{field}.json", table)
    write_text(out / f"{field}.md", text + "\n")
    return text


def run(args: argparse.Namespace) -> int:
    field = args.over
    base = whole_image(read_config(args)) if args.dragbench else read_config(args)
    configs = {str(value): configured(base, {field: value}) for value in map(value_of, args.values)}
    if args.dragbench:
        benchmark = dragbench_benchmark(args, args.dragbench)
    else:
        benchmark = scene_benchmark(args, compare=False)
    out = open_out(args.out, benchmark.settings(base), "ablate")
    folders = {NO_EDIT: out / NO_EDIT.replace(" ", "-")}
    run_cases(benchmark.cases, nothing, benchmark.learned, folders[NO_EDIT], compare=False)
    for value, config in configs.items():
        print(f"minidrag: {field} = {value}", file=sys.stderr)
        folders[value] = open_out(out / f"{field}={value}", benchmark.settings(config))
        edit = editor(benchmark.model, config, args.seed, args.back)
        run_cases(benchmark.cases, edit, benchmark.learned, folders[value], compare=False)

    def write(results: list[Results]) -> str:
        return write_tables(field, dict(zip(folders, results, strict=True)), out)

    return finish(benchmark, list(folders.values()), write, out)
