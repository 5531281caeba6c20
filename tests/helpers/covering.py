"""A small set of combinations in which every pair, or triple, of values occurs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Row = dict[str, Any]


def all_rows(values: Mapping[str, Sequence[Any]], valid: Callable[[Row], bool]) -> list[Row]:
    """The full product without what `valid` refuses."""
    rows = (dict(zip(values, row, strict=True)) for row in product(*values.values()))
    return [row for row in rows if valid(row)]


def covering(values: Mapping[str, Sequence[Any]], valid: Callable[[Row], bool], strength: int) -> list[Row]:
    """Rows in which any `strength` values that can occur together do so.

    Greedy and deterministic: always the row that brings the most of them.
    """
    rows = all_rows(values, valid)
    held = [set(combinations(row.items(), strength)) for row in rows]
    missing = set().union(*held)
    chosen = []
    while missing:
        best = max(range(len(rows)), key=lambda index: len(held[index] & missing))
        missing -= held[best]
        chosen.append(rows[best])
    return chosen
