"""Terms of the page: pictures that are here, known models, and settings in their bounds."""

import json
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from minidrag.app import options
from minidrag.app.options import CONFIG_HELP, CONFIGS, HELP, Options
from minidrag.config import BOUNDS, CHOICES, EditConfig
from minidrag.page import times
from minidrag.page.store import Store

PRESETS = {"default": EditConfig()} | {name: CONFIGS[name] for name in sorted(CONFIGS)}
DEFAULT_HELP = "objects moved, then dragged; with a LoRA"
NOWHERE = {"handle": [0, 0], "target": [0, 0]}  # a drag, for options that need one


class Terms:
    """Terms of one server. fixed: what the command line decided, by key of the options' JSON.

    Raises ValueError for a device that does not exist.
    """

    def __init__(self, store: Store, model: str, fixed: dict[str, str | None]):
        device, dtype = options.choose_device(fixed["device"], fixed["dtype"])
        self.store, self.fixed = store, fixed | {"lora": None, "device": device, "dtype": dtype}
        self.models = list(dict.fromkeys([model, *options.NAMED]))

    def parse(self, values: Any) -> Options:
        """Options from their JSON, as `demo.py --from` reads it; ValueError for what a page may not ask."""
        if not isinstance(values, dict):
            raise ValueError("expected a JSON object")
        known = self.store.known()
        for name in ("image", "mask"):
            if values.get(name) is not None and str(values[name]) not in known:
                raise ValueError(f"the {name} is not here any more: open it again")
        if values.get("model") not in self.models:
            raise ValueError(f"the model must be one of {', '.join(self.models)}")
        for name, own in self.fixed.items():
            if values.get(name) != own:
                raise ValueError(f"{name} must be {own}, as the command line said")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "run.json"
            file.write_text(json.dumps(values), encoding="utf-8")
            try:
                return options.read_options({"base": file})
            except ValueError as error:
                said = str(error).replace(f"{file}: ", "").replace(str(file), "the request")
                raise ValueError(said) from None

    def rates(self, asked: Options) -> dict[str, float]:
        past = sorted(self.store.history.runs().values(), key=lambda values: values["time"])
        return times.rates(past, asked.model, str(asked.device))


def without_drags(values: Any) -> Any:
    """Options that may still lack drags, with one that goes nowhere."""
    return values | {"drags": [NOWHERE]} if isinstance(values, dict) and not values.get("drags") else values


def settings(terms: Terms) -> dict[str, Any]:
    """Everything that the page makes its form from: fields of EditConfig, presets, models."""
    found = []
    for entry in fields(EditConfig):
        least, most = BOUNDS.get(entry.name, (None, None))
        kind = {bool: "bool", str: "str", float: "float"}.get(entry.type, "int")  # type: ignore[arg-type]
        about = {"name": entry.name, "help": HELP[entry.name], "kind": kind, "least": least, "most": most}
        found.append(about | {"choices": CHOICES.get(entry.name), "optional": entry.default is None})
    presets = {name: asdict(config) for name, config in PRESETS.items()}
    parts = [part.partition(": ") for part in CONFIG_HELP.split("; ")]
    abouts = {"default": DEFAULT_HELP} | {name: text for name, _, text in parts}
    names = {"models": terms.models, "fixed": terms.fixed}
    return {"fields": found, "presets": presets, "abouts": abouts, **names}
