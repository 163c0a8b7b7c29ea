"""Advice before and after an edit, in plain sentences."""

import math

from PIL import Image
from torch import Tensor

from minidrag.app.options import Options
from minidrag.edit import Edit
from minidrag.weights.model import Model

FAR = 0.25  # of the shorter side: longer drags often do not arrive
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
    for number, (handle, target) in enumerate(options.drags, 1):
        if math.dist(handle, target) > FAR * min(image.size):
            found.append(f"drag {number} is long for this image: --config thorough may bring it further")
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
    updates = len(edit.losses)
    if edit.arrived and updates == 0:
        found.append("advice: nothing was dragged, as every target is within --tolerance of its handle")
    elif edit.arrived:
        found.append(f"stopped: every handle arrived after {updates} steps")
    else:
        found.append(f"stopped: all {updates} steps were used (--drag-steps)")
        stuck = [
            str(number)
            for number, (path, distance, _) in enumerate(pairs, 1)
            if distance > 0 and math.dist(path[0], path[-1]) < STUCK * distance
        ]
        if stuck:
            found.append(
                f"advice: handle {', '.join(stuck)} did not move: put it on a corner or pattern of the "
                "object, name the object in --prompt, mark more in --mask, or try a larger --drag-lr"
            )
        found.append(
            f"advice: --config thorough, or more --drag-steps than {options.config.drag_steps}, may bring it "
            "further"
        )
    return found
