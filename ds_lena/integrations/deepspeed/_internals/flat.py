"""Parameters that lie one after the other in a flat tensor. This rank has a part of the flat tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from ....layouts.layout import GradientPieces, Layout, Segment


def consecutive(parameters: Sequence[Tensor]) -> Iterator[tuple[Tensor, int]]:
    """Each parameter with its offset in the flat tensor."""
    offset = 0
    for parameter in parameters:
        yield parameter, offset
        offset += parameter.numel()


def segments_in(
    laid_out: Iterable[tuple[Tensor, int]], start: int, size: int, index: Mapping[int, int]
) -> list[Segment]:
    """The segments of the part [start, start + size) of a flat tensor.

    `laid_out`: each parameter with its offset in the flat tensor. `index`: id(parameter) to its number.
    """
    segments = []
    for parameter, offset in laid_out:
        begin, end = max(offset, start), min(offset + parameter.numel(), start + size)
        if begin < end:
            segments.append(Segment(index[id(parameter)], begin - start, end - begin, begin - offset))
    return segments


class KeptGradients(Layout):
    """For layouts whose flat tensors keep their `.grad`, of which DeepSpeed does not write all in each update.

    It comes before the layout without offload among the bases.
    """

    _is_complete = False

    def gradients(self) -> GradientPieces:
        if not self.mends:
            self._wait()
        elif not self._is_complete:
            written = self._write_missed()
            for i, piece in pieces_of_grad(self.segments()):
                if i not in written:
                    piece.zero_()
            self._is_complete = True
        return pieces_of_grad(self.segments())

    def _wait(self) -> None:
        """Wait for copies to the CPU that DeepSpeed has started."""
        raise NotImplementedError

    def _write_missed(self) -> Collection[int]:
        """Write the gradients that DeepSpeed has left out. Returns the parameters of which all is written."""
        raise NotImplementedError


def pieces_of_grad(flats: Iterable[tuple[Tensor, list[Segment]]]) -> Iterator[tuple[int, Tensor]]:
    """The segments in the `.grad` of flat tensors that keep it."""
    for flat, segments in flats:
        gradient: Tensor = flat.grad  # type: ignore[assignment]
        for segment in segments:
            yield segment.parameter, gradient.narrow(0, segment.start, segment.length)
