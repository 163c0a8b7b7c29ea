"""Advice before and after an edit, in plain sentences."""

import math

from PIL import Image
from torch import Tensor

from minidrag.app.options import Options
from minidrag.edit import Edit
from minidrag.weights.model import Model

STUCK = 0.1  # of its distance: a handle that has covered less has not moved


def before(model: Model, image: Image.Image, mask: Tensor | None, options: Options) -> list[str]:
    """Cautions about an edit that is about to start."""
    found, limit = [], model.tokenizer.context
    if mask is None:
        why = "the mask is empty" if options.mask else "there is no mask"
        found.append(f"{why}, so everything may change: paint what may change white in --mask")
    if not options.prompt.strip():
        found.append("there is no prompt: describing the image usually helps (--prompt)")
    if (length := model.tokenizer.length(options.prompt)) > limit:
        found.append(f"the prompt has {length} tokens: the model reads only the first {limit}")
    for number, (_, target) in enumerate(options.drags, 1):
        row, column = min(round(target.y), image.height - 1), min(round(target.x), image.width - 1)
        if mask is not None and mask[row, column] < 0.5:
            found.append(f"the target of drag {number} is outside the mask, where nothing can appear")
    return found


def after(edit: Edit, options: Options) -> list[str]:
    """Result of an edit, and what to try if it fell short."""
    found = []
    pairs = list(zip(edit.paths, edit.distances, edit.remaining, strict=True))
    for number, (_, distance, remaining) in enumerate(pairs, 1):
        if remaining > distance:
            moved = f"moved away from its target: {remaining:.1f} pixels remain of {distance:.1f}"
        else:
            moved = f"moved {distance - remaining:.1f} of {distance:.1f} pixels, {remaining:.1f} remain"
        found.append(f"handle {number} {moved}")
    updates, config = len(edit.losses), options.config
    if edit.arrived:
        moved = any(path[0] != path[-1] for path in edit.paths)
        nothing = "advice: nothing was dragged, as every target is within --tolerance of its handle"
        return [*found, f"stopped: every handle arrived after {updates} updates" if moved else nothing]
    if updates < config.drag_levels * config.drag_steps:
        found.append(f"stopped: no handle moved any more, after {updates} updates")
    else:
        found.append(f"stopped: all {updates} updates were used (--drag-levels, --drag-steps)")
    stuck = [
        str(number)
        for number, (path, distance, _) in enumerate(pairs, 1)
        if distance > 0 and math.dist(path[0], path[-1]) < STUCK * distance
    ]
    if stuck:
        found.append(
            f"advice: handle {', '.join(stuck)} did not move: put it on a corner or pattern of the object, "
            "name the object in --prompt, mark more in --mask, or try a larger --drag-lr"
        )
    return [*found, "advice: more --drag-levels or --drag-steps may bring it further"]
