"""How a flat tensor is cut for the update: what moves with one learning rate moves in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..layouts.layout import Segment


@dataclass(frozen=True)
class Batch:
    """Pieces of one flat tensor that move with the rate of parameter `rate`: positions in the split of the tensor."""

    rate: int
    decays: bool
    pieces: tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """How one tensor is cut for the update: the sizes of all its parts, padding included, and what moves together."""

    sizes: tuple[int, ...]
    batches: tuple[Batch, ...]

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Views of the parts of `tensor`; the tensor itself, in its own shape, where it is one part."""
        return (tensor,) if len(self.sizes) == 1 else tensor.split(self.sizes)


def cut_flat(numel: int, segments: Sequence[Segment], rates: Sequence[int], decays: Sequence[bool]) -> Cut:
    """Cut a flat tensor of `numel` elements at the borders of its segments; neighbours that move alike stay whole.

    `rates[i]`: the parameter whose rate parameter i moves with, one for each layer say. `decays[i]`: whether it has
    weight decay.
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
