"""Advice before and after an edit, in plain sentences."""

import math
import re
from collections.abc import Mapping

from PIL import Image
from torch import Tensor

from minidrag.app.options import Options
from minidrag.config import EditConfig
from minidrag.edit import Edit
from minidrag.images import psnr, resize
from minidrag.method.drag import all_arrived
from minidrag.model import Model, decode, encode, working_size
from minidrag.system.console import reason

# PSNR in dB, measured: the small model's autoencoder returns 250 scenes at 28 to 40, photos, plain colors,
# and noise at 9 to 20; with inversion and back its scenes come at 28 to 36.
UNKNOWN = 25  # of the small model's autoencoder: less is not one of its scenes
FAR = 22  # of a reconstruction: less is not the original any more
# As other programs write weights of words, and LoRAs, in a prompt.
MARKUP = re.compile(r"\([^()]+:\s*[\d.]+\s*\)|<\w+:[^<>]+>|\(\([^()]+\)\)|\[[^\[\]]+\]")
STUCK = 0.1  # of its distance: a handle that has covered less has not moved


def before(model: Model, image: Image.Image, mask: Tensor | None, options: Options) -> list[str]:
    """Cautions about an edit that is about to start."""
    found, limit = [], model.tokenizer.context
    if options.model == "tiny" and known(model, image) < UNKNOWN:
        found.append("--model tiny knows only scenes of its own, and this is not one: sd15 is for photos")
    if image.info.get("transparent"):
        found.append("transparent parts of the image count as white, and the results have no transparency")
    if mask is None:
        why = "the mask is empty" if options.mask else "there is no mask"
        found.append(f"{why}, so everything may change: paint what may change white in --mask")
    if not options.prompt.strip():
        found.append("there is no prompt: describing the image usually helps (--prompt)")
    if markup := MARKUP.search(options.prompt):
        found.append(f"{markup[0]} in the prompt is read as plain words: weights have no effect here")
    if (length := model.tokenizer.length(options.prompt)) > limit:
        found.append(f"the prompt has {length} tokens: the model reads only the first {limit}")
    for number, (_, target) in enumerate(options.drags, 1):
        row, column = min(round(target.y), image.height - 1), min(round(target.x), image.width - 1)
        if mask is not None and mask[row, column] < 0.5:
            found.append(f"the target of drag {number} is outside the mask, where nothing can appear")
    return found


def known(model: Model, image: Image.Image) -> float:
    """PSNR of an image after the model's autoencoder, in dB."""
    small = resize(image, working_size(model, image.size, EditConfig()))
    return psnr(small, decode(model, encode(model, image, EditConfig())[0]))


def fidelity(edit: Edit, image: Image.Image) -> float:
    """PSNR of the reconstruction against the original in dB, at the working size."""
    rows, columns = edit.task.grid
    one, other = (resize(picture, (2 * columns, 2 * rows)) for picture in (image, edit.reconstruction))
    return psnr(one, other)


def about_fidelity(edit: Edit, image: Image.Image, options: Options) -> list[str]:
    """A sentence about a reconstruction that is far from the original; none for a near one."""
    if (found := fidelity(edit, image)) >= FAR:
        return []
    reasons = ["a model that does not know such images", "a VAE of another model (--vae)"]
    reasons += ["a model trained for another prediction type than its configuration says"]
    reasons += ["a LoRA of another image (--lora)"] if options.lora else []
    reasons += ["an image of much fine detail"] if options.model != "tiny" else []
    return [
        f"advice: the reconstruction is far from the original, {found:.1f} dB (PSNR; good ones have {FAR} or "
        f"more), so the edit is as well: likely reasons are {', '.join(reasons[:-1])}, or {reasons[-1]}"
    ]


def about_missing(missing: Mapping[str, BaseException]) -> list[str]:
    """A sentence for each result that could not be written."""
    reasons = {name: getattr(error, "strerror", None) or reason(error) for name, error in missing.items()}
    return [f"note: {name} is missing: {why}" for name, why in reasons.items()]


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
    if all_arrived(edit.steps[0].handles, edit.task.targets, config.tolerance):
        nothing = "advice: there was nothing to drag, as every target is within --tolerance of its handle"
        return [*found, nothing]
    if edit.arrived:
        return [*found, f"every handle arrived, with {updates} updates"]
    if edit.steps[-1].level - 1 > max(config.inversion_steps - config.drag_levels, 0):
        found.append(f"stopped: no handle moved any more, after {updates} updates")
    else:
        found.append(f"not every handle arrived, with {updates} updates (--drag-levels, --drag-steps)")
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
