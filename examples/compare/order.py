"""Which rows make up a micro-batch."""

from __future__ import annotations

import torch
from torch import Tensor


class Order:
    """Rows 0 to `rows` in micro-batches of `size`, shuffled anew in every epoch; what does not fill one is left out.

    The order is a function of `seed` and the epoch alone. The present epoch's is kept.
    """

    def __init__(self, rows: int, size: int, seed: int) -> None:
        self._rows, self._size, self._seed = rows, size, seed
        self._epoch, self._shuffled = -1, torch.empty(0)

    def __call__(self, index: int) -> Tensor:
        """The rows of micro-batch number `index`, (size,), epoch after epoch without an end."""
        epoch, place = divmod(index, self._rows // self._size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(1000 * self._seed + epoch)
            self._epoch, self._shuffled = epoch, torch.randperm(self._rows, generator=generator)
        return self._shuffled[place * self._size : (place + 1) * self._size]
