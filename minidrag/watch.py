"""Watching a stage of an edit: numbers that are not finite stop it."""

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Progress(Protocol):
    """Passes on what a stage yields, `total` items or fewer, and may show, time, or stop it."""

    def __call__(self, name: str, items: Iterable[T], total: int) -> Iterator[T]: ...


def watch(name: str, items: Iterable[T], total: int) -> Iterator[T]:
    """Pass on what a stage yields; raise FloatingPointError for a number that is not finite."""
    for count, item in enumerate(items, 1):
        for part in item if isinstance(item, (list, tuple)) else [item]:
            if isinstance(part, (Tensor, float)) and not torch.as_tensor(part).isfinite().all():
                raise FloatingPointError(f"{name}: a number is not finite after {count} of {total}")
        yield item
