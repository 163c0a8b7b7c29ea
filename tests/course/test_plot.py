"""Figures of the lessons: labels."""

import numpy as np
import pytest
from PIL import Image

from minidrag.course.plot import LABEL, Panel, panel
from minidrag.images import WHITE


@pytest.mark.parametrize(
    ("label", "side"),
    [("up 7.5, down 7.5: 33.8 dB", 136), ("cut and paste: lost, MD 65.7, 0.95", 160), ("0 blocks", 136)],
)
def test_a_label_is_not_cut(label: str, side: int) -> None:
    """The columns at both ends of the label stay white."""
    shown = np.asarray(panel(Panel(Image.new("RGB", (64, 64), WHITE), label), side))
    ink = np.any(shown[-LABEL:] < 128, axis=(0, 2)).tolist()
    assert any(ink) and not ink[0] and not ink[-1]
