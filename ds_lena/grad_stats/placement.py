"""Whose gradient it is: where each parameter stands in the parallel grid. Pure data, no wrapper and no engine.

With h the local gradient that a hook sees, the averaged gradient is gbar = (1 / D) x sum of h over replicas and
passes, and A = (n / D^2) x sum of |h|^2, where `Placement` says D, which copies count, and what makes h whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Join = Callable[[Tensor], Tensor | None]
"""Completes a local gradient before it is squared: the whole one, this rank's part of the whole, or None where another
rank measures it. Called once for each gradient, in the order of the backward pass."""


@dataclass(frozen=True)
class Placement:
    """One parameter in the parallel grid.

    `name`: its name in the user's model, the same on every rank that holds a part or copy of it.
    `shape`: of the whole tensor.
    `replicas`: ranks that average its gradient, each over micro-gradients of its own.
    `spread`: micro-batches in one of its micro-gradients, e. More than 1 for an expert that e ranks send tokens to.
    `divisor`: D, what the sum over replicas and passes was divided by; `replicas` x `spread` unless the wrapper has
    another idea.
    `counted`: whether what this rank holds counts. Of several copies of one tensor, one does.
    `join`: set where a hook sees only a part of the gradient.
    """

    name: str
    shape: torch.Size
    replicas: int = 1
    spread: int = 1
    divisor: int = 1
    counted: bool = True
    join: Join | None = None

    @property
    def micro_batches_at_once(self) -> int:
        """Micro-batches of one pass on all ranks: the same for every parameter of a model."""
        return self.replicas * self.spread


def data_parallel(names: Sequence[str], shapes: Sequence[torch.Size], replicas: int) -> list[Placement]:
    """The placements of a model of which every replica is one rank."""
    return [
        Placement(name, shape, replicas=replicas, divisor=replicas) for name, shape in zip(names, shapes, strict=True)
    ]
