"""Check what the page sends, and describe its form."""

import json
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from minidrag.app import options
from minidrag.app.options import CONFIG_HELP, CONFIGS, HELP, Options
from minidrag.config import BOUNDS, CHOICES, EditConfig
from minidrag.page.store import Store

PRESETS = {"default": EditConfig()} | {name: CONFIGS[name] for name in sorted(CONFIGS)}
DEFAULT_HELP = "objects moved, then dragged; with a LoRA"
NOWHERE = {"handle": [0, 0], "target": [0, 0]}  # a drag, for options that need one


class Validator:
    """Check options of the page: images that are here, known models, settings within their bounds.

    fixed: options of the command line, by name. Raises ValueError for a device that does not exist.
    """

    def __init__(self, store: Store, model: str, fixed: dict[str, str | None]):
        device, dtype = options.choose_device(fixed["device"], fixed["dtype"])
        self.store = store
        self.fixed = fixed | {"lora": None, "device": device, "dtype": dtype}
        self.models = list(dict.fromkeys([model, *options.NAMED]))

    def parse(self, values: Any, without_drags: bool = False) -> Options:
        """Read options as `demo.py --from` does; ValueError for what the page may not request.

        without_drags: allow options that still lack them.
        """
        if not isinstance(values, dict):
            raise ValueError("expected a JSON object")
        known = self.store.known()
        for name in ("image", "mask"):
            if values.get(name) is not None and str(values[name]) not in known:
                raise ValueError(f"the {name} is not here any more: open it again")
        if values.get("model") not in self.models:
            raise ValueError(f"the model must be one of {', '.join(self.models)}")
        for name, value in self.fixed.items():
            if values.get(name) != value:
                raise ValueError(f"{name} must be {value}, as the command line said")
        if without_drags and not values.get("drags"):
            values = values | {"drags": [NOWHERE]}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "run.json"
            file.write_text(json.dumps(values), encoding="utf-8")
            try:
                return options.read_options({"base": file})
            except ValueError as error:
                text = str(error).replace(f"{file}: ", "").replace(str(file), "the request")
                raise ValueError(text) from None

    def settings(self) -> dict[str, Any]:
        """Describe the form: fields of EditConfig, presets, models."""
        parts = [part.partition(": ") for part in CONFIG_HELP.split("; ")]
        return {
            "fields": [describe(entry) for entry in fields(EditConfig)],
            "presets": {name: asdict(config) for name, config in PRESETS.items()},
            "summaries": {"default": DEFAULT_HELP} | {name: text for name, _, text in parts},
            "models": self.models,
            "fixed": self.fixed,
        }


def describe(entry: Any) -> dict[str, Any]:
    """Describe a field of EditConfig."""
    least, most = BOUNDS.get(entry.name, (None, None))
    return {
        "name": entry.name,
        "help": HELP[entry.name],
        "kind": {bool: "bool", str: "str", float: "float"}.get(entry.type, "int"),
        "least": least,
        "most": most,
        "choices": CHOICES.get(entry.name),
        "optional": entry.default is None,
    }
