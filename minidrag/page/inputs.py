"""Images, masks, and runs that the page sends or names, read as the command reads them."""

import base64
import binascii
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from minidrag.app.options import check_kinds, configured, read_options, to_drag, to_json
from minidrag.config import EditConfig
from minidrag.page.history import to_png
from minidrag.page.store import Store
from minidrag.system import pictures

T = TypeVar("T")


class Inputs:
    """Inputs of one store. Raises ValueError, one sentence, for what the command would refuse."""

    def __init__(self, store: Store):
        self.store = store

    def add_image(self, data: Any) -> str:
        """Store an image, in base64, as upright RGB; return its name."""
        content = decode(data)
        image = from_file(content, "the image", pictures.load_image)
        return str(self.store.add(content, "photo.png", image))

    def add_mask(self, data: Any) -> str | None:
        """Store a mask, in base64, as black and white; return its name, None if it is all black."""
        content = decode(data)
        mask = from_file(content, "the mask", lambda path: pictures.load_mask(path, pictures.read(path).size))
        if mask is None:
            return None
        return str(self.store.add(content, "mask.png", Image.fromarray((255 * mask).byte().numpy())))

    def image(self, name: str) -> tuple[str, bytes]:
        """Type and content of an image as PNG: upright, RGB, transparency on white."""
        return "image/png", to_png(pictures.load_image(self.store.known()[name]))

    def run(self, name: str) -> dict[str, Any]:
        """Options and result of a run; ValueError if its files are gone or have changed."""
        history = self.store.history
        values = history.runs()[name]
        file = history.folder / name / "run.json"
        options = read_options({"base": file, "device": "cpu", "dtype": None})  # it may be from elsewhere
        entry = next(entry for entry in history.entries() if entry["name"] == name)
        return {"options": to_json(options), "result": values.get("result", {}), **entry}

    def match(self, values: dict[str, Any]) -> dict[str, Any]:
        """Settings of a run.json from anywhere, and images here that it means, by name or by checksum."""
        check_kinds(values)
        drags = [to_drag(drag) for drag in values.get("drags", [])]
        config = configured(EditConfig(), values.get("config", {}))
        matches: dict[str, Any] = {"config": asdict(config)}
        matches["drags"] = [{"handle": handle, "target": target} for handle, target in drags]
        runs = self.store.history.runs()
        sums = {}
        for run in runs.values():
            sums |= {digest: run.get(name) for name, digest in run.get("sha256", {}).items()}
        known = self.store.known()
        for name in ("image", "mask"):
            names = [values.get(name), sums.get(str(values.get("sha256", {}).get(name)))]
            matches[name] = next((path for path in names if path in known), None)
        for name, run in runs.items():  # of a generated image, which no path names
            if values.get("image", "") is None and run == values | {"time": run["time"]}:
                image = self.store.history.folder / name / "generated.png"
                matches |= {"image": str(image), "generated": True}
        return matches


def decode(data: Any) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise ValueError("the file did not arrive whole: send it again") from None


def from_file(content: bytes, name: str, load: Callable[[Path], T]) -> T:
    """Load a content by way of a temporary file, which an error calls by `name`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "upload"
        path.write_bytes(content)
        try:
            return load(path)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), name)) from None
