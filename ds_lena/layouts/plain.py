"""Plain PyTorch, in one process or DDP: the gradient is `p.grad`, the same on every rank after backward."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import Tensor

from .layout import GradientPieces, Layout, Segment


class PlainLayout(Layout):
    """Every rank holds all parameters and gradients. Rank `rank` of `ranks` measures its share of the parameters."""

    def __init__(self, parameters: Sequence[Tensor], rank: int, ranks: int) -> None:
        self._parameters = parameters
        self._rank, self._ranks = rank, ranks

    def segments(self) -> list[tuple[Tensor, list[Segment]]]:
        return [(p, [Segment(i, start=0, length=p.numel(), offset=0)]) for i, p in enumerate(self._parameters)]

    def gradients(self) -> GradientPieces:
        for i, parameter in enumerate(self._parameters):
            if parameter.grad is not None and i % self._ranks == self._rank:  # torch does not move it if it is None
                yield i, parameter.grad

    def unchanged_up_to(self) -> int:
        """DDP averages in memory of its own, and writes its result at the end of a pass."""
        return sys.maxsize

    def shows_changes(self) -> bool:
        return True
