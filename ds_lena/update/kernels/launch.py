"""Starts a kernel over the tensors of a group, where Triton runs. Elsewhere the rules' loops do the same."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable, Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..rules.common import Group, Kernel
from .table import BLOCK, Piece, Table

logger = logging.getLogger("ds_lena")

MOST_TABLES = 4096
"""Tables that are kept. ZeRO-3 needs one for each sub-group; another one each time other parameters get a gradient."""


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on this device. The first time, a reason why not is logged."""
    return device.type == "cuda" and programs() is not None


@functools.cache
def programs() -> ModuleType | None:
    """The module with the kernels. None without Triton."""
    try:
        from . import programs
    except ImportError as error:
        _tell(error)
        return None
    return programs


@functools.cache
def _tell(reason: object) -> None:
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
        self._has_run = self._is_refused = False

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
        module = programs()
        by_types: dict[tuple[torch.dtype, ...], list[int]] = {}
        for number, row in enumerate(rows):
            if row:
                types = tuple(row[0].dtype if tensor is None else tensor.dtype for tensor in row[:-1])  # type: ignore[union-attr]
                by_types.setdefault(types, []).append(number)
        left: list[int] = []
        for types, numbers_of_rows in by_types.items():
            if module is None or self._is_refused or not all(dtype in module.TYPES for dtype in types):
                left += numbers_of_rows
                continue
            chosen = set(numbers_of_rows)
            none = [None] * (len(types) + 1)
            addresses = table.addresses([row if i in chosen else none for i, row in enumerate(rows)])
            narrow = [module.TYPES[dtype] for dtype in (*types, types[0])]
            try:
                with torch.cuda.device_of(table.chunks):
                    getattr(module, self._kernel.name)[(len(table.chunks),)](
                        table.chunks,
                        addresses,
                        *vectors,
                        weight_decay=group["weight_decay"],
                        **self._kernel.numbers(group),
                        **numbers,
                        WEIGHT=narrow[0],
                        GRADIENT=narrow[1],
                        BUFFER=narrow[2],
                        BLOCK=BLOCK,
                    )
            except Exception as error:  # of Triton's compiler, or of the driver: nothing has moved
                if self._has_run:
                    raise
                _tell(error)
                self._is_refused = True
                left += numbers_of_rows
        self._has_run = True
        return sorted(left)
