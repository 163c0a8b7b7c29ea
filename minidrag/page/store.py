"""Files of the page: pictures and masks that it may name, and the draft.

A name that the page sends is looked up in a table and never opened. Nothing here imports PyTorch at the top,
so that the first page is there before it.
"""

import base64
import binascii
import hashlib
import json
import tempfile
import threading
from pathlib import Path
from typing import Any

from PIL import Image

from minidrag.page.history import History, read_json, to_png
from minidrag.system.files import check_regular

RUNS = Path("runs")
PLAIN = {"PNG": "image/png", "JPEG": "image/jpeg"}  # formats that every browser shows as Pillow reads them


class Store:
    """Files under `runs`, and pictures that the command line named. Raises KeyError for an unknown name."""

    def __init__(self, *inputs: Path):
        self.place = RUNS.resolve() / ".page"
        self.inputs = [path.resolve() for path in inputs]
        self.history = History(self.place.parent)
        self.writing = threading.Lock()  # two tabs may write the same file
        self.draft: Any = read_json(self.place / "draft.json")

    def known(self) -> dict[str, Path]:
        """Every picture and mask that the page may use, by its name in the options' JSON."""
        runs = self.place.parent
        found = [*self.inputs, *self.place.glob("*/*.png")]
        found += [*runs.glob("*/edited.png"), *runs.glob("*/generated.png")]
        for values in self.history.runs().values():
            found += [Path(values[name]) for name in ("image", "picture", "mask") if values.get(name)]
        return {str(path): path for path in found}

    def add_picture(self, data: str) -> dict[str, Any]:
        """Keep a picture, in base64, as upright RGB; ValueError for what `images` refuses."""
        from minidrag.system import pictures

        content = decode(data)
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            image = own_words(pictures.load_image, Path(file.name), "the picture")
        path = self.put(content, "photo.png", image)
        return {"image": str(path), "width": image.width, "height": image.height}

    def add_mask(self, data: str) -> str | None:
        """Keep a mask, in base64, as black and white; None if it is all black."""
        from minidrag.system import pictures

        content = decode(data)
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            size = own_words(pictures.read, Path(file.name), "the mask").size
            mask = pictures.load_mask(Path(file.name), size)
        if mask is None:
            return None
        return str(self.put(content, "mask.png", Image.fromarray((255 * mask).byte().numpy())))

    def put(self, content: bytes, name: str, image: Image.Image) -> Path:
        from minidrag.system.files import write_whole

        path = self.place / hashlib.sha256(content).hexdigest()[:16] / name
        with self.writing:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file():
                write_whole(path, lambda temporary: image.save(temporary, compress_level=1))
        return path

    def picture(self, name: str) -> tuple[str, bytes]:
        """Type and content of a picture, as a browser shows it: upright, RGB, transparency on white."""
        path = self.known()[name]
        with Image.open(check_regular(path)) as image:
            if image.format in PLAIN and image.mode in ("RGB", "L") and not image.has_transparency_data:
                return PLAIN[image.format], path.read_bytes()
        from minidrag.system import pictures

        return "image/png", to_png(pictures.load_image(path))

    def keep_draft(self, draft: Any) -> None:
        self.draft = draft
        self.write_json("draft.json", draft)

    def write_json(self, name: str, values: Any) -> Path:
        from minidrag.system.files import write_whole

        path = self.place / name
        text = json.dumps(values, indent=1)
        with self.writing:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return path


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
