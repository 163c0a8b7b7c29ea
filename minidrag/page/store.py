"""Files of the page: images and masks that it may name, and the draft.

A name that the page sends is looked up in a table and never opened.
"""

import hashlib
import threading
from pathlib import Path
from typing import Any

from PIL import Image

from minidrag.page.history import History, read_json
from minidrag.system.files import check_regular, write_json, write_whole

RUNS = Path("runs")
PLAIN = {"PNG": "image/png", "JPEG": "image/jpeg"}  # formats that browsers show as Pillow reads them


class Store:
    """Files under `runs`, and images that the command line named. Raises KeyError for an unknown name."""

    def __init__(self, *inputs: Path):
        self.folder = RUNS.resolve() / ".page"
        self.inputs = [path.resolve() for path in inputs]
        self.history = History(self.folder.parent)
        self.lock = threading.Lock()  # two tabs may write the same file
        self.draft: Any = read_json(self.folder / "draft.json")

    def known(self) -> dict[str, Path]:
        """Every image and mask that the page may use, by its name in the options' JSON."""
        paths = [*self.inputs, *self.folder.glob("*/*.png")]
        for name in ("edited.png", "generated.png"):
            paths += self.folder.parent.glob(f"*/{name}")
        for run in self.history.runs().values():
            paths += [Path(run[name]) for name in ("image", "mask") if run.get(name)]
        return {str(path): path for path in paths}

    def plain(self, path: Path) -> tuple[str, bytes] | None:
        """Type and content of an image that a browser shows as it is; None for another one."""
        with Image.open(check_regular(path)) as image:
            if image.format in PLAIN and image.mode in ("RGB", "L") and not image.has_transparency_data:
                return PLAIN[image.format], path.read_bytes()
        return None

    def add(self, content: bytes, name: str, image: Image.Image) -> Path:
        """Write an image that was uploaded, in a folder named after the upload's content."""
        path = self.folder / hashlib.sha256(content).hexdigest()[:16] / name
        with self.lock:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file():
                write_whole(path, lambda temporary: image.save(temporary, compress_level=1))
        return path

    def write_draft(self, draft: Any) -> None:
        self.draft = draft
        self.write_json("draft.json", draft)

    def write_json(self, name: str, values: Any) -> None:
        with self.lock:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / name, values)
