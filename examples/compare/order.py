"""Which rows make up a micro-batch."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def micro_batch(index: int, rows: int, size: int, seed: int) -> Tensor:
    """The rows, of `rows`, of micro-batch number `index`, (size,).

    They are shuffled anew in every epoch, by `seed` and the epoch alone; what does not fill a micro-batch is left out.
    """
    epoch, place = divmod(index, rows // size)
    return _shuffled(rows, 1000 * seed + epoch)[place * size : (place + 1) * size]


@lru_cache(maxsize=1)
def _shuffled(rows: int, seed: int) -> Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
