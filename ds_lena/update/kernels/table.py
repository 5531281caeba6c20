"""Which elements of which tensors a kernel runs over: chunks of neighbours that move alike."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..segments import Cut

BLOCK = 1024
"""The most elements of a chunk."""

Piece = tuple[int, int, int, int]
"""The number of its tensor, its first element, its end, and twice the number of its rate, plus 1 with weight decay."""


def pieces_of(number: int, cut: Cut) -> Iterator[Piece]:
    """The pieces of one tensor that move."""
    starts = [0]
    for size in cut.sizes:
        starts.append(starts[-1] + size)
    for batch in cut.batches:
        for i in batch.pieces:
            yield number, starts[i], starts[i + 1], 2 * batch.rate + batch.decays


def in_chunks(pieces: Iterable[Piece]) -> Tensor:
    """(chunks, 4) int64: the pieces in chunks of at most `BLOCK` elements."""
    rows = torch.tensor([piece for piece in pieces if piece[2] > piece[1]], dtype=torch.long).reshape(-1, 4)
    counts = (rows[:, 2] - rows[:, 1] + BLOCK - 1) // BLOCK
    number = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    chunks = rows.repeat_interleave(counts, dim=0)
    chunks[:, 1] += BLOCK * number
    chunks[:, 2] = torch.minimum(chunks[:, 2], chunks[:, 1] + BLOCK)
    return chunks


class Table:
    """The chunks of some tensors on their device, and the addresses of the tensors' data.

    `chunks` (chunks, 4) int64. Beside the moments this is all that an update keeps for each element: 1/32 byte.
    """

    def __init__(self, pieces: Iterable[Piece], device: torch.device) -> None:
        self.chunks = _send(in_chunks(pieces), device)
        self._device = device
        self._addresses: list[int] = []
        self._sent = torch.zeros(0)

    @functools.cached_property
    def rates(self) -> Tensor:
        """(chunks,) int64: the number of the rate of each chunk."""
        return self.chunks[:, 3] // 2

    def addresses(self, tensors: Sequence[Sequence[Tensor | None]]) -> Tensor:
        """(tensors, columns) int64 on the device, 0 for None. They are sent only when one has changed."""
        now = [0 if tensor is None else tensor.data_ptr() for row in tensors for tensor in row]
        if now != self._addresses:
            self._addresses, self._sent = now, _send(torch.tensor(now, dtype=torch.long), self._device)
        return self._sent


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that nobody waits for."""
    return tensor.to(device) if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
