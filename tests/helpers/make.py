"""Short ways to write lists of cases."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tests.helpers.case import Case, Window
from tests.helpers.marks import full

Cases = list[Any]
"""Of `Case`, or of a `Case` with a mark."""


def stages(which: Iterable[int], name: str, full_at: Iterable[int] = (), **fields: Any) -> Cases:
    """The same case at several ZeRO stages: those of `full_at` are left out of the default run, see `marks.py`."""

    def at(stage: int) -> Case:
        return Case(name=f"{name}-zero{stage}", stage=stage, **fields)

    return [*map(at, which), *full(map(at, full_at))]


def windows(*micros: int, **fields: Any) -> tuple[Window, ...]:
    """Windows with these numbers of micro-batches."""
    return tuple(Window(number, **fields) for number in micros)
