"""A small set of combinations in which every pair of values occurs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Row = dict[str, Any]


def all_rows(values: Mapping[str, Sequence[Any]], valid: Callable[[Row], bool]) -> list[Row]:
    """The full product without what `valid` refuses."""
    rows = (dict(zip(values, row, strict=True)) for row in product(*values.values()))
    return [row for row in rows if valid(row)]


def pairwise(values: Mapping[str, Sequence[Any]], valid: Callable[[Row], bool]) -> list[Row]:
    """Greedy and deterministic: always the row with the most pairs that no row before it has."""
    rows = all_rows(values, valid)
    pairs = [_pairs(row) for row in rows]
    missing = set().union(*pairs)
    chosen = []
    while missing:
        best = max(range(len(rows)), key=lambda index: len(pairs[index] & missing))
        missing -= pairs[best]
        chosen.append(rows[best])
    return chosen


def _pairs(row: Row) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    return set(combinations(row.items(), 2))
