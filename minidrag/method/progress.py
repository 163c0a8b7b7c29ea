"""Progress of the stages of an edit: a bar, the time, and a stop at numbers that are not finite."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

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
        """Pass on what a stage yields, `total` items or fewer.

        Raises FloatingPointError for an item with a number that is not finite.
        """
        hide = None if self.show is None else not self.show
        bar = tqdm(desc=f"{name:10}", total=total, disable=hide)
        with self.timed(name), bar:
            for count, item in enumerate(items, 1):
                check_finite(item, name, f" after {count} of {total}")
                bar.update()
                yield item

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of a context to a stage."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def check_finite(item: object, name: str, place: str = "") -> None:
    """Raise FloatingPointError for a tensor or float that is not finite, alone or in a tuple or list."""
    for value in item if isinstance(item, (tuple, list)) else [item]:
        if isinstance(value, (Tensor, float)) and not torch.as_tensor(value).isfinite().all():
            raise FloatingPointError(f"{name}: a number is not finite{place}")
