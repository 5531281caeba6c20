"""Tensors that are split over ranks: Megatron-core's GPT with its mpu, and HF models that AutoTP splits."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.case import Case
from tests.helpers.check import check
from tests.helpers.make import Cases, stages

# A bias of keys has a true gradient of zero, and Adam would walk it at random.
EPS = {"fp32": {"eps": 1e-4}, "bf16": {"eps": 0.1}, "bf16-fp32": {"eps": 0.1}}


def split(which: tuple[int, ...], model: str, name: str = "", full_at: tuple[int, ...] = (), **fields: Any) -> Cases:
    eps = EPS[fields.get("precision", "fp32")] if fields.get("base", "adamw") in ("adamw", "lamb") else {}
    lena = eps | fields.pop("lena", {})
    fields = {"groups": "flat", "tensor": 2, "clipping": 0.5} | fields
    return stages(which, f"{model}{name}", full_at, split=model, lena=lena, **fields)


MEGATRON = [
    *split((0, 2, 3), "megatron", full_at=(1,)),
    *split((3,), "megatron", "-lamb", base="lamb", full_at=(0, 1, 2)),
    *split((2,), "megatron", "-lars", base="lars", full_at=(0, 1, 3)),
    *split((2,), "megatron", "-sgd-module", base="sgd", layer="module", full_at=(0, 1, 3)),
    *split((1,), "megatron", "-block", layer="block", full_at=(0, 2, 3)),
    *split((3,), "megatron", "-model", layer="model", clipping=0.0, full_at=(0, 1, 2)),
    *split((1,), "megatron", "-accumulated", accumulation=4, full_at=(0, 2, 3)),
    *split((3,), "megatron", "-bf16", precision="bf16", full_at=(1, 2)),
    *split((0,), "megatron", "-bf16-not-clipped", precision="bf16", clipping=0.0),
    *split((1,), "megatron", "-bf16-fp32", precision="bf16-fp32", full_at=(2, 3)),
    *split((1,), "megatron-tied", full_at=(0, 2, 3)),
    *split((3,), "megatron-sequence", full_at=(0, 1, 2)),
    *split((2,), "megatron-sequence", "-lamb", base="lamb", full_at=(0, 1, 3)),
    *split((1,), "megatron-head-norms", full_at=(0, 2, 3)),
    *split((1,), "megatron", "-client", optimizer="client", schedule="decaying"),
]
MEGATRON_4 = [
    *split((3,), "megatron", "-4", world=4, full_at=(0, 1, 2)),
    *split((2,), "megatron-sequence", "-4", world=4, base="lamb", full_at=(0, 1, 3)),
    *split((), "megatron", "-tp4", world=4, tensor=4, full_at=(0, 1, 2, 3)),
]
AUTOTP = [
    *split((0, 3), "autotp-llama", full_at=(1, 2)),
    *split((1,), "autotp-llama-uneven", full_at=(0, 2, 3)),
    *split((3,), "autotp-qwen3", full_at=(0, 1, 2)),
    *split((2,), "autotp-llama", "-lamb", base="lamb", full_at=(0, 1, 3)),
    *split((1,), "autotp-llama", "-bf16", precision="bf16"),
    *split((1,), "autotp-llama", "-4", world=4, full_at=(0, 2, 3)),
]


@pytest.mark.parametrize("case", MEGATRON + MEGATRON_4 + AUTOTP, ids=lambda case: case.name)
def test_whole_tensors_are_measured(case: Case, run_case: Any) -> None:
    check(case, run_case)
