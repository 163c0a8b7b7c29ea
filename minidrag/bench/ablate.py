"""Edit the same images with several values of one constant, and tabulate the effect.

    python -m minidrag.bench ablate --over lora_steps [--values 0 20 40 80] [--cases 60] [--set block=2]
    python -m minidrag.bench ablate --over lora_steps --dragbench FOLDER [--limit 20]

As in the paper's Figure 7, with the placement on scenes beside MD and IF. Finished cases are kept.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from minidrag.app.options import configured
from minidrag.bench import dragbench
from minidrag.bench.cases import Case, Edited, learned_measures, make_cases
from minidrag.bench.harness import (
    Task,
    add_common_arguments,
    add_scene_arguments,
    editor,
    fidelity,
    load,
    open_out,
    read_config,
    results_of,
    run_cases,
    settings_of,
    tell,
    value_of,
    write_json,
    write_text,
    write_until_all_are_seen,
)
from minidrag.bench.tables import MEASURES, entry, markdown, summarize
from minidrag.config import EditConfig

VALUES: dict[str, tuple[Any, ...]] = {  # around the default, for a drag in turn
    "inversion_steps": (4, 8, 12, 14, 16, 20),  # of 20, the noise levels of the paper's 10 to 50 of 50
    "lora_steps": (0, 20, 40, 80, 120, 200),
    "block": (1, 2, 3, 4),
    "mask_weight": (0.0, 0.1, 0.2, 0.5, 1.0),
    "lora_targets": ("qk", "qkv", "qkvo"),
    "lora_lr_ratio": (1.0, 4.0, 8.0, 16.0),
    "drag_lr": (0.01, 0.02, 0.04, 0.08),
    "drag_steps": (0, 3, 6, 12),
    "drag_levels": (1, 3, 5, 7, 10),
    "hold_steps": (0, 2, 3, 6),
    "motion_loss": ("sum", "mean"),
    "motion_reference": ("moving", "start"),
    "motion_step": (1.0, 2.0, 4.0),
}
SHOWN = (
    *("MD", "IF", "distance", "remaining", "lost", "arrived"),
    *("PSNR inside", "SSIM inside", "PSNR back", "PSNR reconstruction", "LoRA loss"),
)
NO_EDIT = "no edit"

Table = dict[str, dict[str, dict[str, Any] | None]]  # value -> measure -> mean, low, high, count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [field.name for field in fields(EditConfig)]
    parser.add_argument("--over", required=True, choices=names, metavar="FIELD", help=", ".join(names))
    parser.add_argument("--values", nargs="+", metavar="VALUE", help="default: some for the usual fields")
    parser.add_argument("--dragbench", type=Path, metavar="FOLDER", help="its images instead of scenes")
    add_common_arguments(parser)
    add_scene_arguments(parser)
    dragbench.add_folder_arguments(parser)


def nothing(case: Case) -> Edited:
    """An editor that changes nothing."""
    return Edited(case.before, case.before, {})


def table_of(results: dict[str, list[dict[str, Any]]]) -> Table:
    return {value: summarize(some)["kinds"]["all"]["edit"] for value, some in results.items() if some}


def report(field: str, table: Table) -> str:
    """Markdown table with a row for each value."""
    shown = [name for name in SHOWN if any(row[name] for row in table.values())]
    rows = [[value, *(entry(row[name], MEASURES[name]) for name in shown)] for value, row in table.items()]
    return markdown([field, *shown], rows)


def write(field: str, table: Table, out: Path) -> str:
    """Write FIELD.json and FIELD.md; return the text to print."""
    text = report(field, table)
    write_json(table, out / f"{field}.json")
    write_text(text + "\n", out / f"{field}.md")
    return text


def chosen_values(field: str, given: Sequence[str] | None) -> tuple[Any, ...]:
    """Values to try; ValueError if none are given or known."""
    values = tuple(map(value_of, given)) if given else VALUES.get(field, ())
    if not values:
        raise ValueError(f"there are no usual values for {field}: give some with --values")
    return values


def scene_task(args: argparse.Namespace) -> Task:
    model, network = load(args), fidelity()

    def settings(config: EditConfig) -> dict[str, Any]:
        return settings_of(model, config, args.seed, False, network, args.back) | {"style": args.style}

    cases = make_cases(args.cases, args.kinds, args.seed, args.style)
    return Task(model, cases, learned_measures(model, network), settings)


def ablate(args: argparse.Namespace) -> int:
    """Run all values; return the exit status."""
    field, base = args.over, read_config(args)
    configs = {str(value): configured(base, {field: value}) for value in chosen_values(field, args.values)}
    task = dragbench.task_of(args, args.dragbench) if args.dragbench else scene_task(args)
    out = open_out(args.out, task.settings(base), "ablate")
    folders = {NO_EDIT: out / NO_EDIT.replace(" ", "-")}

    def results() -> dict[str, list[dict[str, Any]]]:
        return {value: results_of(task.cases, folder) for value, folder in folders.items()}

    run_cases(task.cases, nothing, task.learned, folders[NO_EDIT], compare=False)
    for value, config in configs.items():
        print(f"minidrag: {field} = {value}", file=sys.stderr)
        folders[value] = open_out(out / f"{field}={value}", task.settings(config))
        edit = editor(task.model, config, args.seed, args.back)
        run_cases(task.cases, edit, task.learned, folders[value], compare=False)
        write(field, table_of(results()), out)
    text = write_until_all_are_seen(results, lambda some: write(field, table_of(some), out))
    done = sum(map(len, results().values()))
    return tell(text, out, done, len(task.cases) * len(folders), task.broken)


def run(args: argparse.Namespace) -> int:
    return ablate(args)
