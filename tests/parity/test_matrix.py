"""ZeRO stage x world size x accumulation x precision x clipping x base rule x layer.

Every three values together in the default run, every combination under the marker `full`.
"""

from __future__ import annotations

import pytest

from tests.helpers.case import Case
from tests.helpers.check import check
from tests.helpers.covering import Row, all_rows, covering

VALUES = {
    "stage": (0, 1, 2, 3),
    "world": (1, 2, 4),
    "accumulation": (1, 2, 4),
    "precision": ("fp32", "bf16", "bf16-fp32"),
    "clipping": (0.0, 0.5),  # gradients have a norm of 3 to 10 here
    "base": ("adamw", "sgd", "lars", "lamb"),
    "layer": ("tensor", "module", "block", "model"),
}


def exists(row: Row) -> bool:
    """DeepSpeed has no fp32 accumulation of bf16 gradients at stage 0."""
    return not (row["stage"] == 0 and row["precision"] == "bf16-fp32")


def cases(rows: list[Row]) -> list[Case]:
    return [Case(name="matrix-" + "-".join(str(value) for value in row.values()), **row) for row in rows]


TRIPLES = cases(covering(VALUES, exists, strength=3))
REST = [case for case in cases(all_rows(VALUES, exists)) if case not in TRIPLES]


@pytest.mark.parametrize("case", TRIPLES, ids=lambda case: case.name)
def test_every_triple(case, run_case):
    check(case, run_case)


@pytest.mark.full
@pytest.mark.parametrize("case", REST, ids=lambda case: case.name)
def test_every_combination(case, run_case):
    check(case, run_case)
