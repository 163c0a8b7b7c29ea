"""Progress bars and times of the stages of an edit."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from huggingface_hub.utils import tqdm

from minidrag.watch import watch

T = TypeVar("T")


class Progress:
    """Show a bar for each stage, take its time, and refuse numbers that are not finite.

    seconds: by stage, in the order in which they ended.
    """

    def __init__(self, show: bool = True):
        self.show = show
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, items: Iterable[T], total: int) -> Iterator[T]:
        bar = tqdm(desc=f"{name:10}", total=total, disable=not self.show)
        with self.timed(name), bar:
            for item in watch(name, items, total):
                bar.update()
                yield item

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of a context to a stage."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
