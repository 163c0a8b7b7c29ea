"""DragDiffusion on Stable Diffusion 1.5, from scratch."""

from minidrag.config import EditConfig
from minidrag.edit import drag_edit
from minidrag.weights.model import load_model

__all__ = ["EditConfig", "drag_edit", "load_model"]
