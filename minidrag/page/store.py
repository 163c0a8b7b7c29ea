"""Files of the page: pictures and masks that it may name, the runs of this folder, and the draft.

A name that the page sends is looked up in a table and never opened. Nothing here imports PyTorch at the top,
so that the first page is there before it.
"""

import base64
import binascii
import hashlib
import io
import json
import tempfile
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

RUNS = Path("runs")
FILES = {  # of a run, as the page may name them, with their types
    "edited.png": "image/png",
    "generated.png": "image/png",
    "raw.png": "image/png",
    "comparison.png": "image/png",
    "process.gif": "image/gif",
    "run.json": "application/json",
    "lora.safetensors": "application/octet-stream",
}
PLAIN = {"PNG": "image/png", "JPEG": "image/jpeg"}  # formats that every browser shows as Pillow reads them
THUMB = 192


class Store:
    """Files under `runs`, and pictures that the command line named. Raises KeyError for an unknown name."""

    def __init__(self, *inputs: Path):
        self.place = RUNS.resolve() / ".page"
        self.inputs = [path.resolve() for path in inputs]
        self.cache: dict[Path, tuple[int, dict[str, Any]]] = {}  # run.json by its time of writing
        self.writing = threading.Lock()  # two tabs may write the same file
        self.draft: Any = read_json(self.place / "draft.json")

    def known(self) -> dict[str, Path]:
        """Every picture and mask that the page may use, by its name in the options' JSON."""
        runs = self.place.parent
        found = [*self.inputs, *self.place.glob("*/*.png")]
        found += [*runs.glob("*/edited.png"), *runs.glob("*/generated.png")]
        for values in self.runs().values():
            found += [Path(values[name]) for name in ("image", "picture", "mask") if values.get(name)]
        return {str(path): path for path in found}

    def add_picture(self, data: str) -> dict[str, Any]:
        """Keep a picture, in base64, as upright RGB; ValueError for what `images` refuses."""
        from minidrag import images

        content = decode(data)
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            image = own_words(images.load_image, Path(file.name), "the picture")
        path = self.put(content, "photo.png", image)
        return {"image": str(path), "width": image.width, "height": image.height}

    def add_mask(self, data: str) -> str | None:
        """Keep a mask, in base64, as black and white; None if it is all black."""
        from minidrag import images

        content = decode(data)
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            size = own_words(images.read, Path(file.name), "the mask").size
            mask = images.load_mask(Path(file.name), size)
        if mask is None:
            return None
        return str(self.put(content, "mask.png", Image.fromarray((255 * mask).byte().numpy())))

    def put(self, content: bytes, name: str, image: Image.Image) -> Path:
        from minidrag import images

        path = self.place / hashlib.sha256(content).hexdigest()[:16] / name
        with self.writing:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file():
                images.write_whole(path, lambda temporary: image.save(temporary, compress_level=1))
        return path

    def picture(self, name: str) -> tuple[str, bytes]:
        """Type and content of a picture, as a browser shows it: upright, RGB, transparency on white."""
        path = self.known()[name]
        with Image.open(path) as image:
            if image.format in PLAIN and image.mode in ("RGB", "L") and not image.has_transparency_data:
                return PLAIN[image.format], path.read_bytes()
        from minidrag import images

        return "image/png", to_png(images.load_image(path))

    def runs(self) -> dict[str, dict[str, Any]]:
        """Contents of every run.json by the name of its folder, without broken ones."""
        found = {}
        for path in self.place.parent.glob("*/run.json"):
            try:
                written = path.stat().st_mtime_ns
            except OSError:
                continue
            if self.cache.get(path, (0, {}))[0] != written:
                values = read_json(path)
                self.cache[path] = written, values if is_run(values) else {}
            if values := self.cache[path][1]:
                found[path.parent.name] = values | {"time": written / 1e9}
        return found

    def history(self) -> list[dict[str, Any]]:
        """The runs of this folder, the newest first."""
        found = []
        for name, values in self.runs().items():
            result = values.get("result", {})
            shown = {key: result.get(key) for key in ("arrived", "remaining", "distances", "stopped")}
            files = [file for file in FILES if (self.place.parent / name / file).is_file()]
            entry = {"name": name, "time": values["time"], "prompt": values.get("prompt", ""), "files": files}
            found.append(entry | shown)
        return sorted(found, key=lambda entry: entry["time"], reverse=True)[:200]

    def run(self, name: str) -> dict[str, Any]:
        """Options and result of a run, in today's names; ValueError if its files are gone or have changed."""
        from minidrag.app.options import read_options, to_json

        values = self.runs()[name]
        file = self.place.parent / name / "run.json"
        options = read_options({"base": file, "device": "cpu", "dtype": None})  # it may be from elsewhere
        entry = next(entry for entry in self.history() if entry["name"] == name)
        return {"options": to_json(options), "result": values.get("result", {}), **entry}

    def file(self, name: str, file: str) -> tuple[str, bytes]:
        """Type and content of one of FILES of a run."""
        if name not in self.runs():
            raise KeyError(name)
        return FILES[file], (self.place.parent / name / file).read_bytes()

    def thumb(self, name: str) -> tuple[str, bytes]:
        _, content = self.file(name, "edited.png")
        image = Image.open(io.BytesIO(content))
        image.thumbnail((THUMB, THUMB))
        return "image/png", to_png(image)

    def match(self, values: dict[str, Any]) -> dict[str, Any]:
        """Pictures here that a run.json from anywhere means, by name or by checksum, and its settings."""
        from minidrag.app.options import EARLIER, check_kinds, configured, current_names, to_drag
        from minidrag.config import EditConfig

        known, sums = self.known(), {}
        for run in self.runs().values():
            sums |= {digest: run.get(name) for name, digest in run.get("sha256", {}).items()}
        values = current_names(values)
        check_kinds(values)
        settings = (EARLIER if "versions" in values else {}) | current_names(values.get("config", {}))
        drags = [to_drag(drag) for drag in values.get("drags", [])]
        found: dict[str, Any] = {"config": asdict(configured(EditConfig(), settings))}
        found["drags"] = [{"handle": handle, "target": target} for handle, target in drags]
        for name in ("image", "mask"):
            path, same = values.get(name), sums.get(str(values.get("sha256", {}).get(name)))
            found[name] = path if path in known else same if path and same in known else None
        for name, run in self.runs().items():  # of a generated picture, which no path names
            if values.get("image", "") is None and current_names(run) == values | {"time": run["time"]}:
                found |= {"image": str(self.place.parent / name / "generated.png"), "made": True}
        return found

    def keep_draft(self, draft: Any) -> None:
        self.draft = draft
        self.write_json("draft.json", draft)

    def write_json(self, name: str, values: Any) -> Path:
        from minidrag import images

        path = self.place / name
        text = json.dumps(values, indent=1)
        with self.writing:
            path.parent.mkdir(parents=True, exist_ok=True)
            images.write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return path


def read_json(path: Path) -> Any:
    """Contents of a JSON file; None if it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def is_run(values: Any) -> bool:
    """True for what has the types of a run.json, as far as the page needs them."""
    result = values.get("result", {}) if isinstance(values, dict) else None
    if not isinstance(result, dict) or not values.get("drags"):
        return False
    texts = [values.get(name) for name in ("image", "picture", "mask", "prompt")]
    rows = [result.get(name) or [] for name in ("remaining", "distances", "losses")]
    objects = [values.get("config", {}), values.get("sha256", {}), result.get("seconds", {})]
    return (
        all(isinstance(text, (str, type(None))) for text in [*texts, result.get("stopped")])
        and all(isinstance(row, list) and all(isinstance(n, (int, float)) for n in row) for row in rows)
        and all(isinstance(entry, dict) for entry in objects)
    )


def decode(data: Any) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise ValueError("the file did not arrive whole: send it again") from None


def own_words(load: Any, path: Path, name: str) -> Image.Image:
    """Load a temporary file; an error calls it by a name that means something."""
    try:
        return load(path)
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), name)) from None


def to_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
