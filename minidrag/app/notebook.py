"""`drag_edit` for notebooks and scripts: masks of any kind, and a result that shows and saves itself."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minidrag.app import results
from minidrag.app.options import Options
from minidrag.app.session import Session
from minidrag.config import EditConfig
from minidrag.edit import Edit
from minidrag.method.lora import LoRA
from minidrag.method.progress import Progress
from minidrag.model import Model
from minidrag.points import Pixel
from minidrag.system.files import read_json, write_json
from minidrag.system.pictures import load_mask

Points = Sequence[tuple[float, float]]
Mask = Tensor | np.ndarray | Image.Image | str | Path


@dataclass(frozen=True, repr=False)
class ShownEdit(Edit):
    """An edit that a notebook shows as its comparison and that saves itself."""

    session: Session

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        results.compare(self.session, self).save(content, "PNG")
        return content.getvalue()

    def save(self, folder: str | Path) -> None:
        """Write to a folder what the command writes there, and the original and its mask.

        Raises ValueError for a folder that cannot be written to or has results already.
        """
        session = self.session
        names = {"image": "original.png"} | ({} if session.mask is None else {"mask": "mask.png"})
        with results.output(Path(folder), Path("original.png")) as part:
            session.image.save(part / "original.png")
            if session.mask is not None:
                Image.fromarray(session.mask.cpu().numpy()).save(part / "mask.png")
            options = replace(session.options, **{key: part / name for key, name in names.items()})
            for error in results.write(part, replace(session, options=options), self).values():
                raise error
            write_json(part / "run.json", read_json(part / "run.json") | names)  # beside it, wherever it goes


def drag_edit(
    model: Model,
    image: Image.Image,
    handles: Points,
    targets: Points,
    *,
    mask: Mask | None = None,
    prompt: str = "",
    config: EditConfig = EditConfig(),
    seed: int = 0,
    lora: LoRA | None = None,
    clean: Tensor | None = None,
    progress: Progress | None = None,
) -> ShownEdit:
    """Drag the content under each handle point to its target point and keep the rest, as `edit.drag_edit`.

    image: a PIL image. handles, targets: lists of (x, y) in its pixels. mask: an image, its path, or an array
    (height, width), white or nonzero where the image may change. lora: None takes the cached one of the image
    or trains it. clean: latent of a generated image. Raises ValueError for what cannot be edited.
    """
    if not isinstance(image, Image.Image):
        raise ValueError(f"image must be a PIL image, got {image!r}: open a file with Image.open(...)")
    starts = to_points("handles", handles)
    ends = to_points("targets", targets)
    if len(starts) != len(ends):
        raise ValueError(f"got {len(starts)} handles and {len(ends)} targets: give one or more pairs")
    drags = list(zip(starts, ends, strict=True))
    options = Options(None, drags, prompt=prompt, model=model.source, config=config, seed=seed)
    region = to_mask(mask, image.size)
    session = Session(model, options, image.convert("RGB"), region, progress or Progress(), clean, lora)
    edit = session.edit()
    return ShownEdit(**{entry.name: getattr(edit, entry.name) for entry in fields(Edit)}, session=session)


def to_points(name: str, points: Points) -> list[Pixel]:
    """Points as pixels; raises ValueError for anything but a list of pairs of numbers."""
    try:
        return [Pixel(float(x), float(y)) for x, y in points]
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be a list of points (x, y), got {points!r}: write [(43, 90)]"
        ) from None


def to_mask(mask: Mask | None, size: tuple[int, int]) -> Tensor | None:
    """A mask of any kind as (height, width), bool, True in the editable region."""
    if isinstance(mask, (str, Path)):
        return load_mask(Path(mask), size)
    if isinstance(mask, Image.Image):
        mask = np.array(mask.convert("L")) // 128
    return None if mask is None else torch.as_tensor(mask) >= 0.5
