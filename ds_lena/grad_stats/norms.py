"""Squared norms of gradients: one pass over each tensor, accurate for any size, without a copy in a wider type.

On a GPU the norms of many tensors are one call, since there a kernel for each tensor costs more than its work. Nothing
waits for the device.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .. import recorded
from ..errors import StateError, UnsupportedError
from ..recorded import Recorded

# torch's CPU kernel for norms adds all squares of a row one after the other in float32. On 40 M normal elements its
# result is wrong by half a percent. A dot product adds in many lanes and reads faster. In blocks of this size its
# error is 2e-6, and half-precision input, widened block by block, stays in the caches.
_BLOCK = 1 << 16
_DENSE = torch.strided

MOST_ELEMENTS = 32 << 20
"""Tensors that wait for their norm have no more elements than this together, beside the one that comes last. One of
more elements never waits: it would cost its batch memory, its blocks times the tensors.
"""
MOST_TENSORS = 1024
"""No more tensors of one type wait together."""


def is_batched(tensor: Tensor) -> bool:
    """Whether the norm of this tensor may be taken in a batch."""
    return tensor.is_cuda and tensor.layout is _DENSE


def _has_changed(tensor: Tensor, version: int) -> bool:
    return tensor._version != version


def _raw_stream(tensor: Tensor) -> int:
    """The stream on which this thread works now, on the tensor's device."""
    return torch._C._cuda_getCurrentRawStream(tensor.get_device()) if tensor.is_cuda else 0


class SquaredNorms:
    """Squared L2 norms of `count` tensors, written one at a time or in batches, and read together.

    Squares are added up in float32 or wider, and the sums of blocks in float64. `dtype`: float64 if any tensor is.
    Each norm is computed on its tensor's device, so a gradient that lies on the CPU is not copied. The result is on
    `device`. `refuses_changes`: a tensor that was changed while it waited is an error. Who moves gradients to memory of
    another tensor, as DeepSpeed does, is taken for one who changes them.
    """

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device) -> None:
        self.refuses_changes = False
        self._count = count
        self._dtype = torch.promote_types(dtype, torch.float32)
        self._device = device
        self._buffers: dict[torch.device, tuple[Tensor, tuple[Tensor, ...]]] = {}
        self._on_cpu = device.type == "cpu"
        self._waiting: defaultdict[torch.dtype, list[tuple[int, Tensor, int]]] = defaultdict(list)
        self._waiting_elements = self._waiting_stream = 0
        self._found: list[tuple[list[Tensor], list[Tensor]]] = []
        self._total = torch.zeros(count, dtype=torch.float64, device=device)
        self._take_squares = Recorded(keeps=1)
        self._is_clear = True
        self._add_squares = Recorded(keeps=2)
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
        self._is_clear = False
        _require_dense(gradient)
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

    def collect(self, index: int, gradient: Tensor, up_to: int = MOST_ELEMENTS) -> None:
        """Write the squared norm of `gradient` at `index`: in a batch, at `read` at the latest, or at once.

        Until then a gradient of a batch must not change, and its memory is held. `up_to`: a gradient of more elements
        is no such one. (This runs for every gradient. So it calls little Python.)
        """
        numel = gradient.numel()
        if not (0 < numel <= up_to and numel <= MOST_ELEMENTS and is_batched(gradient)):
            self.write(index, gradient)
            return
        stream = _raw_stream(gradient)
        if stream != self._waiting_stream and self._waiting:
            self._measure_waiting()
        self._waiting_stream = stream
        alias = gradient.detach()  # autograd copies a gradient that anyone else holds, and not its alias
        batch = self._waiting[gradient.dtype]
        batch.append((index, alias, gradient._version))
        self._waiting_elements += numel
        if self._waiting_elements > MOST_ELEMENTS or len(batch) >= MOST_TENSORS:
            self._measure_waiting()

    def _measure_waiting(self) -> None:
        """Take the norms of the tensors that wait, on the stream that made them: one call for each type."""
        for batch in self._waiting.values():
            indices, tensors, versions = zip(*batch, strict=True)
            if self.refuses_changes and any(map(_has_changed, tensors, versions)):
                self.forget_waiting()
                raise StateError(
                    "LENA: a gradient was changed in place before LENA had taken its norm: during the backward pass, "
                    "or after an exception had ended the pass. During a pass, change it by tensor.register_hook(), "
                    "whose result LENA sees; an autograd function must not write into the gradient that it is given. "
                    "After an exception call optimizer.zero_grad(), which throws the gradients of the pass away."
                )
            with _on_stream(self._waiting_stream, tensors[0]) as results:
                results += self.write_batch(indices, tensors)
        self._waiting.clear()
        self._waiting_elements = 0

    def write_batch(self, indices: Sequence[int], tensors: tuple[Tensor, ...]) -> list[Tensor]:
        """Write the squared norms of tensors that fit a batch, of one type and device: one call for all of them.

        Returns what is to be read for that at `read` at the latest.
        """
        norms = torch._foreach_norm(tensors, 2, dtype=self._dtype)
        if tensors[0].is_cpu:
            norms = torch._foreach_mul(norms, norms)  # as `write` has them there
        slots = self._slots_on(tensors[0].device)
        self._found.append(([slots[i] for i in indices], list(norms)))
        return self._found[-1][1]

    def forget_waiting(self) -> None:
        """Let go of the tensors that wait."""
        self._waiting.clear()
        self._waiting_elements, self._found = 0, []

    def _write_found(self) -> None:
        self._measure_waiting()
        if self._found:
            self._is_clear = False
            slots, norms = ([one for some in parts for one in some] for parts in zip(*self._found, strict=True))
            torch._foreach_copy_(slots, norms)
            self._found = []

    def clear(self) -> None:
        """Set all norms to 0."""
        self.forget_waiting()
        if not self._is_clear:
            for written, _ in self._buffers.values():
                written.zero_()
        self._is_clear = True

    def read(self) -> Tensor:
        """(count,) float64 on the result's device: the squared norms. The next call overwrites it."""
        self._total.zero_()
        self.add_to(self._total)
        return self._total

    def take(self) -> Tensor:
        """As `read`, and set all norms to 0."""
        self._write_found()
        written = self._buffers[self._device][0]
        if len(self._buffers) == 1 and recorded.can_record([written]):
            self._is_clear = True
            return self._take_squares(_take_squares, None, written)
        found = self.read()
        self.clear()
        return found

    def add_to(self, total: Tensor, times: int = 1) -> None:
        """Add `times` the squared norms to `total` (count,), float64 on the result's device (modified in place).

        A total in the same memory each time is added to by one launch.
        """
        self._write_found()
        for device, (written, _) in self._buffers.items():
            if device == self._device:
                self._add_squares(_add_squares, times, written, total)
            else:
                total.add_(_squares(None, written).to(self._device), alpha=times)


