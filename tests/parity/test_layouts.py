"""Where DeepSpeed puts parameters and how it averages gradients must not show in the result."""

from __future__ import annotations

import pytest

from tests.helpers.case import Case
from tests.helpers.check import check
from tests.helpers.make import stages
from tests.helpers.marks import full
from tests.helpers.model import ModelOptions

SMALL_BUCKETS = {"reduce_bucket_size": 300, "allgather_bucket_size": 300}
REENTRANT, NON_REENTRANT, BY_DEEPSPEED = "reentrant", "non-reentrant", "deepspeed"


def bf16(**options: bool) -> dict[str, dict[str, bool]]:
    """The entry "bf16" of a DeepSpeed config."""
    return {"bf16": {"enabled": True, **options}}


REDUCTION = [
    # Stage 1 with overlap_comm loses the gradient of a parameter that the last micro-batch does not use.
    *stages((), "overlap-comm", full_at=(1,), zero={"overlap_comm": True}, usage="always"),
    *stages((2, 3), "overlap-comm", zero={"overlap_comm": True}),
    *stages((2, 3), "no-contiguous-gradients", full_at=(1,), zero={"contiguous_gradients": False}),
    *stages((2, 3), "no-reduce-scatter", full_at=(1,), zero={"reduce_scatter": False}),
    *stages((2, 3), "small-buckets", full_at=(1,), zero=SMALL_BUCKETS),
    *stages((2,), "one-bucket-per-rank", full_at=(1,), zero={"use_multi_rank_bucket_allreduce": False}),
    *stages((2,), "round-robin", full_at=(1,), zero={"round_robin_gradients": True}, world=4, clipping=0.5),
    *stages((0, 2, 3), "prescale", full_at=(1,), config={"prescale_gradients": True}, zero={"reduce_scatter": False}),
    *stages((0, 2, 3), "predivide", full_at=(1,), config={"gradient_predivide_factor": 2.0},
            zero={"reduce_scatter": False}, world=4),
    *stages((2,), "no-gradient-norm", full_at=(1,), zero={"compute_grad_norm": False}),
    *stages((2, 3), "fp32-communication", full_at=(1,), config={"communication_data_type": "fp32"}, precision="bf16"),
    *stages((0, 2), "bf16-communication", full_at=(1, 3), config={"communication_data_type": "bf16"}),
    *stages((1,), "alignment", full_at=(2,), zero={"parameter_alignment": True}),
    *stages((2,), "alignment-bf16", full_at=(1,), zero={"parameter_alignment": True}, precision="bf16"),
    *stages((2,), "all-reduced-weights", full_at=(1,), zero={"allgather_partitions": False}),
]  # fmt: skip

PARTITIONED = {"stage3_param_persistence_threshold": 0}
SUB_GROUPS = {"sub_group_size": 100}  # the first one ends before `sometimes`
FETCHED_OTHERWISE = {
    "stage3_use_all_reduce_for_fetch_params": True,
    "stage3_allgather_sequential": True,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "override_module_apply": False,
}
HPZ = {"zero_hpz_partition_size": 2}
STAGE_3 = [
    Case("all-partitioned", stage=3, zero=PARTITIONED, world=4),
    Case("all-persistent", stage=3, zero={"stage3_param_persistence_threshold": 10**9}),
    Case("sub-groups", stage=3, zero=SUB_GROUPS, clipping=0.5),
    Case("memory-efficient-linear-bf16", stage=3, precision="bf16", zero={"memory_efficient_linear": True}),
    Case("weights-fetched-otherwise", stage=3, zero=FETCHED_OTHERWISE),
    Case("leaf-by-size", stage=3, zero={"stage3_module_granularity_threshold": 300}),  # both `Attention` then are one
    Case("zero-init", stage=3, zero_init=True, clipping=0.5),
    Case("hpz", stage=3, zero=HPZ, clipping=0.5),
    Case("hpz-four-ranks", stage=3, zero=HPZ | PARTITIONED, world=4),
    *full(
        [
            Case("sub-groups-bf16", stage=3, zero=SUB_GROUPS, precision="bf16", world=4),
            Case("zero-init-bf16", stage=3, zero_init=True, precision="bf16", world=4),
        ]
    ),
]

