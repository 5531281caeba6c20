"""ZeRO 0: every rank holds the whole averaged gradient in `p.grad` and measures its share of the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ....layouts.layout import GradientPieces, Layout, Segment


class Zero0Layout(Layout):
    """`step()` gets the parameters themselves, or in bf16 the fp32 copies that `FP16_UnfusedOptimizer` keeps.

    `masters`: each parameter, with the tensor that `step()` moves for it.
    """

    def __init__(self, masters: list[tuple[Tensor, Tensor]], index: Mapping[int, int], rank: int, ranks: int) -> None:
        self._masters = [(index[id(parameter)], parameter, master) for parameter, master in masters]
        self._rank, self._ranks = rank, ranks

    def segments(self) -> list[tuple[Tensor, list[Segment]]]:
        return [(master, [Segment(i, 0, p.numel(), 0)]) for i, p, master in self._masters]

    def gradients(self) -> GradientPieces:
        for i, parameter, _ in self._masters:
            if i % self._ranks == self._rank:
                yield i, parameter.grad

    def thrown_away(self, reached: Sequence[int]) -> list[int]:
        held = {i for i, parameter, _ in self._masters if parameter.grad is not None}
        return [i for i in reached if i not in held]  # DeepSpeed leaves out a parameter without elements

    def discard(self) -> None:
        for _, parameter, _ in self._masters:
            parameter.grad = None
