"""DragDiffusion on Stable Diffusion 1.5, from scratch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minidrag.app.notebook import drag_edit
    from minidrag.config import EditConfig
    from minidrag.weights.load import load_model

__all__ = ["EditConfig", "drag_edit", "load_model"]
PLACES = {"EditConfig": "config", "drag_edit": "app.notebook", "load_model": "weights.load"}


def __getattr__(name: str) -> Any:
    """Import a name on first use: PyTorch takes two seconds, and the page must not wait for it."""
    if name in PLACES:
        return getattr(import_module(f"minidrag.{PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
