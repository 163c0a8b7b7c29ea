"""Measured differences: every parity test enters its maximum in a table that ends the run's report."""

from collections.abc import Callable

import pytest
from support.references import difference
from torch import Tensor

MAXIMA: dict[str, tuple[float, float]] = {}  # name -> (largest difference, largest value) of the run
SLIPS: dict[str, float] = {}  # a slip made on purpose -> the difference that it made


@pytest.fixture
def compare() -> Callable[..., None]:
    """compare(name, ours, reference, atol=1e-9) fails above `atol` and enters the difference in the table."""

    def compare(name: str, ours: Tensor, reference: Tensor, atol: float = 1e-9) -> None:
        found, largest = difference(ours, reference), reference.detach().abs().max().item()
        before = MAXIMA.get(name, (0.0, 0.0))
        MAXIMA[name] = (max(before[0], found), max(before[1], largest))
        assert largest > 1e-3, f"{name}: the reference is all but zero and proves nothing"
        assert found <= atol, f"{name}: {found:.3e} apart, more than {atol:.0e}"

    return compare


@pytest.fixture
def record_slip() -> Callable[[str, float], None]:
    """record_slip(name, found) enters in a second table what a slip made on purpose did to the outputs."""
    return SLIPS.__setitem__


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    width = max(map(len, (*MAXIMA, *SLIPS)), default=0)
    if MAXIMA:
        terminalreporter.section("parity with the reference libraries")
        terminalreporter.write_line(f"{'parity: name':{width + 8}}  max abs diff  of values up to")
        for name, (found, largest) in sorted(MAXIMA.items()):
            terminalreporter.write_line(f"parity: {name:{width}}  {found:12.1e}  {largest:15.3g}")
    if SLIPS:
        terminalreporter.section("slips made on purpose, the smallest first")
        for name, found in sorted(SLIPS.items(), key=lambda item: item[1]):
            terminalreporter.write_line(f"slip:   {name:{width}}  {found:12.1e}")
