"""Tables of means and confidence intervals over the results of all cases."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from minidrag.bench.metrics import bootstrap, rank_correlation

MEASURES = {  # name -> decimals
    "distance": 1,
    "remaining": 2,
    "lost": 2,
    "arrived": 2,
    "PSNR inside": 1,
    "PSNR outside": 1,
    "sharpness": 2,
    "detail": 2,
    "MD": 1,
    "IF": 3,
    "PSNR back": 1,
    "PSNR reconstruction": 1,
    "LoRA loss": 2,
}
EXPLAINED = """\
distance: from the measured position of the dragged part to its target, in pixels of 128. remaining: fraction
of the drag that is left, 0 at the target, 1 if nothing moved. lost: fraction of cases in which the part was
not found; distance and remaining are over the others. arrived: fraction of all cases with remaining at most
0.3. inside, outside: the mask, compared with the true result. sharpness: variance of the Laplacian inside the
mask over that of the true result. detail: correlation with it of what is finer than the working size. MD and
IF as defined in the paper, MD with the features of this model, in pixels of 128, over all pairs of points.
back: the result dragged back, compared with the original inside the mask. reconstruction: the original
inverted and denoised without a drag, compared with what the autoencoder makes of it. LoRA loss: equation 2
with the LoRA over equation 2 without it, on the same noise. In brackets: 95 % confidence interval."""

Results = Sequence[dict[str, Any]]  # per case: {"kind": ..., "rows": {row: {measure: value or None}}, ...}
Summary = dict[str, Any]


def summarize(results: Results) -> Summary:
    """Average every measure: {"kinds": {kind or "all": {row: {measure: {mean, low, high, count}}}}, ...}."""
    kinds = {"all": list(results)}
    for result in results:
        kinds.setdefault(result["kind"], []).append(result)
    first = next(iter(results), {"rows": {"edit": {}}})
    edits = [result["rows"]["edit"] for result in results]
    return {
        "cases": len(results),
        "cases of each kind": {kind: len(some) for kind, some in kinds.items()},
        "kinds": {
            kind: {row: means([result["rows"][row] for result in some]) for row in first["rows"]}
            for kind, some in kinds.items()
        },
        "rank correlation of MD and distance over the edits": correlation(edits),
    }


def correlation(edits: Sequence[dict[str, Any]]) -> float | None:
    """Rank correlation of MD and the true distance, over the edits whose distance is known."""
    pairs = [(np.mean(row["MD"]), row["distance"]) for row in edits if row.get("distance") is not None]
    return rank_correlation(*zip(*pairs, strict=True)) if pairs else None


def means(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any] | None]:
    """Mean and confidence interval of each measure over the rows that have it; None if no row has it.

    Lists are flattened, so that MD is the mean over pairs of points, not over images.
    """
    cells: dict[str, dict[str, Any] | None] = {}
    for name in MEASURES:
        parts = [np.ravel(row[name]) for row in rows if row.get(name) is not None]
        if not parts:
            cells[name] = None
            continue
        values = np.concatenate(parts).astype(float).tolist()
        low, high = bootstrap(values)
        cells[name] = {"mean": float(np.mean(values)), "low": low, "high": high, "count": len(values)}
    return cells


def entry(cell: dict[str, Any] | None, digits: int) -> str:
    """Format a mean and its interval, such as "3.2 [2.1, 4.0]"."""
    if cell is None:
        return "-"
    mean, low, high = (f"{cell[name]:.{digits}f}" for name in ("mean", "low", "high"))
    return mean if low == high else f"{mean} [{low}, {high}]"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown table with aligned columns."""
    lines = [list(head), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def report(summary: Summary, explained: str = EXPLAINED) -> str:
    """Summary in Markdown: edits by kind, all rows over all kinds, correlations."""
    columns = [name for name in MEASURES if any(row[name] for row in summary["kinds"]["all"].values())]
    kinds = [*(kind for kind in summary["kinds"] if kind != "all"), "all"]

    def cells(row: dict[str, Any]) -> list[str]:
        return [entry(row[name], MEASURES[name]) for name in columns]

    counts = summary["cases of each kind"]
    by_kind = [[kind, str(counts[kind]), *cells(summary["kinds"][kind]["edit"])] for kind in kinds]
    rows = [[name, *cells(row)] for name, row in summary["kinds"]["all"].items()]
    parts = [markdown(["edits", "cases", *columns], by_kind), markdown(["all kinds", *columns], rows)]
    value = summary["rank correlation of MD and distance over the edits"]
    if value is not None:
        parts.append(f"Rank correlation of MD and distance over the edits: {value:.2f}")
    return "\n\n".join([*parts, explained])


def mean_seconds(results: Results) -> dict[str, float]:
    """Mean seconds of each stage over the cases that ran it."""
    stages: dict[str, list[float]] = {}
    for result in results:
        for name, value in result["seconds"].items():
            stages.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in stages.items()}
