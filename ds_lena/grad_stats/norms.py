"""Squared norms of gradients: one pass over each tensor, accurate for any size, without a copy in a wider type.

On a GPU every norm is one kernel that writes into a shared buffer. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import UnsupportedError

# torch's CPU kernel for norms adds all squares of a row one after the other in float32. On 40 M normal elements its
# result is wrong by half a percent. A dot product adds in many lanes and reads faster. In blocks of this size its
# error is 2e-6, and half-precision input, widened block by block, stays in the caches.
_BLOCK = 1 << 16
_DENSE = torch.strided


class SquaredNorms:
    """Squared L2 norms of `count` tensors, written one at a time and read together.

    Squares are added up in float32 or wider, and the sums of blocks in float64. `dtype`: float64 if any tensor is.
    Each norm is computed on its tensor's device, so a gradient that lies on the CPU is not copied. The result is on
    `device`.
    """

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device) -> None:
        self._count = count
        self._dtype = torch.promote_types(dtype, torch.float32)
        self._device = device
        self._buffers: dict[torch.device, tuple[Tensor, tuple[Tensor, ...]]] = {}
        self._on_cpu = device.type == "cpu"
        _, self._slots = self._add_buffer(device)

    def _add_buffer(self, device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
        written = torch.zeros(self._count, dtype=self._dtype, device=device)
        self._buffers[device] = written, written.unbind()
        return self._buffers[device]

    def _slots_on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Of a second device. A process uses one device beside the CPU."""
        return (self._buffers.get(device) or self._add_buffer(device))[1]

    def write(self, index: int, gradient: Tensor) -> None:
        """Write the squared norm of `gradient` at `index`."""
        if gradient.layout is not _DENSE:
            raise UnsupportedError(
                f"LENA: got a gradient of layout {gradient.layout}; only dense gradients are supported. "
                "Build the embedding with sparse=False."
            )
        on_cpu = gradient.is_cpu
        slot = (self._slots if on_cpu == self._on_cpu else self._slots_on(gradient.device))[index]
        if not on_cpu:
            torch.linalg.vector_norm(gradient, dtype=self._dtype, out=slot)
        elif gradient.numel() > _BLOCK:
            slot.copy_(_square_of_long(gradient, self._dtype))
        else:
            flat = gradient if gradient.dim() == 1 else gradient.reshape(-1)
            if flat.dtype != self._dtype:
                flat = flat.to(self._dtype)
            torch.dot(flat, flat, out=slot)

    def clear(self) -> None:
        """Set all norms to 0."""
        for written, _ in self._buffers.values():
            written.zero_()

    def read(self) -> Tensor:
        """(count,) float64 on the result's device: the squared norms."""
        total = torch.zeros(self._count, dtype=torch.float64, device=self._device)
        for device, (written, _) in self._buffers.items():
            wide = written.to(torch.float64)
            total += (wide if device.type == "cpu" else wide.square()).to(self._device)
        return total


def squared_norm(tensor: Tensor) -> Tensor:
    """Squared L2 norm of one tensor: a 0-dim float64 tensor on the same device."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    if tensor.device.type != "cpu":
        return torch.linalg.vector_norm(tensor, dtype=wide).double().square()
    if tensor.numel() > _BLOCK:
        return _square_of_long(tensor, wide)
    flat = tensor.reshape(-1).to(wide)
    return torch.dot(flat, flat).double()


def squared_norms(pieces: Iterable[tuple[int, Tensor | None]], into: SquaredNorms) -> Tensor:
    """(count,) float64: squared norms of (index, tensor) pairs. 0 for None, and for an index that does not occur."""
    into.clear()
    for index, piece in pieces:
        if piece is not None:
            into.write(index, piece)
    return into.read()


def _square_of_long(tensor: Tensor, wide: torch.dtype) -> Tensor:
    """On the CPU: squared norms of the blocks in the type `wide`, added up in float64."""
    blocks = _flat(tensor).split(_BLOCK)
    squares = torch.empty(len(blocks), dtype=wide)
    for block, slot in zip(blocks, squares.unbind(), strict=True):
        block = block.to(wide)
        torch.dot(block, block, out=slot)
    return squares.double().sum()


def _flat(tensor: Tensor) -> Tensor:
    """All elements as one row. The order is that of memory if this saves a copy."""
    if tensor.ndim == 2 and tensor.stride(0) == 1:
        tensor = tensor.t()
    return tensor.reshape(-1)
