"""The runs of this folder, as the page shows them."""

import io
from pathlib import Path
from typing import Any

from PIL import Image

from minidrag.system import files

FILES = {  # of a run, as the page may name them, with their types
    "edited.png": "image/png",
    "generated.png": "image/png",
    "raw.png": "image/png",
    "comparison.png": "image/png",
    "process.gif": "image/gif",
    "run.json": "application/json",
    "lora.safetensors": "application/octet-stream",
}
MOST = 200  # runs that are listed
THUMB = 192  # pixels


class History:
    """Runs in a folder. Raises KeyError for an unknown name."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.cache: dict[Path, tuple[int, dict[str, Any]]] = {}  # run.json by its time of writing

    def runs(self) -> dict[str, dict[str, Any]]:
        """Contents of every run.json by the name of its folder, without broken ones."""
        runs = {}
        for path in self.folder.glob("*/run.json"):
            try:
                written = path.stat().st_mtime_ns
            except OSError:
                continue
            if self.cache.get(path, (0, {}))[0] != written:
                values = read_json(path)
                self.cache[path] = written, values if is_run(values) else {}
            if values := self.cache[path][1]:
                runs[path.parent.name] = values | {"time": written / 1e9}
        return runs

    def entries(self) -> list[dict[str, Any]]:
        """The runs of this folder, the newest first."""
        entries = []
        for name, values in self.runs().items():
            result = values.get("result", {})
            entry = {key: result.get(key) for key in ("arrived", "remaining", "distances", "stopped")}
            entry |= {"name": name, "time": values["time"], "prompt": values.get("prompt", "")}
            entry["files"] = [file for file in FILES if (self.folder / name / file).is_file()]
            entries.append(entry)
        return sorted(entries, key=lambda entry: entry["time"], reverse=True)[:MOST]

    def file(self, name: str, file: str) -> tuple[str, bytes]:
        """Type and content of one of FILES of a run."""
        if name not in self.runs():
            raise KeyError(name)
        return FILES[file], files.check_regular(self.folder / name / file).read_bytes()

    def thumb(self, name: str) -> tuple[str, bytes]:
        _, content = self.file(name, "edited.png")
        image = Image.open(io.BytesIO(content))
        image.thumbnail((THUMB, THUMB))
        return "image/png", to_png(image)


def is_run(values: Any) -> bool:
    """True for what has the types of a run.json, as far as the page needs them."""
    result = values.get("result", {}) if isinstance(values, dict) else None
    if not isinstance(result, dict) or not values.get("drags"):
        return False
    texts = [values.get(name) for name in ("image", "mask", "prompt")]
    rows = [result.get(name) or [] for name in ("remaining", "distances", "losses")]
    objects = [values.get("config", {}), values.get("sha256", {}), result.get("seconds", {})]
    return (
        all(isinstance(text, (str, type(None))) for text in [*texts, result.get("stopped")])
        and all(isinstance(row, list) and all(isinstance(n, (int, float)) for n in row) for row in rows)
        and all(isinstance(entry, dict) for entry in objects)
    )


def read_json(path: Path) -> Any:
    """Contents of a JSON file; None if it is missing or broken."""
    try:
        return files.read_json(path)
    except (OSError, ValueError):
        return None


def to_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
