"""Time estimates of an edit, from the last run on this machine and the UNet evaluations of its settings."""

import time
from contextlib import suppress
from typing import Any

from minidrag.app.results import FRAME_EVERY
from minidrag.config import EditConfig

STAGES = ("model", "LoRA", "inversion", "drag", "denoising", "animation")
FIELDS = EditConfig.__dataclass_fields__.keys()


def work(config: EditConfig, updates: int | None = None) -> dict[str, float]:
    """UNet evaluations by stage, at most; a backward pass counts as one. The animation counts decodings.

    updates: of the drag; None: as many as the settings allow.
    """
    several = config.warp_start or config.drag_levels > 1
    levels = min(config.drag_levels, config.levels) if several else 1
    updates = levels * config.drag_steps if updates is None else updates
    return {
        "LoRA": 2 * config.lora_steps * config.lora_batch,
        "inversion": config.levels,
        "drag": 2 * updates + levels + (levels if several else 0),  # of the edit, of the original
        "denoising": 2 * (config.levels - (levels if several else 0)),
        "animation": 1 + updates / FRAME_EVERY,
    }


def rates(history: list[dict[str, Any]], model: str, device: str) -> dict[str, float]:
    """Seconds per unit of work by stage, of the last run with a model; empty if there was none.

    history: contents of run.json, in the order of writing.
    """
    for values in reversed(history):
        result = values.get("result", {})
        seconds = result.get("seconds")
        losses = result.get("losses")
        if values.get("model") == model and values.get("device") == device and seconds and losses is not None:
            settings = {name: value for name, value in values.get("config", {}).items() if name in FIELDS}
            with suppress(TypeError, ValueError):  # of another version, or written by hand
                units = work(EditConfig(**settings), len(losses))
                stages = [name for name in units if name in seconds and units[name]]
                return {name: seconds[name] / units[name] for name in stages}
    return {}


def expected(config: EditConfig, rates: dict[str, float], skip: tuple[str, ...] = ()) -> float | None:
    """Seconds that an edit takes at most; None if nothing was measured. skip: stages that are done."""
    usual = rates.get("inversion")
    if usual is None:
        return None
    return sum(units * rates.get(name, usual) for name, units in work(config).items() if name not in skip)


def remaining(
    config: EditConfig, stage: str, done: int, total: int, began: float, rates: dict[str, float]
) -> float | None:
    """Seconds to the end of an edit, `done` of `total` steps into a stage since `began`; None: unknown."""
    units = work(config)
    elapsed = time.perf_counter() - began
    if stage not in units:  # a model that loads, an image that is generated
        return elapsed / done * (total - done) if done else expected(config, rates)
    rate = rates.get(stage)
    if done and total and units[stage]:
        rate = elapsed / (units[stage] * done / total)
    if rate is None:
        return None
    later = STAGES[STAGES.index(stage) + 1 :]
    rest = sum(units[name] * rates.get(name, rate) for name in later)
    return max(0.0, units[stage] * rate * (1 - done / total if done else 1) + rest)
