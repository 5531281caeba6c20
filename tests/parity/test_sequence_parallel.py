"""Ranks that share a micro-batch: Ulysses by DeepSpeed's mpu, in a model of one's own and in HF's."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.case import Case
from tests.helpers.check import check
from tests.helpers.make import Cases, stages

# A bias of keys has a true gradient of zero, and Adam would walk it at random.
EPS = {"fp32": {"eps": 1e-4}, "bf16": {"eps": 0.1}, "bf16-fp32": {"eps": 0.1}, "fp16": {"eps": 0.1}}


def shared(which: tuple[int, ...], model: str, name: str = "", full_at: tuple[int, ...] = (), **fields: Any) -> Cases:
    eps = EPS[fields.get("precision", "fp32")] if fields.get("base", "adamw") in ("adamw", "lamb") else {}
    fields = {"groups": "flat", "sequence": 2, "clipping": 0.5} | fields
    return stages(which, f"{model}{name}", full_at, split=model, lena=eps | fields.pop("lena", {}), **fields)


IN_BF16 = {"seq_parallel_communication_data_type": "bf16"}
GPT, LLAMA = "ulysses-gpt", "ulysses-llama"
TWO_RANKS = [
    *shared((0, 1, 2, 3), GPT),
    *shared((2,), GPT, "-once", accumulation=1, lena={"smoothing": 0.5}, full_at=(0, 1, 3)),
    *shared((), GPT, "-four-times", accumulation=4, full_at=(0, 1, 2, 3)),
    *shared((3,), GPT, "-lamb", base="lamb", full_at=(0, 1, 2)),
    *shared((), GPT, "-lars", base="lars", clipping=0.0, full_at=(0, 1, 2, 3)),
    *shared((1,), GPT, "-sgd-module", base="sgd", layer="module", full_at=(0, 2, 3)),
    *shared((), GPT, "-block", layer="block", full_at=(1,)),
    *shared((), GPT, "-model", layer="model", full_at=(2,)),
    *shared((0, 2), GPT, "-bf16", precision="bf16", full_at=(1, 3)),
    *shared((), GPT, "-bf16-not-clipped", precision="bf16", clipping=0.0, full_at=(0,)),
    *shared((2,), GPT, "-bf16-fp32", precision="bf16-fp32", full_at=(3,)),
    *shared((2,), GPT, "-fp16", precision="fp16", full_at=(1, 3)),
    *shared((), GPT, "-bf16-sums", precision="bf16", config=IN_BF16, full_at=(1, 2, 3)),
    *shared((), GPT, "-client", optimizer="client", schedule="decaying", full_at=(2,)),
    *shared((), GPT, "-offload", zero={"offload_optimizer": {"device": "cpu"}}, full_at=(2, 3)),
    *shared((), GPT, "-not-scattered", zero={"reduce_scatter": False}, full_at=(1, 2)),
    *shared((), "ulysses-gpt-tied", full_at=(0, 1, 2, 3)),
    *shared((2,), "ulysses-gpt-whole-loss", full_at=(0, 1, 3)),
    *shared((0,), "ulysses-gpt-one-head"),
    *shared((1, 3), LLAMA, full_at=(0, 2)),
    *shared((), LLAMA, "-bf16", precision="bf16", full_at=(1, 3)),
]
FOUR_RANKS = [
    *shared((3,), GPT, "-4", world=4, full_at=(0, 1, 2)),
    *shared((), GPT, "-4-lamb", world=4, base="lamb", full_at=(0, 1, 2, 3)),
    *shared((), GPT, "-4-bf16", world=4, precision="bf16", full_at=(0, 3)),
    *shared((), GPT, "-sp4", world=4, sequence=4, full_at=(0, 2, 3)),
    *shared((), LLAMA, "-4", world=4, full_at=(0, 1, 2, 3)),
]


@pytest.mark.parametrize("case", TWO_RANKS + FOUR_RANKS, ids=lambda case: case.name)
def test_ranks_that_share_a_micro_batch_do_not_show(case: Case, run_case: Any) -> None:
    check(case, run_case)