def _squares(_: None, written: Tensor) -> Tensor:
    """Of what is written: squared norms on the CPU, elsewhere norms."""
    return written.double() if written.is_cpu else written.double().square()


def _take_squares(_: None, written: Tensor) -> Tensor:
    found = _squares(None, written)
    written.zero_()
    return found


def _add_squares(times: int, written: Tensor, total: Tensor) -> tuple[()]:
    total.add_(_squares(None, written), alpha=times)
    return ()


@contextlib.contextmanager
def _on_stream(raw: int, tensor: Tensor) -> Iterator[list[Tensor]]:
    """Work on a stream, if it is not the present one, which then waits for it and may read what the list was given."""
    results: list[Tensor] = []
    if raw == _raw_stream(tensor):
        yield results
        return
    stream, present = torch.cuda.ExternalStream(raw, tensor.device), torch.cuda.current_stream(tensor.device)
    with torch.cuda.stream(stream):
        yield results
    present.wait_stream(stream)
    for result in results:  # its memory belongs to the other stream
        result.record_stream(present)


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
    batches: defaultdict[torch.dtype, list[tuple[int, Tensor]]] = defaultdict(list)
    for index, piece in pieces:
        if piece is None:
            continue
        if 0 < piece.numel() <= MOST_ELEMENTS and is_batched(piece):
            batches[piece.dtype].append((index, piece))
        else:
            into.write(index, piece)
    for batch in batches.values():
        into.write_batch(*zip(*batch, strict=True))
    return into.take()


def _require_dense(gradient: Tensor) -> None:
    if gradient.layout is not _DENSE:
        raise UnsupportedError(
            f"LENA: got a gradient of layout {gradient.layout}; only dense gradients are supported. "
            "Build the embedding with sparse=False."
        )


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
