"""A small model of the same classes, trained on rendered scenes."""

from pathlib import Path

DEMO = Path(__file__).parent / "demo"  # a picture, a mask and a drag for it
