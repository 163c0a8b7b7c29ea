"""From the measures of single cases to tables of means and their intervals."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from minidrag.bench.metrics import bootstrap, rank_correlation

MEASURES = {  # name -> digits shown
    "distance": 1,
    "share": 2,
    "lost": 2,
    "arrived": 2,
    "PSNR inside": 1,
    "SSIM inside": 2,
    "PSNR outside": 1,
    "SSIM outside": 3,
    "MD": 1,
    "IF": 3,
}
EXPLAINED = """\
distance: from where the dragged thing was found to its target, in pixels of 128. share: of the way left, 0 at
the target, 1 not moved. lost: share of cases in which nothing fits; distance and share are of the others.
arrived: share of all cases in which the thing was found and at most 0.3 of its way was left. inside, outside:
of the mask, against the true result. MD and IF as the paper defines them, MD by the features of this model,
in pixels of 128, the mean over all pairs. In brackets the 95 % interval of the mean."""
# What the paper measures without the truth, and what of the truth that should follow.
FOLLOWS = (("MD", "distance"), ("IF", "SSIM inside"))

Results = Sequence[
    dict[str, Any]
]  # of the cases: {"kind": ..., "rows": {row: {measure: value or None}}, ...}
Summary = dict[str, Any]


def summarise(results: Results) -> Summary:
    """Means of every measure: {"kinds": {kind or "all": {row: {measure: {mean, low, high, count}}}}, ...}."""
    kinds = {"all": list(results)}
    for result in results:
        kinds.setdefault(result["kind"], []).append(result)
    first = next(iter(results), {"rows": {"edit": {}}})
    correlations = {}
    for name, other in FOLLOWS:
        pairs = [(row.get(name), row.get(other)) for row in (result["rows"]["edit"] for result in results)]
        known = [(float(np.mean(one)), two) for one, two in pairs if one is not None and two is not None]
        if any(two is not None for _, two in pairs):
            value = rank_correlation(*zip(*known, strict=True)) if known else None
            correlations[f"{name} and {other}"] = value
    return {
        "cases": len(results),
        "cases of each kind": {kind: len(some) for kind, some in kinds.items()},
        "kinds": {
            kind: {row: means([result["rows"][row] for result in some]) for row in first["rows"]}
            for kind, some in kinds.items()
        },
        "rank correlations over the edits": correlations,
    }


def means(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any] | None]:
    """The mean of each measure over the rows that have it, with its interval; None where none has.

    A row may have a list of values: they count one by one, so that MD is the mean over pairs, not pictures.
    """
    found: dict[str, dict[str, Any] | None] = {}
    for name in MEASURES:
        parts = [np.ravel(row[name]) for row in rows if row.get(name) is not None]
        if not parts:
            found[name] = None
            continue
        values = np.concatenate(parts).astype(float).tolist()
        low, high = bootstrap(values)
        found[name] = {"mean": float(np.mean(values)), "low": low, "high": high, "count": len(values)}
    return found


def entry(cell: dict[str, Any] | None, digits: int) -> str:
    """A mean and its interval, as in "3.2 [2.1, 4.0]"."""
    if cell is None:
        return "-"
    mean, low, high = (f"{cell[name]:.{digits}f}" for name in ("mean", "low", "high"))
    return mean if low == high else f"{mean} [{low}, {high}]"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, its columns padded so that it can be read as it is."""
    lines = [list(head), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def report(summary: Summary, explained: str = EXPLAINED) -> str:
    """The whole summary in Markdown: the edits by kind, all rows over all kinds, the correlations."""
    shown = [name for name in MEASURES if any(row[name] for row in summary["kinds"]["all"].values())]
    kinds = [*(kind for kind in summary["kinds"] if kind != "all"), "all"]

    def cells(row: dict[str, Any]) -> list[str]:
        return [entry(row[name], MEASURES[name]) for name in shown]

    counts = summary["cases of each kind"]
    by_kind = [[kind, str(counts[kind]), *cells(summary["kinds"][kind]["edit"])] for kind in kinds]
    rows = [[name, *cells(row)] for name, row in summary["kinds"]["all"].items()]
    parts = [markdown(["edits", "cases", *shown], by_kind), markdown(["all kinds", *shown], rows)]
    for name, value in summary["rank correlations over the edits"].items():
        parts.append(f"Rank correlation of {name} over the edits: {'-' if value is None else f'{value:.2f}'}")
    return "\n\n".join([*parts, explained])


def mean_seconds(results: Results) -> dict[str, float]:
    """Seconds of each stage, the mean over the cases in which it was run."""
    stages: dict[str, list[float]] = {}
    for result in results:
        for name, value in result["seconds"].items():
            stages.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in stages.items()}
