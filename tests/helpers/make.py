"""Short ways to write lists of cases."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from tests.helpers.case import Case, Window

Cases = list[Any]
"""Of `Case`, or of what `full` makes of one."""


def stages(which: Iterable[int], name: str, full_at: Iterable[int] = (), **fields: Any) -> Cases:
    """The same case at several ZeRO stages: those of `full_at` are left out of the default run, see `full`."""

    def at(stage: int) -> Case:
        return Case(name=f"{name}-zero{stage}", stage=stage, **fields)

    return [*map(at, which), *full(*map(at, full_at))]


def full(*cases: Case) -> Cases:
    """Cases that the default run leaves out: every fault that they are known to show is shown by another case there."""
    return [pytest.param(case, marks=pytest.mark.full) for case in cases]


def windows(*micros: int, **fields: Any) -> tuple[Window, ...]:
    """Windows with these numbers of micro-batches."""
    return tuple(Window(number, **fields) for number in micros)
