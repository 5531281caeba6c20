"""Counting what goes over the network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Collectives(TorchDispatchMode):
    """All c10d operations that this thread starts meanwhile, by name: how many, and bytes that this rank puts in.

    Below torch.distributed's functions and those that deepspeed.comm took from it: both end in the dispatcher.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").strip("_")
            self.calls[name] += 1
            self.bytes[name] += sum(tensor.nbytes for tensor in tensors_in(_input(func._schema, args)))
        return func(*args, **(kwargs or {}))


def _input(schema: Any, args: Any) -> Any:
    """The argument that is sent: the one named after it where there are two, else the first."""
    names = [argument.name for argument in schema.arguments]
    return next((value for name, value in zip(names, args, strict=False) if "input" in name), args[0])


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Of lists within lists, as a collective takes them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)
