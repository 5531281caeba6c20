"""ZeRO stage x world size x accumulation x precision x clipping x base rule x layer.

Every two values together in the default run, every combination under the marker `full`. An update of one micro-gradient
measures nothing: in the default run `test_keys.py` has it alone.
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


ALL = {tuple(row.values()): case(row) for row in all_rows(VALUES, exists)}
PAIRS = [ALL.pop(tuple(row.values())) for row in covering(VALUES, measures, strength=2)]


@pytest.mark.parametrize("case", PAIRS + full(ALL.values()), ids=lambda case: case.name)
def test_every_combination(case, run_case):
    check(case, run_case)
