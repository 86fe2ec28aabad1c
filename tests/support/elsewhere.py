"""A device that is not there, for machines without a GPU: its tensors lie in the CPU's memory, but where a
GPU would refuse to compute with one of the CPU's, so does it. What runs here asks nothing of the host that a
GPU would not answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICE = "privateuseone:0"  # the name that PyTorch keeps for devices it does not know
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
_INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default}  # a GPU takes indices of the CPU


class Elsewhere(Tensor):
    """A tensor on the device; `here` is its memory."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> Elsewhere:
        place = {"strides": here.stride(), "storage_offset": here.storage_offset()}
        with torch.inference_mode(False):  # views of tensors from outside that mode cannot be made inside
            made: Elsewhere = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, here.shape, dtype=here.dtype, device=DEVICE, **place
            )
        made.here = here
        return made

    def numpy(self, *_: Any, **__: Any) -> Any:
        """Raises TypeError, as a GPU's tensors do."""
        raise TypeError("can't convert a tensor of another device to numpy; use Tensor.cpu() first")

    __array__ = numpy

    def tolist(self) -> Any:
        """The numbers, on the host."""
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operation with such a tensor."""
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """`torch.tensor` and lists as indices become tensors of the device where no dispatch mode sees it."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None) if func is torch.tensor else None
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            tensor, index, *rest = args
            indices = index if isinstance(index, tuple) else (index,)
            args = tensor, tuple(_index(i) for i in indices), *rest
        made = func(*args, **kwargs)
        return made if device is None else made.to(device)


def _index(index: Any) -> Any:
    return torch.as_tensor(index) if isinstance(index, list | np.ndarray) else index


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    known: dict[int, Elsewhere] = {}  # by memory: what is changed in place stays the same tensor
    given: list[Tensor] = []
    wanted: list[torch.device] = []

    def to_here(value: Any) -> Any:
        if isinstance(value, Tensor):
            given.append(value)
            if isinstance(value, Elsewhere):
                known[id(value.here)] = value
                return value.here
        elif isinstance(value, torch.device):
            wanted.append(value)
            return torch.device("cpu") if _is_there(value) else value
        return value

    here_args, here_kwargs = _map(to_here, args), _map(to_here, kwargs)
    if known:
        checked = given[:1] if func in _INDEXED else () if func in _COPIES else [t for t in given if t.ndim]
        if not all(isinstance(t, Elsewhere) for t in checked):
            raise RuntimeError(f"{func}: all tensors must be on the same device")
    found = func(*here_args, **here_kwargs)
    if not (_is_there(wanted[0]) if wanted else known):
        return found
    return _map(lambda value: _there(value, known) if isinstance(value, Tensor) else value, found)


def _there(here: Tensor, known: dict[int, Elsewhere]) -> Elsewhere:
    return known[id(here)] if id(here) in known else Elsewhere(here)


def _map(change: Callable[[Any], Any], value: Any) -> Any:
    """Arguments with each value changed; PyTorch's own function for trees takes many times longer."""
    if isinstance(value, tuple | list):
        return type(value)(_map(change, inner) for inner in value)
    if isinstance(value, dict):
        return {name: _map(change, inner) for name, inner in value.items()}
    return change(value)


def _is_there(device: torch.device) -> bool:
    return device.type == torch.device(DEVICE).type


@cache
def _set_up() -> None:
    _setup_privateuseone_for_python_backend()


@contextmanager
def elsewhere() -> Iterator[str]:
    """The device's name, while it is there."""
    _set_up()
    with _Factories(), _Literals():
        yield DEVICE
