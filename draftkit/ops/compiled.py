"""Parts of a training step, compiled where they run on a GPU: what PyTorch would run there kernel by kernel
becomes a few. Attention has its own (`attention.py`)."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
BACKEND: Any = "inductor"


def for_device(function: Callable[P, R], device: torch.device) -> Callable[P, R]:
    """The function as it is on a CPU, which has functions of its own in C++; for a GPU compiled, once for all
    lengths. Where nothing can be compiled, or not this, it stays as it is, and a line says so."""
    return _compiled(function) if compiles_on(device.type) else function


@functools.cache
def compiles_on(kind: str) -> bool:
    """Whether functions are compiled for this kind of device: GPUs, with a compiler that works."""
    if kind != "cuda":
        return False
    try:
        x = torch.ones(8, device=kind, requires_grad=True)
        torch.compile(_probe, dynamic=True, backend=BACKEND)(x).backward()
    except Exception as error:  # a compiler that is missing or too old says so in many ways
        _tell("a step", error)
        return False
    return True


def _probe(x: torch.Tensor) -> torch.Tensor:
    return (x.sin() * x).sum()


@functools.cache
def _compiled(function: Callable[P, R]) -> Callable[P, R]:
    from torch._dynamo.exc import TorchDynamoException  # seconds to import
    from torch._functorch import config

    # compiled with the forward, where a failure can still be answered
    backward_too = config.patch(force_non_lazy_backward_lowering=True)
    compiled = torch.compile(function, dynamic=True, backend=BACKEND)
    failed = False

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal failed
        if not failed:
            try:
                with backward_too:
                    return compiled(*args, **kwargs)
            except TorchDynamoException as error:
                failed = True
                _tell(function.__qualname__, error)
        return function(*args, **kwargs)

    return call


def _tell(what: str, error: Exception) -> None:
    cause = getattr(error, "inner_exception", error)  # of a backend; around it stand the compiler's own words
    first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    print(f"train: {what} cannot be compiled here ({first}); goes on as it is, slower", file=sys.stderr)
