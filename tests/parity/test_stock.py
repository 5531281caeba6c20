"""The suite's own scale: torch's rules under DeepSpeed, against the same float64 reference.

These pass without LENA. When they fail, the harness or DeepSpeed is at fault; their distances are what the
tolerances of the other files are made from.
"""

from __future__ import annotations

import pytest

from tests.helpers.check import check
from tests.helpers.make import stages

# Stock optimizers are stepped with stale gradients at ZeRO-3 where a parameter is not always used, and once with
# zeros at stage 0 in bf16 while the engine is built: both stay out.
CASES = [
    *stages((2,), "stock", full_at=(0, 1), optimizer="stock", clipping=0.5),
    *stages((3,), "stock", optimizer="stock", usage="always", clipping=0.5),
    *stages((1,), "stock-bf16", full_at=(2,), optimizer="stock", precision="bf16"),
    *stages((1,), "stock-bf16-fp32", optimizer="stock", precision="bf16-fp32"),
    *stages((), "stock-bf16", full_at=(3,), optimizer="stock", precision="bf16", usage="always"),
    *stages((2,), "stock-sgd", optimizer="stock", base="sgd", schedule="decaying"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_stock_rule(case, run_case):
    check(case, run_case)
