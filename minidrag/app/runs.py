"""Files of a run, all of them or none, in a folder of their own."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from PIL import Image
from torch import Tensor

from minidrag import images
from minidrag.app import advice, draw, lora_cache
from minidrag.app.options import Options, to_json
from minidrag.edit import Edit, generate
from minidrag.method.progress import Progress
from minidrag.model import Model, decode, working_size
from minidrag.points import Pixel, to_cells
from minidrag.system import files
from minidrag.system.files import part_of, sweep, write_whole
from minidrag.weights import lora_file

RESULTS = ("comparison.png", "edited.png", "generated.png", "lora.safetensors", "process.gif", "run.json")
LONGEST = 60  # characters of an image's name in a folder's: file systems allow 255 bytes
FRAME_EVERY = 5  # drag steps between two frames of the animation


@contextmanager
def output(out: Path | None, image: Path) -> Iterator[Path]:
    """Yield a folder whose files move to `out` at the end; if anything fails, nothing is left.

    out: None: the first of runs/NAME-1, runs/NAME-2, ... that no other run has, NAME being the image's.
    Raises ValueError at once if nothing can be written there, or if results would be replaced.
    """
    numbered = (Path("runs") / f"{image.stem[:LONGEST]}-{number}" for number in count(1))
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


def generate_image(model: Model, options: Options, progress: Progress) -> tuple[Image.Image, Tensor]:
    """Generate the image that options without one describe; return it and its latent."""
    wanted = options.prompt, options.negative, options.guidance, options.seed, options.config
    return generate(model, *wanted, progress)


def write(
    folder: Path,
    model: Model,
    image: Image.Image,
    mask: Tensor | None,
    options: Options,
    edit: Edit,
    progress: Progress,
) -> dict[str, BaseException]:
    """Write RESULTS: the edit and everything to repeat it, then the LoRA, a comparison, and an animation.

    Returns the error, or Ctrl-C, of each that could not be written; raises one only for the edit itself.
    """
    edit.image.save(folder / "edited.png")
    size = working_size(model, image.size, options.config)
    notes = lora_cache.notes(model, options.prompt, options.config, options.seed)
    failed: dict[str, BaseException] = {}

    def attempt(name: str, writer: Callable[[Path], object]) -> None:
        try:
            write_whole(folder / name, writer)
        except (Exception, KeyboardInterrupt) as error:
            failed[name] = error

    def record(path: Path) -> None:
        write_json(path, options, edit, progress.seconds, advice.fidelity(edit, image))

    attempt("run.json", record)
    if edit.lora.unet or edit.lora.text_encoder:
        attempt("lora.safetensors", lambda path: lora_file.write(edit.lora, path, notes))
    attempt("comparison.png", lambda path: compare(image, mask, options, edit, size).save(path))
    attempt("process.gif", lambda path: animate(path, model, image, mask, options, edit, progress))
    if "animation" in progress.seconds:
        attempt("run.json", record)
    return failed


def compare(
    image: Image.Image, mask: Tensor | None, options: Options, edit: Edit, size: tuple[int, int]
) -> Image.Image:
    """The original with the drags, the reconstruction, and the edit, each at `size`."""
    original, caption = marked(image, mask, options, size)
    shown = [original, images.resize(edit.reconstruction, size), images.resize(edit.image, size)]
    return draw.side_by_side(shown, [caption, "reconstruction, without the drag", "edit"])


def marked(
    image: Image.Image, mask: Tensor | None, options: Options, size: tuple[int, int]
) -> tuple[Image.Image, str]:
    """The original with the drags at `size`, and its caption."""
    handles, targets = (rescale(points, image.size, size) for points in (options.handles, options.targets))
    caption = "original: drag red to blue" + (", dark stays" if mask is not None else "")
    return draw.draw_drags(images.resize(image, size), handles, targets, mask), caption


def animate(
    path: Path,
    model: Model,
    image: Image.Image,
    mask: Tensor | None,
    options: Options,
    edit: Edit,
    progress: Progress,
) -> None:
    """Write the animation: the original, the images foreseen during the drag, and the edit."""
    size = working_size(model, image.size, options.config)
    targets = rescale(options.targets, image.size, size)
    original, caption = marked(image, mask, options, size)
    chosen = [*range(0, len(edit.steps) - 1, FRAME_EVERY), len(edit.steps) - 1]
    drawn = (frame(model, edit, step, targets, size) for step in chosen)
    frames = [draw.side_by_side([original], [caption]), *progress("animation", drawn, len(chosen))]
    frames.append(draw.side_by_side([images.resize(edit.image, size)], ["edit"]))
    draw.save_gif(frames, path)


def frame(
    model: Model, edit: Edit, step: int, targets: Sequence[Pixel], size: tuple[int, int]
) -> Image.Image:
    """Frame of the animation: the image foreseen at a step of the drag, with the handles' trails.

    targets: at `size`, (width, height), at which images are shown.
    """
    trails = [rescale(path[: step + 1], edit.image.size, size) for path in edit.paths]
    foreseen = images.resize(decode(model, edit.steps[step].predicted), size)
    marked = draw.draw_drags(foreseen, [trail[-1] for trail in trails], targets, trails=trails)
    return draw.side_by_side([marked], [f"foreseen after {step} of {len(edit.steps) - 1} steps"])


def rescale(points: Sequence[Pixel], size: tuple[int, int], other: tuple[int, int]) -> list[Pixel]:
    """Map points of an image of `size` to the same image at another size, both (width, height)."""
    width, height = other
    return [Pixel(x, y) for y, x in to_cells(points, size, (height, width))]


def write_json(path: Path, options: Options, edit: Edit, seconds: dict[str, float], fidelity: float) -> None:
    """Write everything needed to repeat a run, and its result in numbers."""
    names = ("arrived", "distances", "remaining", "paths", "losses")
    result = {name: getattr(edit, name) for name in names}
    result |= {"reconstruction_psnr": fidelity, "seconds": seconds}
    values = to_json(options) | {"versions": lora_cache.versions(), "result": result}
    files.write_json(path, values)
