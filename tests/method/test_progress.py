"""Progress of the stages of an edit: bars, times, and numbers that are not finite."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from minidrag.method import progress as progress_module
from minidrag.method.drag import Cell, Step
from minidrag.method.progress import Progress


def test_items_pass_through_and_the_bar_fills(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(Progress(show=True)("drag", [1.0, 2.0, 3.0], 3)) == [1.0, 2.0, 3.0]
    shown = capsys.readouterr()
    assert "drag      : 100%" in shown.err and "3/3" in shown.err and shown.out == ""


def test_the_bar_is_there_before_the_first_item(capsys: pytest.CaptureFixture[str]) -> None:
    def items() -> Iterator[float]:
        assert "LoRA      :   0%" in capsys.readouterr().err
        yield 1.0

    assert list(Progress(show=True)("LoRA", items(), 1)) == [1.0]


def test_a_drag_counts_its_updates_and_its_bar_ends_full(capsys: pytest.CaptureFixture[str]) -> None:
    """Two levels, of which the first ends after one of its updates."""
    progress = Progress(show=True)
    steps = [step(loss=None), step(), step(loss=None), step(), step()]
    assert [id(item) for item in progress("drag", steps, 80)] == [id(item) for item in steps]
    shown = capsys.readouterr().err
    assert "0/80" in shown and shown.rstrip().splitlines()[-1].find("3/3") > 0 and "drag" in progress.seconds


def test_no_bar_if_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(show=False)
    assert list(progress("drag", [1.0], 1)) == [1.0] and "drag" in progress.seconds
    assert capsys.readouterr() == ("", "")


def test_times_are_of_each_stage_in_order_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    progress = Progress(show=False)

    def items(count: int, seconds: float) -> Iterator[int]:
        for i in range(count):
            clock[0] += seconds
            yield i

    with progress.timed("model"):
        clock[0] += 2.0
    for _ in progress("LoRA", items(4, 0.5), 4):
        clock[0] += 0.25  # the consumer's time counts too
    list(progress("drag", items(3, 1.0), 3))
    list(progress("LoRA", items(1, 8.0), 1))
    assert list(progress.seconds.items()) == [("model", 2.0), ("LoRA", 4 * 0.75 + 8.0), ("drag", 3.0)]


def test_a_stage_that_fails_has_no_time() -> None:
    progress = Progress(show=False)
    with pytest.raises(KeyboardInterrupt), progress.timed("model"):
        raise KeyboardInterrupt
    assert progress.seconds == {}


def step(value: float = 0.0, loss: float | None = 1.0) -> Step:
    latent = torch.full((1, 4, 2, 2), value)
    return Step(latent, [Cell(1, 2)], latent.clone(), latent.clone(), 3, loss)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_stops_with_stage_and_place(wrong: float) -> None:
    poisoned = torch.zeros(1, 4, 2, 2)
    poisoned[0, 3, 1, 0] = wrong
    fine = torch.zeros(1, 4, 2, 2)
    for good, bad in (
        (1.0, wrong),
        (fine, poisoned),
        ([fine, fine], [fine, poisoned]),
        ((fine, fine), (poisoned, fine)),
        (step(), step(loss=wrong)),
        (step(), step()._replace(predicted=poisoned)),
    ):
        seen, progress = [], Progress(show=False)
        with pytest.raises(FloatingPointError) as error:
            for item in progress("drag", [good, bad, good], 3):
                seen.append(item)
        assert str(error.value) == "drag: a number is not finite after 2 of 3"
        assert len(seen) == 1 and seen[0] is good and "drag" not in progress.seconds
    with pytest.raises(FloatingPointError, match="^drag: a number is not finite after 1 of 3$"):
        list(Progress(show=False)("drag", [step(loss=None), step(wrong)], 3))
