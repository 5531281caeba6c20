"""Counting what goes over the network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Collectives(TorchDispatchMode):
    """All c10d operations that this thread starts meanwhile: `names`, and `sizes`, the bytes that this rank puts in.

    Below torch.distributed's functions and those that deepspeed.comm took from it: both end in the dispatcher.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.sizes: list[int] = []

    @property
    def calls(self) -> Counter[str]:
        """How many, by name."""
        return Counter(name.strip("_") for name in self.names)

    @property
    def bytes(self) -> Counter[str]:
        """Bytes of all of them, by name."""
        total: Counter[str] = Counter()
        for name, size in zip(self.names, self.sizes, strict=True):
            total[name.strip("_")] += size
        return total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.names.append(func._schema.name.removeprefix("c10d::"))
            self.sizes.append(sum(tensor.nbytes for tensor in tensors_in(_input(func._schema, args))))
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
