"""Files of a run, all of them or none, in a folder of their own."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image

from minidrag import images
from minidrag.app import advice, draw, lora_cache
from minidrag.app.options import to_json
from minidrag.app.session import Session
from minidrag.edit import Edit
from minidrag.method.drag import rescale
from minidrag.model import decode
from minidrag.points import Pixel
from minidrag.system.files import part_of, sweep, write_json, write_whole
from minidrag.weights import lora_file

RESULTS = ("comparison.png", "edited.png", "generated.png", "lora.safetensors", "process.gif", "run.json")
MAX_NAME = 60  # characters of an image's name in a folder's: file systems allow 255 bytes
FRAME_EVERY = 5  # drag steps between two frames of the animation


@contextmanager
def output(out: Path | None, image: Path) -> Iterator[Path]:
    """Yield a folder whose files move to `out` at the end; if anything fails, nothing is left.

    out: None: the first of runs/NAME-1, runs/NAME-2, ... that no other run has, NAME being the image's.
    Raises ValueError at once if nothing can be written there, or if results would be replaced.
    """
    numbered = (Path("runs") / f"{image.stem[:MAX_NAME]}-{number}" for number in count(1))
    try:
        folder, made = next(filter(None, map(claim, numbered))) if out is None else (out, make(out))
        sweep(folder)
        part = part_of(folder)  # on the same disk: files move at once
    except OSError as error:
        raise ValueError(f"{out or 'runs'} cannot be written to: {error.strerror}") from error
    try:
        if taken := results_in(folder):
            raise ValueError(f"{folder} has {taken} already: give another --out, or delete them")
        yield part
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        for path in made:
            with suppress(OSError):  # no longer empty
                path.rmdir()
        raise
    publish(part, folder)


def publish(part: Path, folder: Path) -> None:
    """Move the files of `part` to `folder`, unless another program has written results there meanwhile."""
    files = sorted(part.iterdir())
    try:
        taken = results_in(folder)
        if files and not taken:
            (folder / files[0].name).touch(exist_ok=False)  # of two programs, one succeeds
    except FileExistsError:
        taken = files[0].name
    if taken:
        kept = part.rename(folder / part.name.lstrip("."))
        raise ValueError(
            f"{folder} got {taken} from another program meanwhile: this run's files are in {kept}"
        )
    for file in files:
        os.replace(file, folder / file.name)
    part.rmdir()


def make(folder: Path) -> list[Path]:
    """Make a folder and its parents; return those that did not exist."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return made


def claim(folder: Path) -> tuple[Path, list[Path]] | None:
    """Make a folder that does not exist, and its parents, as `make` does; None if another run was faster."""
    made = make(folder.parent)
    try:
        folder.mkdir()
    except FileExistsError:
        sweep(folder)
        return None
    return folder, [folder, *made]


def results_in(folder: Path) -> str:
    """Names of the files in a folder that are named like results, and may be an input too."""
    return ", ".join(name for name in RESULTS if os.path.lexists(folder / name))


def write(folder: Path, session: Session, edit: Edit, stopped: str = "") -> dict[str, BaseException]:
    """Write RESULTS: the edit and everything to repeat it, then the LoRA, a comparison, and an animation.

    stopped: why the run ended early; its edit is a partial one, without a comparison and an animation.
    Returns the error, or Ctrl-C, of each that could not be written; raises one only for the edit itself.
    """
    edit.image.save(folder / "edited.png")
    failed: dict[str, BaseException] = {}

    def attempt(name: str, writer: Callable[[Path], object]) -> None:
        try:
            writer(folder / name)
        except (Exception, KeyboardInterrupt) as error:
            failed[name] = error

    attempt("run.json", lambda path: record(path, session, edit, stopped))
    if edit.lora.unet or edit.lora.text_encoder:
        attempt("lora.safetensors", lambda path: write_lora(path, session, edit))
    if stopped:
        return failed
    attempt("comparison.png", lambda path: write_whole(path, compare(session, edit).save))
    attempt("process.gif", lambda path: animate(path, session, edit))
    if "animation" in session.progress.seconds:
        attempt("run.json", lambda path: record(path, session, edit))
    return failed


def record(path: Path, session: Session, edit: Edit, stopped: str = "") -> None:
    """Write everything needed to repeat a run, and its result in numbers."""
    result: dict[str, Any] = {"stopped": stopped} if stopped else {}
    names = "window", "arrived", "distances", "remaining", "paths", "losses"
    result |= {name: getattr(edit, name) for name in names}
    if edit.path:  # not of a partial edit
        result["reconstruction_psnr"] = advice.fidelity(edit, session.image)
    result["seconds"] = session.progress.seconds
    write_json(path, to_json(session.options) | {"versions": lora_cache.versions(), "result": result})


def write_lora(path: Path, session: Session, edit: Edit) -> None:
    options = session.options
    notes = lora_cache.notes(session.model, options.prompt, options.config, options.seed)
    write_whole(path, lambda file: lora_file.write(edit.lora, file, notes))


def compare(session: Session, edit: Edit) -> Image.Image:
    """The original with the drags, the reconstruction, and the edit: their windows at the working size."""
    original, caption = draw_original(session)
    others = [shrink(session, image) for image in (edit.reconstruction, edit.image)]
    return draw.side_by_side([original, *others], [caption, "reconstruction, without the drag", "edit"])


def draw_original(session: Session) -> tuple[Image.Image, str]:
    """The window of the original at the working size, with the drags, and its caption."""
    options = session.options
    drags = place(session, options.handles), place(session, options.targets)
    caption = "original: handle (red), target (blue)"
    mask = session.mask
    if mask is not None:
        mask = session.window.crop_mask(mask)
        caption += "; the dark part is kept"
    return draw.draw_drags(shrink(session, session.image), *drags, mask), caption


def animate(path: Path, session: Session, edit: Edit) -> None:
    """Write the animation: the original, the images predicted during the drag, and the edit."""
    original, caption = draw_original(session)
    last = len(edit.steps) - 1
    indices = [*range(0, last, FRAME_EVERY), last]
    drawn = (draw_step(session, edit, index) for index in indices)
    frames = [draw.side_by_side([original], [caption])]
    frames += session.progress("animation", drawn, len(indices))
    frames.append(draw.side_by_side([shrink(session, edit.image)], ["edit"]))
    draw.save_gif(frames, path)


def draw_step(session: Session, edit: Edit, index: int) -> Image.Image:
    """Frame of the animation: the image predicted at a step of the drag, with the handles' trails."""
    trails = [place(session, path[: index + 1]) for path in edit.paths]
    targets = place(session, session.options.targets)
    predicted = images.resize(decode(session.model, edit.steps[index].predicted), session.size)
    marked = draw.draw_drags(predicted, [trail[-1] for trail in trails], targets, trails=trails)
    updates = sum(step.loss is not None for step in edit.steps[: index + 1])
    return draw.side_by_side([marked], [f"predicted after {updates} of {len(edit.losses)} updates"])


def shrink(session: Session, image: Image.Image) -> Image.Image:
    """The window of an image at the working size."""
    return images.resize(session.window.crop(image), session.size)


def place(session: Session, points: Sequence[Pixel]) -> list[Pixel]:
    """Map points of the image to its window at the working size."""
    placed = rescale(session.window.enter(points), session.window.size, session.size)
    return [Pixel(*point) for point in placed]
