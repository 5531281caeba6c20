"""ZeRO stage x world size x accumulation x precision x clipping x base rule x layer.

Every two values together in the default run, every four under the marker `full`, a quarter of all combinations. An
update of one micro-gradient measures nothing: in the default run `test_keys.py` has it alone.
"""

from __future__ import annotations

import pytest

from tests.helpers.case import Case
from tests.helpers.check import check
from tests.helpers.covering import Row, all_rows, covering
from tests.helpers.marks import full

VALUES = {
    "stage": (0, 1, 2, 3),
    "world": (2, 1, 4),
    "accumulation": (2, 1, 4),
    "precision": ("fp32", "bf16", "bf16-fp32"),
    "clipping": (0.0, 0.5),  # gradients have a norm of 3 to 10 here
    "base": ("adamw", "sgd", "lars", "lamb"),
    "layer": ("tensor", "module", "block", "model"),
}


def exists(row: Row) -> bool:
    """DeepSpeed has no fp32 accumulation of bf16 gradients at stage 0."""
    return not (row["stage"] == 0 and row["precision"] == "bf16-fp32")


def measures(row: Row) -> bool:
    return exists(row) and row["world"] * row["accumulation"] > 1


def case(row: Row) -> Case:
    return Case(name="matrix-" + "-".join(str(value) for value in row.values()), **row)


def is_in_quarter(row: Row) -> bool:
    """Three axes have four values each, so that whatever four values are asked for, the others can make up the sum."""
    return sum(values.index(row[name]) for name, values in VALUES.items()) % 4 == 0


PAIRS = covering(VALUES, measures, strength=2)
QUARTER = [row for row in all_rows(VALUES, exists) if is_in_quarter(row) and row not in PAIRS]


@pytest.mark.parametrize("case", [*map(case, PAIRS), *full(map(case, QUARTER))], ids=lambda case: case.name)
def test_every_combination(case, run_case):
    check(case, run_case)
