"""What a layout says: where memory is in one optimizer wrapper.

ZeRO gives the optimizer flat tensors that hold pieces of many parameters, and padding. A parameter may straddle ranks.
One class per wrapper: `plain.py` here, DeepSpeed's in `integrations/deepspeed/_internals/`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """`length` elements of a flat tensor from `start` on are those of a parameter (its number) from `offset` on."""

    parameter: int
    start: int
    length: int
    offset: int


GradientPieces = Iterator[tuple[int, Tensor | None]]


class Layout(Protocol):
    """Where one optimizer wrapper keeps weights and gradients on this rank. No statistics, no facts of the run.

    Parameters are known by their number in the optimizer.
    """

    def segments(self) -> list[tuple[Tensor, list[Segment]]]:
        """For each tensor that `step()` will be given: the pieces of parameters in it, in order."""
        ...

    def gradients(self) -> GradientPieces:
        """This rank's share of the averaged gradient that `step()` will move by, before any clipping.

        (parameter, piece); None for a piece that is moved with a gradient of zeros. Over all ranks each element comes
        once. A piece belongs to the parameter's only segment on this rank.
        """
        ...

    def model_values(self, parameter: Tensor, segment: Segment) -> Tensor:
        """The model's own weights for a segment, to check that the layout was understood."""
        return parameter.data.reshape(-1).narrow(0, segment.offset, segment.length)

    def loss_scale(self) -> float:
        """What the gradients of this window, local ones too, are still multiplied by."""
        return 1.0

    def clear_stale(self, parameters: Iterable[int]) -> None:
        """Clear what the wrapper keeps of older windows for parameters that the first pass of a window left alone."""
        return None
