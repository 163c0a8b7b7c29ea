"""What a run leaves: files in a folder of their own, whole or none, and a LoRA kept for the next time."""

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minidrag import images
from minidrag.app import draw
from minidrag.app.options import Request, to_json
from minidrag.edit import Edit, decode, fit_lora, working_size
from minidrag.method.drag import Point
from minidrag.method.lora import LoRA
from minidrag.stages import OnStage
from minidrag.weights import lora_file
from minidrag.weights.model import Model

PACKAGES = ("minidrag", "safetensors", "numpy", "pillow", "tokenizers", "huggingface-hub")
EVERY = 5  # steps of the drag between two frames of the animation


@contextmanager
def output(out: Path) -> Iterator[Path]:
    """Yields a folder to write to, whose files move to `out` at the end; if anything fails, none is left.

    Raises ValueError at once where nothing can be written.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        part = hidden(out)
        try:
            yield part
            for file in sorted(part.iterdir()):
                os.replace(file, out / file.name)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except BaseException:
        for folder in made:
            with suppress(OSError):  # never made, or something else is in it by now
                folder.rmdir()
        raise


def hidden(out: Path) -> Path:
    """Makes a folder inside `out`, on the same disk, so that files move at once; makes `out` too."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".part-", dir=out))
    except OSError as error:
        raise ValueError(f"nothing can be written to {out}: {error.strerror}") from error


def next_folder(picture: Path) -> Path:
    """The first of runs/NAME-1, runs/NAME-2, ... that is not there yet."""
    number = 1
    while (folder := Path("runs") / f"{picture.stem}-{number}").exists():
        number += 1
    return folder


def find_lora(
    model: Model, picture: Image.Image, request: Request, on_stage: OnStage | None = None
) -> tuple[LoRA, str]:
    """The LoRA of a run and where it is from: a file asked for, an earlier run, or training."""
    if request.lora:
        return lora_file.read(request.lora, model.unet, model.text_encoder), f"read from {request.lora}"
    file = lora_cache() / f"{lora_key(model, picture, request)}.safetensors"
    with suppress(OSError, ValueError):  # not there, or damaged
        return lora_file.read(file, model.unet, model.text_encoder), f"reused from {file}"
    trained = fit_lora(model, picture, request.prompt, request.config, request.seed, on_stage)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lora_file.write(trained, file, lora_notes(request))
    except OSError as error:
        return trained, f"trained, but not kept: {file} cannot be written ({error.strerror})"
    return trained, f"trained and kept in {file}"


def lora_cache() -> Path:
    return Path(os.environ.get("MINIDRAG_CACHE") or "~/.cache/minidrag").expanduser() / "lora"


def lora_key(model: Model, picture: Image.Image, request: Request) -> str:
    """A name for all that decides how a LoRA comes out, wherever picture and model lie."""
    small = images.resize(picture, working_size(model, picture.size, request.config))
    tokens = model.tokenizer(request.prompt).tolist()
    where = [str(model.device), str(model.dtype), repr(model.schedule), versions()]
    digest = hashlib.sha256(json.dumps([small.size, tokens, lora_settings(request), where]).encode())
    digest.update(small.tobytes())
    for network in (model.unet, model.vae, model.text_encoder):
        for name, tensor in network.state_dict().items():
            # Training changes every number, so that a few of each tensor tell two models apart.
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten()[:16].cpu().double().numpy().tobytes())
    return digest.hexdigest()[:32]


def lora_settings(request: Request) -> dict[str, Any]:
    settings = {name: value for name, value in asdict(request.config).items() if name.startswith("lora_")}
    return {**settings, "seed": request.seed}


def lora_notes(request: Request) -> dict[str, str]:
    settings = {name: str(value) for name, value in lora_settings(request).items()}
    return {"picture": request.picture.name, "prompt": request.prompt, "model": request.model, **settings}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}  # CPU or CUDA build too
    for package in PACKAGES:
        with suppress(PackageNotFoundError):  # a checkout may be used without installing it
            found[package] = version(package)
    return found


def write(
    folder: Path,
    model: Model,
    picture: Image.Image,
    mask: Tensor | None,
    request: Request,
    edit: Edit,
    on_stage: OnStage | None = None,
) -> None:
    """Writes all files of a run but run.json: the edit, a comparison, an animation and the LoRA."""
    size = working_size(model, picture.size, request.config)
    handles, targets = (rescale(points, picture.size, size) for points in (request.handles, request.targets))
    original = draw.draw_drags(images.resize(picture, size), handles, targets, mask)
    asked = "original: red goes to blue" + (", dark stays" if mask is not None else "")
    shown = [original, images.resize(edit.reconstruction, size), images.resize(edit.picture, size)]
    labels = [asked, "reconstruction, without the drag", "edit"]
    edit.picture.save(folder / "edited.png")
    draw.side_by_side(shown, labels).save(folder / "comparison.png")
    animation = [draw.side_by_side([original], [asked]), *frames(model, edit, targets, size, on_stage)]
    draw.save_gif(animation, folder / "process.gif")
    lora_file.write(edit.lora, folder / "lora.safetensors", lora_notes(request))


def frames(
    model: Model, edit: Edit, targets: Sequence[Point], size: tuple[int, int], on_stage: OnStage | None
) -> list[Image.Image]:
    """What the UNet foresaw at every few steps of the drag, with the handles' ways so far; then the edit.

    targets: (x, y) at `size`, (width, height), at which pictures are shown, small ones enlarged.
    """
    last, made = len(edit.clean) - 1, []
    shown = [*range(0, last, EVERY), last]
    if on_stage:
        on_stage("animation", 0, len(shown))
    for step in shown:
        trails = [rescale(path[: step + 1], edit.picture.size, size) for path in edit.paths]
        frame = images.resize(decode(model, edit.clean[step]), size)
        marked = draw.draw_drags(frame, [trail[-1] for trail in trails], targets, trails=trails)
        made.append(draw.side_by_side([marked], [f"foreseen after {step} of {last} steps"]))
        if on_stage:
            on_stage("animation", len(made), len(shown))
    return [*made, draw.side_by_side([images.resize(edit.picture, size)], ["edit"])]


def rescale(points: Sequence[Point], size: tuple[int, int], other: tuple[int, int]) -> list[Point]:
    """Maps (x, y) in a picture of `size`, (width, height), to (x, y) in the same picture at another size."""
    width, height = other
    return [(x, y) for y, x in images.to_grid(points, size, (height, width))]


def write_json(path: Path, request: Request, edit: Edit, seconds: dict[str, float]) -> None:
    """Writes all that is needed to repeat a run, and what came out in numbers."""
    names = ("reason", "distances", "remaining", "paths", "losses")
    result = {name: getattr(edit, name) for name in names} | {"seconds": seconds}
    values = to_json(request) | {"versions": versions(), "result": result}
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
