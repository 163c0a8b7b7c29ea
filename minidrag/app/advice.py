"""Advice before and after an edit, in plain sentences."""

import math
import re
from collections.abc import Mapping

from PIL import Image

from minidrag.app.session import Session
from minidrag.edit import Edit
from minidrag.images import psnr, resize
from minidrag.method.drag import all_arrived
from minidrag.model import decode
from minidrag.points import is_editable
from minidrag.system.console import reason
from minidrag.weights import lora_file

# PSNR in dB, measured: the small model's autoencoder returns 250 scenes at 28 to 40, photos, plain colors,
# and noise at 9 to 20; with inversion and back its scenes come at 28 to 36.
MIN_AUTOENCODED = 25  # of the small model's scenes
MIN_RECONSTRUCTED = 22  # of a reconstruction that resembles the original
# As other programs write weights of words, and LoRAs, in a prompt.
MARKUP = re.compile(r"\([^()]+:\s*[\d.]+\s*\)|<\w+:[^<>]+>|\(\([^()]+\)\)|\[[^\[\]]+\]")
STUCK = 0.1  # of its distance: a handle that has covered less has not moved


def before(session: Session) -> list[str]:
    """Cautions about an edit that is about to start."""
    options = session.options
    cautions = lora_file.left_out(options.lora) if options.lora else []
    if options.model == "tiny" and session.generated is None and autoencoded(session) < MIN_AUTOENCODED:
        cautions.append("the tiny model knows only its rendered scenes: use --model sd15 for photos")
    if session.image.info.get("transparent"):
        cautions.append("transparent parts of the image count as white, and the results have no transparency")
    if session.window.size != session.image.size:
        width, height = session.window.size
        part = f"a window of {width}x{height} pixels around mask and points"
        cautions.append(f"edited in {part}, at {scale(session):.2g} image pixels per pixel")
    if session.mask is None:
        why = "the mask is empty" if options.mask else "there is no mask"
        cautions.append(f"{why}, so everything may change: paint what may change white in --mask")
    cautions += about_prompt(session)
    return [*cautions, *cut_targets(session).values()]


def cut_targets(session: Session) -> dict[int, str]:
    """A sentence for each drag, by its number, whose target is outside the mask or a cell from its edge."""
    cautions = {}
    for number, target in enumerate(session.options.targets, 1):
        if session.mask is None or is_editable(session.mask, target, cell(session)):
            continue
        cautions[number] = f"the target of drag {number} is outside the mask, where nothing can appear"
        if is_editable(session.mask, target):
            cautions[number] = f"the mask ends at the target of drag {number} and may cut what lands there"
    return cautions


def scale(session: Session) -> float:
    """Pixels of the image per pixel that the model works at."""
    return session.window.width / session.size[0]


def cell(session: Session) -> float:
    """Pixels of the image per cell of the latent."""
    return scale(session) * session.model.vae.config.factor


def autoencoded(session: Session) -> float:
    """PSNR of the image after the model's autoencoder, in dB."""
    return psnr(resize(session.part, session.size), decode(session.model, session.latent))


def about_prompt(session: Session) -> list[str]:
    prompt = session.options.prompt
    tokenizer = session.model.tokenizer
    cautions = []
    if not prompt.strip():
        cautions.append("there is no prompt: describing the image usually helps (--prompt)")
    if markup := MARKUP.search(prompt):
        cautions.append(f"{markup[0]} in the prompt is read as plain words: weights have no effect here")
    if (length := tokenizer.length(prompt)) > tokenizer.context:
        cautions.append(f"the prompt has {length} tokens: the model reads only the first {tokenizer.context}")
    return cautions


def fidelity(edit: Edit, image: Image.Image) -> float:
    """PSNR of the reconstruction against the original in dB, in the window at the working size."""
    rows, columns = edit.task.grid
    size = 2 * columns, 2 * rows
    one, other = (resize(edit.window.crop(each), size) for each in (image, edit.reconstruction))
    return psnr(one, other)


def about_fidelity(session: Session, edit: Edit) -> list[str]:
    """A sentence about a reconstruction that is far from the original; none for a near one."""
    level = fidelity(edit, session.image)
    if level >= MIN_RECONSTRUCTED:
        return []
    causes = ["a model that does not know such images", "a VAE of another model (--vae)"]
    causes.append("a model trained for another prediction type than its configuration says")
    causes += ["a LoRA of another image (--lora)"] if session.options.lora else []
    causes += ["an image of much fine detail"] if session.options.model != "tiny" else []
    return [
        f"advice: the reconstruction is poor ({level:.1f} dB PSNR; expect {MIN_RECONSTRUCTED} or more), so "
        f"the edit will be too. Possible causes: {', '.join(causes[:-1])}, or {causes[-1]}"
    ]


def about_missing(missing: Mapping[str, BaseException]) -> list[str]:
    """A sentence for each result that could not be written."""
    reasons = {name: getattr(error, "strerror", None) or reason(error) for name, error in missing.items()}
    return [f"note: {name} is missing: {why}" for name, why in reasons.items()]


def after(session: Session, edit: Edit) -> list[str]:
    """Result of an edit, and what to try if it fell short."""
    return [*moves(edit), *about_drag(edit), *about_fidelity(session, edit)]


def moves(edit: Edit) -> list[str]:
    """The way of each handle."""
    lines = []
    for number, (distance, remaining) in enumerate(zip(edit.distances, edit.remaining, strict=True), 1):
        moved = f"moved {distance - remaining:.1f} of {distance:.1f} pixels, {remaining:.1f} remain"
        if remaining > distance:
            moved = f"moved away from its target: {remaining:.1f} pixels remain of {distance:.1f}"
        lines.append(f"handle {number} {moved}")
    return lines


def about_drag(edit: Edit) -> list[str]:
    """Say whether the handles arrived, and what to try if they did not."""
    config = edit.config
    updates = f"with {len(edit.losses)} updates"
    if all_arrived(edit.steps[0].handles, edit.task.targets, config.tolerance):
        return ["advice: there was nothing to drag, as every target is within --tolerance of its handle"]
    if edit.arrived:
        return [f"every handle arrived, {updates}"]
    if edit.steps[-1].level - 1 > max(config.levels - config.drag_levels, 0):
        lines = [f"stopped: no handle moved any more, {updates.replace('with', 'after')}"]
    else:
        lines = [f"not every handle arrived, {updates} (--drag-levels, --drag-steps)"]
    ways = zip(edit.paths, edit.distances, strict=True)
    stuck = [
        str(number)
        for number, (path, distance) in enumerate(ways, 1)
        if distance > 0 and math.dist(path[0], path[-1]) < STUCK * distance
    ]
    if stuck:
        lines.append(
            f"advice: handle {', '.join(stuck)} did not move: put it on a corner or pattern of the object, "
            "name the object in --prompt, mark more in --mask, or try a larger --drag-lr"
        )
    return [*lines, "advice: more --drag-levels or --drag-steps may bring it further"]
