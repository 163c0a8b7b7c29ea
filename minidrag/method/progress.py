"""Progress of the stages of an edit: a bar, the time, and a stop at numbers that are not finite."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from minidrag.method.drag import Step

T = TypeVar("T")


class Progress:
    """Show a bar for each stage, take its time, and refuse numbers that are not finite.

    show: None shows bars only in a terminal or a notebook.
    seconds: by stage, in the order in which they ended.
    """

    def __init__(self, show: bool | None = None):
        self.show = show
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, items: Iterable[T], total: int) -> Iterator[T]:
        """Pass on the items of a stage, of which at most `total` count as a unit of work.

        Raises FloatingPointError for an item with a number that is not finite.
        """
        hide = None if self.show is None else not self.show
        done = 0
        with self.timed(name), tqdm(desc=f"{name:10}", total=total, disable=hide) as bar:
            for item in items:
                done += is_work(item)
                check_finite(item, name, f" after {done} of {total}")
                bar.update(is_work(item))
                yield item
            bar.total = done  # a drag may end early
            bar.refresh()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of a context to a stage."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def is_work(item: object) -> bool:
    """False for a state of a drag that follows no update: the first one of a level."""
    return not isinstance(item, Step) or item.loss is not None


def check_finite(item: object, name: str, place: str = "") -> None:
    """Raise FloatingPointError for a tensor or float that is not finite, alone or in a tuple or list."""
    for value in item if isinstance(item, (tuple, list)) else [item]:
        if isinstance(value, (Tensor, float)) and not torch.as_tensor(value).isfinite().all():
            raise FloatingPointError(f"{name}: a number is not finite{place}")
