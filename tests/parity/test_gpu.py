"""On a GPU, by one NCCL rank: every ZeRO stage and base rule in fp32 and bf16, LENA's statistics included.

In bf16 the reference takes its gradients from a bf16 copy on the same GPU. A copy on the CPU has other kernels, which
round differently: how far a run ends from that reference is recorded too, beside torch's own AdamW in the same layout.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.helpers.case import RULE_KEYS, Case
from tests.helpers.check import reference
from tests.helpers.compare import assert_same_run, displacement_error, share_of_path
from tests.helpers.launch import Outcome
from tests.helpers.make import stages

DEVICE = os.environ.get("TEST_DEVICE", "cuda")  # "cpu": tries the tests themselves
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU that CUDA sees")

ALL = range(4)
ON = {"world": 1, "device": DEVICE, "clipping": 0.5}
FIXED: dict[str, Any] = ON | {"precision": "bf16", "usage": "always"}  # what stock rules need, see test_stock.py
CASES: Sequence[Case] = [
    *(Case(name=f"gpu-plain-{base}", stage=None, base=base, **ON) for base in RULE_KEYS),
    *(case for base in RULE_KEYS for case in stages(ALL, f"gpu-fp32-{base}", base=base, **ON)),
    *(case for base in RULE_KEYS for case in stages(ALL, f"gpu-bf16-{base}", base=base, precision="bf16", **ON)),
    *stages((1, 2, 3), "gpu-bf16-fp32-adamw", precision="bf16-fp32", **ON),
    *stages((1, 2, 3), "gpu-bf16-factor1-adamw", lena={"scaling": "none", "warmup": "none"}, **FIXED),
    *stages((1, 2, 3), "gpu-bf16-stock-adamw", optimizer="stock", **FIXED),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_on_a_gpu(
    case: Case, run_case: Callable[[Case], Outcome], record_property: Callable[[str, object], None]
) -> None:
    results = run_case(case).on_every_rank()
    there, on_cpu = reference(case), reference(replace(case, device="cpu"))
    params = results[0]["params"]
    record_property("share of path", share_of_path(params, there))
    record_property("displacement error", displacement_error(params, there))
    record_property("displacement error, copy on the CPU", displacement_error(params, on_cpu))
    record_property("between the references", displacement_error(there[-1].params, on_cpu))
    assert_same_run(case, results, there)
