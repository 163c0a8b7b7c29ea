"""What a person should know before and after an edit, in plain sentences."""

import math

from PIL import Image
from torch import Tensor

from minidrag.app.options import Request
from minidrag.edit import Edit
from minidrag.weights.model import Model

FAR = 0.25  # of the picture's shorter side: from there on drags often do not arrive
STUCK = 0.1  # of its way, which a handle that has not moved did not cover


def before(model: Model, picture: Image.Image, mask: Tensor | None, request: Request) -> list[str]:
    """What may spoil an edit that is about to begin."""
    found, limit = [], model.tokenizer.context
    if mask is None:
        why = "the mask is empty" if request.mask else "there is no mask"
        found.append(f"{why}: everything may change; paint white in --mask what may, and the rest stays")
    if not request.prompt.strip():
        found.append("there is no prompt: one that says what the picture shows mostly helps (--prompt)")
    if (length := model.tokenizer.length(request.prompt)) > limit:
        found.append(f"the prompt has {length} tokens and was cut to the {limit} that the model reads")
    for number, (handle, (x, y)) in enumerate(request.drags, 1):
        if math.dist(handle, (x, y)) > FAR * min(picture.size):
            found.append(f"drag {number} is far for this picture: --config thorough may come further")
        row, column = min(round(y), picture.height - 1), min(round(x), picture.width - 1)
        if mask is not None and mask[row, column] < 0.5:
            found.append(f"the target of drag {number} lies outside the mask, where nothing can show up")
    return found


def after(edit: Edit, request: Request) -> list[str]:
    """How an edit went, and what to try where it went badly."""
    found = []
    for number, (way, left) in enumerate(zip(edit.distances, edit.remaining, strict=True), 1):
        if left > way:
            came = f"had {way:.1f} pixels to go and went away from its target, {left:.1f} are left"
        else:
            came = f"came {way - left:.1f} of {way:.1f} pixels nearer to its target, {left:.1f} are left"
        found.append(f"handle {number}: {came}")
    done = len(edit.losses)
    ends = {
        "arrived": f"every handle has arrived, after {done} steps",
        "steps": f"all {done} steps were done (--drag-steps)",
    }
    found.append(f"stopped: {ends[edit.reason]}")
    stuck = [
        str(number)
        for number, (path, way) in enumerate(zip(edit.paths, edit.distances, strict=True), 1)
        if edit.reason != "arrived" and way > 0 and math.dist(path[0], path[-1]) < STUCK * way
    ]
    if stuck:
        found.append(
            f"advice: handle {', '.join(stuck)} did not move: put it on a corner or pattern of the thing, "
            "name the thing in --prompt, mark more in --mask, or try a larger --drag-lr"
        )
    if edit.reason == "steps":
        more = f"--config thorough, or more --drag-steps than {request.config.drag_steps}"
        found.append(f"advice: {more}, may bring it further")
    if edit.reason == "arrived" and done == 0:
        found.append("advice: nothing was dragged, as every target lay within --tolerance of its handle")
    return found
