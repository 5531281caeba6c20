"""Where DeepSpeed puts parameters and how it averages gradients must not show in the result."""

from __future__ import annotations

import pytest

from tests.helpers.case import Case
from tests.helpers.check import check
from tests.helpers.make import stages
from tests.helpers.model import ModelOptions

ALL = (0, 1, 2, 3)
ZERO = (1, 2, 3)
REENTRANT, NON_REENTRANT = "reentrant", "non-reentrant"


def bf16(**options: bool) -> dict[str, dict[str, bool]]:
    """The entry "bf16" of a DeepSpeed config."""
    return {"bf16": {"enabled": True, **options}}


REDUCTION = [
    # Stage 1 with overlap_comm loses the gradient of a parameter that the last micro-batch does not use.
    *stages((1,), "overlap-comm", zero={"overlap_comm": True}, usage="always"),
    *stages((2, 3), "overlap-comm", zero={"overlap_comm": True}),
    *stages(ZERO, "no-contiguous-gradients", zero={"contiguous_gradients": False}),
    *stages(ZERO, "no-reduce-scatter", zero={"reduce_scatter": False}),
    *stages(ZERO, "small-buckets", zero={"reduce_bucket_size": 300, "allgather_bucket_size": 300}, world=4),
    *stages((1, 2), "one-bucket-per-rank", zero={"use_multi_rank_bucket_allreduce": False}),
    *stages((1, 2), "round-robin", zero={"round_robin_gradients": True}, world=4, clipping=0.5),
    *stages(ALL, "prescale", config={"prescale_gradients": True}, zero={"reduce_scatter": False}),
    *stages(ALL, "predivide", config={"gradient_predivide_factor": 2.0}, zero={"reduce_scatter": False}, world=4),
    *stages((1, 2), "no-gradient-norm", zero={"compute_grad_norm": False}),
    *stages(ZERO, "fp32-communication", config={"communication_data_type": "fp32"}, precision="bf16"),
]

PARTITIONED = {"stage3_param_persistence_threshold": 0}
SUB_GROUPS = {"sub_group_size": 500}
STAGE_3 = [
    Case("all-partitioned", stage=3, zero=PARTITIONED, world=4),
    Case("all-persistent", stage=3, zero={"stage3_param_persistence_threshold": 10**9}),
    Case("sub-groups", stage=3, zero=SUB_GROUPS, clipping=0.5),
    Case("sub-groups-bf16", stage=3, zero=SUB_GROUPS, precision="bf16", world=4),
    Case("memory-efficient-linear-bf16", stage=3, precision="bf16", zero={"memory_efficient_linear": True}),
    Case("zero-init", stage=3, zero_init=True, clipping=0.5),
    Case("zero-init-bf16", stage=3, zero_init=True, precision="bf16", world=4),
]

# ZeRO-3 keeps the gradient of an earlier window, or micro-batch, where a parameter gets none in this one.
STALE = [
    *stages(ALL, "unused-window", usage="every other window", clipping=0.5),
    *stages(ALL, "first-used-late", usage="later micro-batches"),
    Case("unused-window-partitioned", stage=3, usage="every other window", zero=PARTITIONED),
    Case("unused-window-sub-groups", stage=3, usage="every other window", zero=SUB_GROUPS, world=4),
    *stages(ALL, "unused-window-bf16", usage="every other window", precision="bf16"),
    *stages((1,), "unused-window-bf16-fp32", usage="every other window", precision="bf16-fp32"),
    Case("unused-window-one-rank", stage=3, usage="every other window", world=1, accumulation=4),
]

BF16 = [
    *stages((1,), "immediate-update", precision="bf16-fp32", config=bf16(immediate_grad_update=True), clipping=0.5),
    *stages((1,), "immediate-update-unused", precision="bf16-fp32", config=bf16(immediate_grad_update=True),
            usage="every other window"),
    *stages(ZERO, "no-overflow-check", precision="bf16", config=bf16(check_grad_overflow=False)),
    *stages(ALL, "checkpointing-bf16", precision="bf16", model=ModelOptions(checkpointing=REENTRANT)),
]  # fmt: skip

# At ZeRO 1-3 DeepSpeed itself needs ranks to agree on which parameters got a gradient.
DISAGREE = [
    *stages((0,), "ranks-disagree", usage="ranks disagree"),
    *stages((0,), "ranks-disagree-bf16", usage="ranks disagree", precision="bf16", clipping=0.5),
]

MODELS = [
    *stages(ALL, "checkpointing", model=ModelOptions(checkpointing=NON_REENTRANT)),
    *stages(ALL, "reentrant-checkpointing", model=ModelOptions(checkpointing=REENTRANT)),
    *stages(ALL, "shared-weight", model=ModelOptions(shared=True)),
    *stages((0, 1, 2), "compiled-model", compiled="model"),  # not with DeepSpeed's ZeRO-3
    *stages(ALL, "compiled-engine", compiled="engine"),
    # Rounding noise alone: the relative floor of the gain keeps it at 1 instead of n.
    *stages(ALL, "true-gradient-of-zero", model=ModelOptions(key_bias=True), base="sgd", world=4),
]


@pytest.mark.parametrize("case", REDUCTION + STAGE_3 + STALE + BF16 + DISAGREE + MODELS, ids=lambda case: case.name)
def test_layout_does_not_show(case, run_case):
    check(case, run_case)


# The norm of a gradient that comes in parts within one backward pass cannot be known.
IN_PARTS = ModelOptions(checkpointing=REENTRANT, shared=True)


@pytest.mark.parametrize(
    "case",
    [Case("in-parts-zero0", stage=0, model=IN_PARTS), Case("in-parts-plain", stage=None, world=1, model=IN_PARTS)],
    ids=lambda case: case.name,
)
def test_shared_weight_under_reentrant_checkpointing_is_refused(case, run_case):
    errors = run_case(case).errors
    assert len(errors) == case.world
    assert all("UnsupportedError" in text and "h.0.mix.weight" in text for text in errors.values())


@pytest.mark.parametrize(
    "case",
    [Case("in-parts-excluded", stage=0, model=IN_PARTS, lena={"exclude": ["h.0.mix.*"]})],
    ids=lambda case: case.name,
)
def test_excluding_that_weight_helps(case, run_case):
    check(case, run_case)
