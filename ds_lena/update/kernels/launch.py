"""Starts a kernel over the tensors of a group, where Triton runs. Elsewhere the rules' loops do the same."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..rules.common import Group, Kernel
from .table import BLOCK, Piece, Table

logger = logging.getLogger("ds_lena")

MOST_TABLES = 4096
"""Tables that are kept: one for each group, or sub-group of ZeRO-3."""

Types = tuple[torch.dtype, torch.dtype, torch.dtype]
"""Of a parameter, its gradient, and its buffers."""


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on this device. The first time, a reason why not is logged."""
    return device.type == "cuda" and programs() is not None


@functools.cache
def programs() -> ModuleType | None:
    """The module with the kernels. None without Triton."""
    try:
        from . import programs
    except ImportError as error:
        _tell(str(error))
        return None
    return programs


@functools.cache
def _tell(reason: str) -> None:
    logger.warning(
        "LENA: no Triton kernel: %s. LENA moves one tensor after the other, which is slower where there are many small "
        "ones. Install the Triton that belongs to this torch.",
        reason,
    )


class Launcher:
    """One kernel, and the tables of what it has run over."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._tables: dict[Hashable, Table] = {}
        self._has_run: set[Types] = set()
        self._refused: set[Types] = set()

    def table(self, key: Hashable, pieces: Callable[[], Iterable[Piece]], device: torch.device) -> Table:
        """The table of `pieces()`, which is made once for each key and device."""
        key = key, device
        if key not in self._tables:
            if len(self._tables) >= MOST_TABLES:
                self._tables.clear()
            self._tables[key] = Table(pieces(), device)
        return self._tables[key]

    def launch(
        self,
        table: Table,
        rows: Sequence[Sequence[Tensor | None]],
        group: Group,
        *vectors: Tensor | None,
        **numbers: Any,
    ) -> list[int]:
        """Run the kernel over the table, once for each combination of types. Returns the rows that it cannot do.

        `rows`: for each tensor of the table the parameter, its gradient, its buffers and its count of updates; no
        tensors for one that takes no part. `vectors`, `numbers`: the kernel's further arguments.
        """
        by_types: dict[Types | None, list[int]] = {}
        for number, row in enumerate(rows):
            if row:
                by_types.setdefault(_types(row, table.chunks.device), []).append(number)
        left = by_types.pop(None, [])
        for types, chosen in by_types.items():
            assert types is not None
            if types in self._refused:
                left += chosen
                continue
            taking = set(chosen)
            none = [None] * max(map(len, rows))
            addresses = table.addresses([row if i in taking else none for i, row in enumerate(rows)])
            try:
                self._run(table, addresses, types, vectors, dict(self._kernel.numbers(group), **numbers), group)
            except Exception as error:  # of Triton's compiler, or of the driver: nothing has moved
                if types in self._has_run:
                    raise
                _tell(str(error))
                self._refused.add(types)
                left += chosen
            else:
                self._has_run.add(types)
        return sorted(left)

    def _run(
        self,
        table: Table,
        addresses: Tensor,
        types: Types,
        vectors: Sequence[Tensor | None],
        numbers: Mapping[str, Any],
        group: Group,
    ) -> None:
        module = programs()
        assert module is not None
        weight, gradient, buffer = (module.TYPES[dtype] for dtype in types)
        with torch.cuda.device_of(table.chunks):
            getattr(module, self._kernel.name)[(len(table.chunks),)](
                table.chunks,
                addresses,
                *vectors,
                weight_decay=group["weight_decay"],
                **numbers,
                WEIGHT=weight,
                GRADIENT=gradient,
                BUFFER=buffer,
                BLOCK=BLOCK,
            )


def _types(row: Sequence[Tensor | None], device: torch.device) -> Types | None:
    """The types of a parameter, its gradient and its buffers. None if the kernels cannot move such a tensor."""
    weight, gradient, *buffers, step = row
    assert weight is not None and step is not None
    given = weight.dtype if gradient is None else gradient.dtype
    kept = {buffer.dtype for buffer in buffers if buffer is not None} or {weight.dtype}
    known = getattr(programs(), "TYPES", {})
    is_there = all(tensor is None or tensor.device == device for tensor in row)
    if not is_there or step.dtype != torch.float32 or len(kept) > 1 or not known.keys() >= {weight.dtype, given, *kept}:
        return None
    return weight.dtype, given, kept.pop()
