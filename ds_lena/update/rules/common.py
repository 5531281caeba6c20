"""What every base rule provides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

# Elements per block, where a rule needs temporaries. On the CPU a block stays in the caches.
_BLOCK = {"cpu": 1 << 16}
_BLOCK_ELSEWHERE = 1 << 22

Group = Mapping[str, Any]
"""A parameter group, with the optimizer's defaults for what the user did not set."""


def has_fused_kernel(parameter: Tensor) -> bool:
    """Whether torch has fused optimizer kernels for this tensor's device. Elsewhere torch.optim's plain code runs."""
    return parameter.is_cpu or parameter.is_cuda or parameter.is_xpu or parameter.is_mps


def blocks(tensors: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Tensors of one shape, block by block, as views. If one of them is not contiguous: the tensors as one block."""
    if not all(tensor.is_contiguous() for tensor in tensors):
        yield tensors
        return
    size = _BLOCK.get(tensors[0].device.type, _BLOCK_ELSEWHERE)
    yield from zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True)


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel in `kernels/programs.py`: its `name`, and the `numbers` that it gets of a parameter group."""

    name: str
    numbers: Callable[[Group], Mapping[str, Any]]


@dataclass(frozen=True)
class Trust:
    """How a rule makes the trust ratio of a tensor, from the norm of its weights and the norm of a second vector.

    `add_square(total, weight, gradient, buffers, step, weight_decay, group)`: adds the squared norm of one piece of the
    second vector to `total`, a 0-dim float64 tensor (modified in place). Nothing else changes. The piece is in float32
    or wider. `gradient` and `step` are those that `move` will get.
    `ratio(weight_norm, other_norm, weight_decay, coefficient)`: (T,) from (T,) tensors and a number. It gets norms > 0
    only.
    `coefficient`: the trust coefficient, if the user gives none.
    `kernel`: writes the squared norms of the weights and of the second vector of many pieces.
    """

    add_square: Callable[[Tensor, Tensor, Tensor, Sequence[Tensor], Tensor, float, Group], None]
    ratio: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    coefficient: float
    kernel: Kernel


class Pieces(NamedTuple):
    """Pieces of one flat tensor that move alike, with one learning rate.

    `parameters`, `gradients`: the pieces, in the same order. `buffers`: for each state tensor of the rule, its pieces.
    `rate`: the index of their learning rate.
    """

    parameters: list[Tensor]
    gradients: list[Tensor]
    buffers: Sequence[list[Tensor]]
    rate: int
    weight_decay: float


@dataclass(frozen=True)
class Rule:
    """A base update rule.

    `buffers(group)`: names of its state tensors. Each has the parameter's shape, and starts as zeros.
    `move(parameters, gradients, buffers, step, lr, weight_decay, group)`: moves `parameters` and `buffers` (modified in
    place). `buffers` has one list per name, in the order of `buffers(group)`. `step` is a 0-dim float32 tensor, the
    count of updates including this one (not modified). `lr` is a number or a 0-dim tensor, which contains the layer's
    factor and the trust ratio.
    `kernel`: moves the pieces of many tensors as `move` does, None for no kernel.
    `trust`: set for a rule with trust ratios.
    """

    buffers: Callable[[Group], tuple[str, ...]]
    move: Callable[
        [list[Tensor], list[Tensor], Sequence[list[Tensor]], Tensor, float | Tensor, float, Group],
        None,
    ]
    kernel: Kernel | None = None
    trust: Trust | None = None

    def update(self, pieces: Sequence[Pieces], rates: Sequence[Any], step: Tensor, group: Group) -> None:
        """Move all pieces of one flat tensor, each with `rates[piece.rate]` (modified in place)."""
        for some in pieces:
            self.move(some.parameters, some.gradients, some.buffers, step, rates[some.rate], some.weight_decay, group)
