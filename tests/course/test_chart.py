"""Charts: round numbers on the axes, and every curve in its color."""

import pytest

from minidrag.course.chart import COLORS, Curve, chart, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 0.42, [0, 0.1, 0.2, 0.3, 0.4]),
        (3, 3, [3]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("dots", [False, True])
def test_every_curve_has_its_color(dots: bool) -> None:
    curves = [Curve("falls", [(0, 3.0), (10, 1.0)]), Curve("rises", [(0, 1.0), (10, 2.0)])]
    image = chart(curves, "state", "loss", (860, 460), scale=2, dots=dots)
    assert image.size == (860, 460)
    colors = {color for _, color in image.getcolors(1 << 24) or []}
    assert set(COLORS[:2]) <= colors and COLORS[2] not in colors


def test_the_larger_value_is_higher() -> None:
    def top(y: float) -> int:
        """Highest row of the mark at the left end."""
        image = chart([Curve("one", [(0, y), (10, 4.0)])], "x", "y")
        return min(row for row in range(30, 230) if image.getpixel((58, row)) == COLORS[0])

    assert top(3.0) < top(2.0) < top(1.0)
