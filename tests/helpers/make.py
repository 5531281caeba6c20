"""Short ways to write lists of cases."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tests.helpers.case import Case, Window


def stages(which: Iterable[int], name: str, **fields: Any) -> list[Case]:
    """The same case at several ZeRO stages."""
    return [Case(name=f"{name}-zero{stage}", stage=stage, **fields) for stage in which]


def windows(*micros: int, **fields: Any) -> tuple[Window, ...]:
    """Windows with these numbers of micro-batches."""
    return tuple(Window(number, **fields) for number in micros)
