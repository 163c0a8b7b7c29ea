"""Edits the same scenes with several values of one constant and shows what it does to the edits.

    python -m minidrag.bench ablate --over lora_steps [--values 0 20 40 80] [--cases 60] [--set block=2]

As in the paper's figure 7, with the placement beside MD and IF. Finished cases are kept and not done again.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from minidrag.bench.cases import Case, Edited, learned_measures, make_cases
from minidrag.bench.scenes import (
    add_common_arguments,
    editor,
    fidelity,
    load,
    open_out,
    read_config,
    run_cases,
    settings_of,
    value_of,
)
from minidrag.bench.tables import MEASURES, entry, markdown, summarise
from minidrag.edit import EditConfig
from minidrag.request import configured

VALUES: dict[str, tuple[Any, ...]] = {  # the paper's, and what users ask for
    "edited_step": (10, 20, 30, 35, 40, 50),
    "lora_steps": (0, 20, 40, 80, 120, 200),
    "block": (1, 2, 3, 4),
    "mask_weight": (0.0, 0.1, 0.2, 0.5, 1.0),
    "lora_targets": ("qk", "qkv", "qkvo"),
    "drag_rate": (0.005, 0.01, 0.02, 0.04),
    "drag_steps": (20, 40, 80, 160),
    "motion_loss": ("sum", "mean"),
}
SHOWN = ("MD", "IF", "distance", "share", "lost", "PSNR inside", "SSIM inside")
PANELS = (("MD", "IF"), ("distance", "lost"))  # of the plot: what its left and its right axis show
NO_EDIT = "no edit"

Table = dict[str, dict[str, dict[str, Any] | None]]  # value -> measure -> mean, low, high, count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [field.name for field in fields(EditConfig)]
    parser.add_argument("--over", required=True, choices=names, metavar="FIELD", help=", ".join(names))
    parser.add_argument("--values", nargs="+", metavar="VALUE", help="default: some for the usual fields")
    add_common_arguments(parser)


def nothing(case: Case) -> Edited:
    """The editor that leaves every picture as it is."""
    return Edited(case.before, case.before, {})


def table_of(results: dict[str, list[dict[str, Any]]]) -> Table:
    return {value: summarise(some)["kinds"]["all"]["edit"] for value, some in results.items() if some}


def report(field: str, table: Table) -> str:
    """The table in Markdown, a row for each value."""
    shown = [name for name in SHOWN if any(row[name] for row in table.values())]
    rows = [[value, *(entry(row[name], MEASURES[name]) for name in shown)] for value, row in table.items()]
    return markdown([field, *shown], rows)


def curve(table: Table, name: str) -> tuple[list[str], list[float]]:
    """What the plot shows of one measure: the values that have it, and its means."""
    known = {value: row[name] for value, row in table.items() if value != NO_EDIT}
    pairs = [(value, cell["mean"]) for value, cell in known.items() if cell is not None]
    return [value for value, _ in pairs], [mean for _, mean in pairs]


def plot(field: str, table: Table, path: Path) -> None:
    """Draws the curves; ImportError where matplotlib is not there."""
    importlib.import_module("matplotlib").use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    figure, panels = pyplot.subplots(1, len(PANELS), figsize=(5 * len(PANELS), 3.4), layout="constrained")
    for left, names in zip(panels, PANELS, strict=True):
        for axis, name, color in zip((left, left.twinx()), names, ("tab:blue", "tab:orange"), strict=True):
            values, means = curve(table, name)
            axis.plot(values, means, "o-", color=color)
            axis.set_ylabel(name, color=color)
        left.set_xlabel(field)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


def write(field: str, table: Table, out: Path) -> None:
    """FIELD.json and FIELD.md."""
    (out / f"{field}.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    (out / f"{field}.md").write_text(report(field, table) + "\n", encoding="utf-8")


def chosen_values(field: str, given: Sequence[str] | None) -> tuple[Any, ...]:
    """The values to try; ValueError where none are given or known."""
    values = tuple(map(value_of, given)) if given else VALUES.get(field, ())
    if not values:
        raise ValueError(f"there are no usual values for {field}: give some with --values")
    return values


def ablate(args: argparse.Namespace) -> bool:
    """Runs all values; returns whether every case could be edited."""
    field, base = args.over, read_config(args)
    configs = {str(value): configured(base, {field: value}) for value in chosen_values(field, args.values)}
    model, cases = load(args), make_cases(args.cases, args.kinds, args.seed)
    network, whole = fidelity(), True
    learned = learned_measures(model, network)
    out = open_out(args.out, settings_of(model, base, args.seed, False, network), "ablate")
    results = {NO_EDIT: run_cases(cases, nothing, learned, out / NO_EDIT.replace(" ", "-"), compare=False)}
    for value, config in configs.items():
        print(f"minidrag: {field} = {value}", file=sys.stderr)
        settings = settings_of(model, config, args.seed, False, network)
        folder = open_out(out / f"{field}={value}", settings)
        edit = editor(model, config, args.seed)
        results[value] = run_cases(cases, edit, learned, folder, compare=False)
        whole &= len(results[value]) == len(cases)
        write(field, table_of(results), out)
    print(report(field, table_of(results)))
    try:
        plot(field, table_of(results), out / f"{field}.png")
    except ImportError:
        message = "the plot is left out: it needs matplotlib (pip install 'minidrag[bench]')"
        print(f"minidrag: {message}", file=sys.stderr)
    print(f"Written to {out}")
    return whole


def run(args: argparse.Namespace) -> int:
    try:
        return 0 if ablate(args) else 1
    except (ValueError, OSError) as error:
        print(f"minidrag: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("minidrag: stopped; the same command goes on from here", file=sys.stderr)
        return 130
