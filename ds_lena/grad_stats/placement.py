"""Where each parameter stands in the parallel grid. Pure data: no optimizer wrapper and no engine.

Let h be the local gradient that a hook sees. The averaged gradient is gbar = (1 / D) x sum of h over replicas and
passes, and A = (n / D^2) x sum of |h|^2. A `Placement` gives D, says which copies count, and how h becomes whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Join = Callable[[Tensor], Tensor | None]
"""Completes a local gradient before it is squared. Returns the whole gradient, this rank's part of the whole gradient,
or None if another rank measures it. Called once for each gradient, in the order of the backward pass."""


@dataclass(frozen=True)
class Placement:
    """One parameter in the parallel grid.

    `name`: its name in the user's model, the same on every rank that holds a part or a copy of it.
    `shape`: the shape of the whole tensor.
    `replicas`: the number of ranks that average its gradient. Each has micro-gradients of its own.
    `spread`: e, the number of micro-batches in one of its micro-gradients. It is more than 1 for an expert that gets
    tokens from e ranks.
    `divisor`: D, by which the sum over replicas and passes is divided. This is `replicas` x `spread`, unless the
    optimizer wrapper divides by something else.
    `counted`: whether the statistics count what this rank holds. Of several copies of one tensor, one counts.
    `join`: set if a hook sees only a part of the gradient.
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
        """Micro-batches of one pass on all ranks. It is the same for every parameter of a model."""
        return self.replicas * self.spread


def data_parallel(names: Sequence[str], shapes: Sequence[torch.Size], replicas: int) -> list[Placement]:
    """The placements of a model whose replicas are one rank each."""
    return [
        Placement(name, shape, replicas=replicas, divisor=replicas) for name, shape in zip(names, shapes, strict=True)
    ]