# ZeRO-3 keeps the gradient of an earlier window, or micro-batch, where a parameter gets none in this one.
UNUSED = "every other window"
BIAS = ModelOptions(bias=True)  # two parameters that come and go
STALE = [
    *stages((0, 2, 3), "unused-window", full_at=(1,), usage=UNUSED, model=BIAS, clipping=0.5),
    *stages((1, 3), "first-used-late", full_at=(0, 2), usage="later micro-batches", model=BIAS),
    Case("unused-window-sub-groups", stage=3, usage=UNUSED, model=BIAS, zero=SUB_GROUPS, world=4),
    *stages((0, 3), "unused-window-bf16", full_at=(1, 2), usage=UNUSED, precision="bf16"),
    *stages((1,), "unused-window-bf16-fp32", usage=UNUSED, precision="bf16-fp32"),
    *full(
        [
            Case("unused-window-partitioned", stage=3, usage=UNUSED, zero=PARTITIONED),
            Case("unused-window-one-rank", stage=3, usage=UNUSED, world=1, accumulation=4),
        ]
    ),
]

IMMEDIATE = bf16(immediate_grad_update=True)
BF16 = [
    *stages((1,), "immediate-update", precision="bf16-fp32", config=IMMEDIATE, clipping=0.5),
    *stages((1,), "immediate-update-unused", precision="bf16-fp32", config=IMMEDIATE, usage=UNUSED),
    *stages((1, 3), "no-overflow-check", full_at=(2,), precision="bf16", config=bf16(check_grad_overflow=False)),
    *stages((3,), "checkpointing-bf16", full_at=(0, 1, 2), precision="bf16",
            model=ModelOptions(checkpointing=REENTRANT)),
]  # fmt: skip

AUTOCAST = stages((0, 1, 3), "autocast", full_at=(2,), precision="autocast")

# At ZeRO 1-3 DeepSpeed itself needs ranks to agree on which parameters got a gradient.
DISAGREE = [
    *stages((0,), "ranks-disagree", usage="ranks disagree"),
    *stages((0,), "ranks-disagree-bf16", usage="ranks disagree", precision="bf16", clipping=0.5),
]

MODELS = [
    *stages((1, 3), "hybrid-engine", full_at=(0, 2), config={"hybrid_engine": {"enabled": True}}),
    *stages((2,), "checkpointing-by-deepspeed", full_at=(0, 1, 3), model=ModelOptions(checkpointing=BY_DEEPSPEED)),
    *stages((3,), "checkpointing", full_at=(0, 1, 2), model=ModelOptions(checkpointing=NON_REENTRANT)),
    *stages((0, 3), "reentrant-checkpointing", full_at=(1, 2), model=ModelOptions(checkpointing=REENTRANT)),
    *stages((1, 3), "shared-weight", full_at=(0, 2), model=ModelOptions(shared=True)),
    *stages((1,), "compiled-model", full_at=(0, 2), compiled="model"),  # not with DeepSpeed's ZeRO-3
    *stages((3,), "compiled-engine", full_at=(0, 1, 2), compiled="engine"),
    # Rounding noise alone: the relative floor of the gain keeps it at 1 instead of n.
    *stages(
        (3,), "true-gradient-of-zero", full_at=(0, 1, 2), model=ModelOptions(key_bias=True), base="sgd", accumulation=4
    ),
]


@pytest.mark.parametrize(
    "case", REDUCTION + STAGE_3 + STALE + BF16 + AUTOCAST + DISAGREE + MODELS, ids=lambda case: case.name
)
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
