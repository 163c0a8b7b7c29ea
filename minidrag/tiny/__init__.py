"""The small model that ships with minidrag: the same networks, trained on rendered scenes."""

from pathlib import Path

DEMO = Path(__file__).parent / "demo"  # an image, its mask and a drag
