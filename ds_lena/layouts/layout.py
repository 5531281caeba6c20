"""What a layout says: where memory is in one optimizer wrapper.

ZeRO gives the optimizer flat tensors. They hold pieces of many parameters, and padding. The pieces of one parameter may
lie on several ranks. Each wrapper has one class: `plain.py` here, DeepSpeed's in `integrations/deepspeed/_internals/`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """A piece of a parameter in a flat tensor. All but `parameter` count elements.

    `parameter`: the parameter's number in the optimizer. `start`: where the piece begins in the flat tensor.
    `offset`: where it begins in the parameter.
    """

    parameter: int
    start: int
    length: int
    offset: int


GradientPieces = Iterator[tuple[int, Tensor | None]]


class Layout(Protocol):
    """Where one optimizer wrapper keeps weights and gradients on this rank. No statistics, no facts of the run.

    A parameter is known by its number in the optimizer.

    `mends`: whether faults of the wrapper are mended, which changes how the weights move. Who only looks sets it to
    False: then nothing is written, and `clear_gradients` and `discard` are not to be called.
    """

    mends: bool = True

    def segments(self) -> Iterable[tuple[Tensor, list[Segment]]]:
        """Each tensor that `step()` gets, with the pieces of parameters in it, in the order of memory.

        A tensor that is not in memory is brought there until the next one is asked for.
        """
        ...

    def gradients(self) -> GradientPieces:
        """This rank's share of the averaged gradient, before any clipping, as (parameter, piece).

        The piece is None if `step()` will move with a gradient of zeros. Each element of the averaged gradient comes
        once over all ranks. A rank has at most one segment of a parameter; the piece is that segment's gradient.
        """
        ...

    def model_values(self, parameter: Tensor, segment: Segment) -> Tensor:
        """The model's own weights of a segment, to check the layout against."""
        return parameter.data.reshape(-1).narrow(0, segment.offset, segment.length)

    def divisor(self, replicas: int, ranks: int) -> int:
        """What the sum of gradients over `ranks` is divided by, where `replicas` micro-batches are shared by them."""
        return replicas

    def loss_scale(self) -> float:
        """The factor that is still in the gradients of this window, the local ones too."""
        return 1.0

    def unchanged_up_to(self) -> int:
        """The most elements of a local gradient that the wrapper leaves as it is until its backward pass has ended.

        It may copy the gradient before that, or drop it.
        """
        return 0

    def shows_changes(self) -> bool:
        """Whether the version of a local gradient tells that someone has changed it.

        It does not where the wrapper moves gradients to memory of another tensor.
        """
        return False

    def thrown_away(self, reached: Sequence[int]) -> list[int]:
        """Those of the parameters that backward has reached in this window whose gradient is gone, by zero_grad()."""
        return []

    def next_pass(self) -> Literal["adds", "replaces all", "replaces some"]:
        """What the next backward pass does to the gradients of this window."""
        return "adds"

    def broken_pass(self) -> Literal["kept", "dropped", "fatal"]:
        """What becomes of the gradients that a pass has made before an exception ended it, once the next one starts.

        Fatal: the wrapper cannot go on.
        """
        return "kept"

    def loses_parts(self) -> bool:
        """Whether the wrapper throws away a gradient that a loss has made by a backward pass in its own forward."""
        return False

    def discard(self) -> None:
        """Throw away the gradients of this window. Engines only."""
        return None

    def clear_gradients(self) -> None:
        """Clear what the wrapper would carry into the next window. Called when a window has ended."""
        return None
