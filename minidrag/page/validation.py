"""Check what the page sends, and describe its form."""

from dataclasses import asdict, fields, replace
from typing import Any

from minidrag.app import options
from minidrag.app.options import CONFIGS, Options, presets_help
from minidrag.config import MOST, EditConfig
from minidrag.page.store import Store

PRESETS = {"default": EditConfig()} | {name: CONFIGS[name] for name in sorted(CONFIGS)}
NOWHERE = {"handle": [0, 0], "target": [0, 0]}  # a drag, for a reader that wants one


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
        dragless = without_drags and not values.get("drags")
        if dragless:
            values = values | {"drags": [NOWHERE]}
        parsed = options.read_options({"base": values})
        return replace(parsed, drags=[]) if dragless else parsed

    def settings(self) -> dict[str, Any]:
        """Describe the form: fields of EditConfig, presets, models."""
        parts = [part.partition(": ") for part in presets_help().split("; ")]
        return {
            "fields": [describe(entry) for entry in fields(EditConfig)],
            "presets": {name: asdict(config) for name, config in PRESETS.items()},
            "summaries": {"default": "what measured best"} | {name: text for name, _, text in parts},
            "models": self.models,
            "fixed": self.fixed,
        }


def describe(entry: Any) -> dict[str, Any]:
    """Describe a field of EditConfig."""
    about = entry.metadata
    kind = {bool: "bool", str: "str", float: "float"}.get(entry.type, "int")
    bounded = kind in ("int", "float")
    return {
        "name": entry.name,
        "help": about["help"],
        "kind": kind,
        "least": about.get("least", 0) if bounded else None,
        "most": about.get("most", MOST) if bounded else None,
        "choices": about.get("choices"),
        "optional": entry.default is None,
    }
