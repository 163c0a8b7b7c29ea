"""A second device on every machine: tensors that compute on the CPU but claim to be elsewhere.

It is as strict as a GPU: an operation takes tensors of one device only, and, as on Apple's GPUs, there is no
float64. Code that runs here places its tensors correctly on real devices too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "meta"  # the only device besides the CPU that autograd serves in every build of torch
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Distant(Tensor):
    """A tensor elsewhere; `inner` has its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Distant":
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        found = Tensor._make_wrapper_subclass(cls, inner.shape, device=torch.device(NAME), **layout)
        found.inner = inner
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} after the device was left")

    def tolist(self) -> Any:  # torch has none for subclasses
        return self.inner.tolist()


class Elsewhere(TorchDispatchMode):
    """The device, within a context. Raises RuntimeError for everything that a GPU would refuse."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        distant = {id(x.inner): x for x in tensors if isinstance(x, Distant)}
        near = [x for x in tensors if not isinstance(x, Distant) and x.dim()]  # GPUs take 0-d CPU tensors
        if distant and near and func not in COPIES:
            raise RuntimeError(f"{func} got tensors of two devices")
        there = isinstance(args[0], Distant) if func is COPIES[1] else bool(distant)
        if kwargs.get("device") is not None:
            there, kwargs["device"] = kwargs["device"].type == NAME, torch.device("cpu")
        args, kwargs = tree_map(lambda x: x.inner if isinstance(x, Distant) else x, (args, kwargs))

        def place(x: Any) -> Any:
            if not there or not isinstance(x, Tensor):
                return x
            if x.dtype == torch.float64:
                raise RuntimeError(f"{func} makes float64, which Apple's GPUs do not have")
            return distant[id(x)] if id(x) in distant else Distant(x)

        return tree_map(place, func(*args, **kwargs))


class Numbers(TorchFunctionMode):
    """Make tensors of numbers on the CPU first: on this device torch would drop the numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
            return func(*args, **kwargs)
        if func is Tensor.new_tensor:
            func, (like, *args) = torch.tensor, args
            kwargs = {"device": like.device, "dtype": like.dtype, **kwargs}
        device = kwargs.pop("device", None)
        return func(*args, **kwargs).to(device)


@contextmanager
def elsewhere() -> Iterator[str]:
    """Make the device available within a context; yield its name."""
    with Numbers(), Elsewhere(), torch.autograd.set_multithreading_enabled(False):
        yield NAME
