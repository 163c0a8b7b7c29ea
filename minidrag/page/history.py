"""The runs of this folder, as the page shows them, and what a run.json from anywhere means here."""

import io
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from minidrag.system import files

if TYPE_CHECKING:
    from minidrag.page.store import Store

FILES = {  # of a run, as the page may name them, with their types
    "edited.png": "image/png",
    "generated.png": "image/png",
    "raw.png": "image/png",
    "comparison.png": "image/png",
    "process.gif": "image/gif",
    "run.json": "application/json",
    "lora.safetensors": "application/octet-stream",
}
THUMB = 192


class History:
    """Runs in a folder. Raises KeyError for an unknown name."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.cache: dict[Path, tuple[int, dict[str, Any]]] = {}  # run.json by its time of writing

    def runs(self) -> dict[str, dict[str, Any]]:
        """Contents of every run.json by the name of its folder, without broken ones."""
        found = {}
        for path in self.folder.glob("*/run.json"):
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

    def entries(self) -> list[dict[str, Any]]:
        """The runs of this folder, the newest first."""
        found = []
        for name, values in self.runs().items():
            result = values.get("result", {})
            shown = {key: result.get(key) for key in ("arrived", "remaining", "distances", "stopped")}
            there = [file for file in FILES if (self.folder / name / file).is_file()]
            entry = {"name": name, "time": values["time"], "prompt": values.get("prompt", ""), "files": there}
            found.append(entry | shown)
        return sorted(found, key=lambda entry: entry["time"], reverse=True)[:200]

    def run(self, name: str) -> dict[str, Any]:
        """Options and result of a run, in today's names; ValueError if its files are gone or have changed."""
        from minidrag.app.options import read_options, to_json

        values = self.runs()[name]
        file = self.folder / name / "run.json"
        options = read_options({"base": file, "device": "cpu", "dtype": None})  # it may be from elsewhere
        entry = next(entry for entry in self.entries() if entry["name"] == name)
        return {"options": to_json(options), "result": values.get("result", {}), **entry}

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


def match(store: "Store", values: dict[str, Any]) -> dict[str, Any]:
    """Pictures here that a run.json from anywhere means, by name or by checksum, and its settings."""
    from minidrag.app.options import EARLIER, check_kinds, configured, current_names, to_drag
    from minidrag.config import EditConfig

    known, runs, sums = store.known(), store.history.runs(), {}
    for run in runs.values():
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
    for name, run in runs.items():  # of a generated picture, which no path names
        if values.get("image", "") is None and current_names(run) == values | {"time": run["time"]}:
            found |= {"image": str(store.history.folder / name / "generated.png"), "made": True}
    return found


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
