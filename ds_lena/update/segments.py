"""How a flat tensor is cut for the update: all pieces with one learning rate move in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..layouts.layout import Segment


@dataclass(frozen=True)
class Batch:
    """Pieces of one flat tensor that move alike.

    `rate`: the parameter whose learning rate they have. `decays`: whether they have weight decay.
    `pieces`: their positions in `Cut.split`.
    """

    rate: int
    decays: bool
    pieces: tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """How one tensor is cut: the `sizes` of all its parts, padding included, and the `batches` that move together."""

    sizes: tuple[int, ...]
    batches: tuple[Batch, ...]

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Views of the parts of `tensor`. If it is one part: the tensor itself, in its own shape."""
        return (tensor,) if len(self.sizes) == 1 else tensor.split(self.sizes)


def cut_flat(numel: int, segments: Sequence[Segment], rates: Sequence[int], decays: Sequence[bool]) -> Cut:
    """Cut a flat tensor of `numel` elements at the borders of its segments. Neighbours that move alike stay one part.

    `rates[i]`: the parameter whose learning rate parameter i has, for example the first parameter of its layer.
    `decays[i]`: whether parameter i has weight decay.
    """
    sizes: list[int] = []
    moving: dict[tuple[int, bool], list[int]] = {}
    position, last = 0, None
    for segment in segments:
        if segment.start > position:
            sizes.append(segment.start - position)
            last = None
        key = (rates[segment.parameter], decays[segment.parameter])
        if key == last:
            sizes[-1] += segment.length
        else:
            moving.setdefault(key, []).append(len(sizes))
            sizes.append(segment.length)
        position, last = segment.start + segment.length, key
    if numel > position:
        sizes.append(numel - position)
    return Cut(tuple(sizes), tuple(Batch(rate, decay, tuple(where)) for (rate, decay), where in moving.items()))
