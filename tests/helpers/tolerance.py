"""How closely a run must agree with the float64 reference, per kind of arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from tests.helpers.case import Case


@dataclass(frozen=True)
class Tolerance:
    """Relative bounds. `path` is a share of the way a tensor has moved, summed over updates.

    `rounding`: of a weight in its type of number, allowed once per update.
    """

    gain: float
    report: float
    path: float
    rounding: float = 2**-24


FP32 = Tolerance(gain=1e-5, report=2e-5, path=1e-4)
# bf16: two to four times what the suite shows; stock rules end as far away (test_stock.py).
BF16 = Tolerance(gain=2e-2, report=4e-2, path=4e-2)
# fp16: likewise, two to three times.
FP16 = Tolerance(gain=6e-3, report=1e-2, path=6e-3)
BF16_OTHER_LINEAR = Tolerance(gain=4e-2, report=6e-2, path=6e-2)


def tolerance(case: Case) -> Tolerance:
    if case.precision == "fp32" and case.config.get("communication_data_type") != "bf16":
        return FP32
    if case.precision == "fp16":
        return FP16
    return BF16_OTHER_LINEAR if case.zero.get("memory_efficient_linear") else BF16
