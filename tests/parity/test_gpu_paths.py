"""The paths that an update takes on a GPU, on the CPU: gradients wait until their norms are taken in a batch.

Meanwhile nobody may change them. Where a wrapper does, their norms are taken at once.
"""

from __future__ import annotations

import pytest

from tests.helpers.case import Case
from tests.helpers.check import check
from tests.helpers.make import stages
from tests.helpers.model import ModelOptions

SMALL_BUCKETS = {"reduce_bucket_size": 300, "allgather_bucket_size": 300}  # most tensors are larger than a bucket
IMMEDIATE = {"bf16": {"enabled": True, "immediate_grad_update": True}}
USED = {"usage": "always", "model": ModelOptions(spare=False)}
ON = {"as_on_a_gpu": True, "clipping": 0.5}
CASES = [
    *stages((0, 1, 2, 3), "gpu-paths", full_at=(), **ON),
    *stages((2,), "gpu-paths-lamb", full_at=(0, 1, 3), base="lamb", **ON),
    *stages((2, 3), "gpu-paths-small-buckets", full_at=(1,), zero=SMALL_BUCKETS, **ON),
    *stages((2,), "gpu-paths-overlap", full_at=(3,), zero={"overlap_comm": True}, **ON),
    *stages((2,), "gpu-paths-not-contiguous", full_at=(1, 3), zero={"contiguous_gradients": False}, **ON),
    *stages((3,), "gpu-paths-bf16", full_at=(0, 1, 2), precision="bf16", **ON),
    *stages((1,), "gpu-paths-immediate", precision="bf16-fp32", config=IMMEDIATE, **ON),
    *stages((1,), "gpu-paths-bf16-fp32", full_at=(2, 3), precision="bf16-fp32", **ON),
    *stages((2,), "gpu-paths-fp16", full_at=(1, 3), precision="fp16", **ON),
    *stages((3,), "gpu-paths-checkpointing", model=ModelOptions(checkpointing="reentrant"), **ON),
    *stages((2,), "gpu-paths-torch-backward", full_at=(1, 3), loop="torch backward", **ON),
    *stages((2,), "gpu-paths-offload", full_at=(3,), zero={"offload_optimizer": {"device": "cpu"}}, **ON),
    Case("gpu-paths-ddp", stage=None, as_on_a_gpu=True, config={"gradient_as_bucket_view": True}),
    Case("gpu-paths-ddp-static", stage=None, as_on_a_gpu=True, config={"static_graph": True}, **USED),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_gpus_paths(case, run_case):
    check(case, run_case)
