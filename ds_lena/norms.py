"""Squared norms of gradients: one pass, accurate for tensors of any size, and no wide copy of them."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import UnsupportedError

# torch's CPU kernel adds all squares of a row in float32, one after the other: on 40 M normal elements it is wrong by
# half a percent, in rows of 2,048 by 1e-8. Half-precision input is widened in blocks, so that a block stays in cache.
_ROW = 2048
_BLOCK = 1 << 18


def add_squared_norm(total: Tensor, gradient: Tensor) -> None:
    """Add the squared L2 norm of `gradient` to `total`, a 0-dim float64 tensor on its device (modified in place).

    Squares are added up in float32 or wider, norms of rows and tensors in float64.
    """
    if gradient.layout is not torch.strided:
        raise UnsupportedError(
            f"LENA: got a gradient of layout {gradient.layout}; only dense gradients are supported. "
            "Build the embedding with sparse=False."
        )
    wide = torch.promote_types(gradient.dtype, torch.float32)
    if gradient.device.type != "cpu" or gradient.numel() <= _ROW:
        norm = torch.linalg.vector_norm(gradient, dtype=wide)
        total.addcmul_(norm, norm)
        return
    flat = gradient.reshape(-1)
    for block in (flat,) if flat.dtype == wide else flat.split(_BLOCK):
        whole = block.numel() // _ROW * _ROW
        norms = torch.linalg.vector_norm(block[:whole].view(-1, _ROW), dim=1, dtype=wide).to(torch.float64)
        total.add_(torch.dot(norms, norms))
        if whole < block.numel():
            add_squared_norm(total, block[whole:])


def squared_norm(gradient: Tensor) -> Tensor:
    """Squared L2 norm of `gradient`, a 0-dim float64 tensor on its device."""
    total = torch.zeros((), dtype=torch.float64, device=gradient.device)
    add_squared_norm(total, gradient)
    return total
