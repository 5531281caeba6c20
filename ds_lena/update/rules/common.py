"""What every update rule provides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

# Elements that are computed at a time where temporaries are needed: on the CPU few enough to stay in its caches.
_BLOCK = {"cpu": 1 << 16}
_BLOCK_ELSEWHERE = 1 << 22

Group = Mapping[str, Any]
"""What a parameter group says, with the optimizer's defaults for what it does not."""


def has_fused_kernel(parameter: Tensor) -> bool:
    """Whether torch has fused optimizer kernels for this tensor's device; torch.optim's plain code runs elsewhere."""
    return parameter.is_cpu or parameter.is_cuda or parameter.is_xpu or parameter.is_mps


def blocks(tensors: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Tensors of one shape, block by block (views); in one where they cannot be viewed as flat."""
    if not all(tensor.is_contiguous() for tensor in tensors):
        yield tensors
        return
    size = _BLOCK.get(tensors[0].device.type, _BLOCK_ELSEWHERE)
    yield from zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True)


@dataclass(frozen=True)
class Trust:
    """How a rule makes the trust ratio of a tensor, from the norm of its weights and from one more.

    `add_square(total, weight, gradient, buffers, step, weight_decay, group)`: adds to `total`, a 0-dim float64 tensor
    (modified in place), the squared norm of the other vector for one piece; nothing else is changed. The piece is in
    float32 or wider, the gradient as it will be given to `move`; `step` as for `move`.
    `ratio(weight_norm, other_norm, weight_decay, coefficient)`: (T,) from (T,) tensors and a number; called for
    norms > 0 only.
    `coefficient`: of the trust ratio, where the user gives none.
    """

    add_square: Callable[[Tensor, Tensor, Tensor, Sequence[Tensor], Tensor, float, Group], None]
    ratio: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    coefficient: float


class Pieces(NamedTuple):
    """Pieces of one flat tensor that move alike, with one learning rate.

    `parameters`, `gradients`: pieces in one order; `buffers`: the same of each state tensor of the rule.
    `rate`: index of their learning rate. `weight_decay`: a number.
    """

    parameters: list[Tensor]
    gradients: list[Tensor]
    buffers: Sequence[list[Tensor]]
    rate: int
    weight_decay: float


@dataclass(frozen=True)
class Rule:
    """A base update rule.

    `buffers(group)`: names of its state tensors, each shaped like the parameter and zero at the start.
    `move(parameters, gradients, buffers, step, lr, weight_decay, group)`: moves `parameters` (modified in place, with
    `buffers`, one list per name in the order of `buffers(group)`). `step` is a 0-dim float32 tensor, the count of
    updates with this one (not modified); `lr` a number or 0-dim tensor that already holds the layer's factor and the
    trust ratio, if any; `weight_decay` a number.
    `trust`: set for a rule with trust ratios.
    """

    buffers: Callable[[Group], tuple[str, ...]]
    move: Callable[
        [list[Tensor], list[Tensor], Sequence[list[Tensor]], Tensor, float | Tensor, float, Group],
        None,
    ]
    trust: Trust | None = None

    def update(self, pieces: Sequence[Pieces], rates: Sequence[Any], step: Tensor, group: Group) -> None:
        """Move all pieces of one flat tensor, each with `rates[piece.rate]` (modified in place)."""
        for some in pieces:
            self.move(some.parameters, some.gradients, some.buffers, step, rates[some.rate], some.weight_decay, group)
