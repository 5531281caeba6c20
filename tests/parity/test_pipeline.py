"""Layers that are spread over the stages of a pipeline."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.case import Case
from tests.helpers.check import check
from tests.helpers.make import Cases, stages

LARGER_EPS = {"eps": 1e-4}  # of a key's weight the gradient is small, and rounded in fp16


def piped(which: tuple[int, ...], model: str, name: str = "", full_at: tuple[int, ...] = (), **fields: Any) -> Cases:
    fields = {"groups": "flat", "pipe": 2, "accumulation": 4} | fields
    return stages(which, f"{model}{name}", full_at, split=model, **fields)


TWO_RANKS = [
    *piped((0, 1), "pipeline"),
    *piped((0, 1), "pipeline-tied"),
    *piped((1,), "pipeline-tied", "-clipped", clipping=0.5),
    *piped((1,), "pipeline-tied", "-lamb", base="lamb", clipping=0.5),
    *piped((), "pipeline", "-lars", base="lars", full_at=(0, 1)),
    *piped((1,), "pipeline", "-sgd-module", base="sgd", layer="module", full_at=(0,)),
    *piped((), "pipeline-tied", "-model", layer="model", full_at=(0, 1)),
    *piped((1,), "pipeline-tied", "-once", accumulation=1, lena={"smoothing": 0.5}, full_at=(0,)),
    *piped((1,), "pipeline-tied", "-bf16", precision="bf16"),
    *piped((1,), "pipeline-tied", "-bf16-fp32", precision="bf16-fp32"),
    *piped((), "pipeline-tied", "-fp16", precision="fp16", lena=LARGER_EPS, clipping=0.5, full_at=(1,)),
]
FOUR_RANKS = [
    *piped((1,), "pipeline-tied", "-4", world=4, clipping=0.5),
    *piped((), "pipeline-tied", "-4", world=4, full_at=(0,)),
    *piped((0,), "pipeline", "-4-stages", world=4, pipe=4, full_at=(1,)),
]

IN_PARTS = [  # the layers of each stage are split over two tensor-parallel ranks
    *piped((0,), "pipeline-tied", "-tp2", world=4, tensor=2, full_at=(1,)),
    *piped((1,), "pipeline-tied", "-tp2-lamb", world=4, tensor=2, base="lamb", clipping=0.5),
    *piped((1,), "pipeline-tied", "-tp2-bf16-fp32", world=4, tensor=2, precision="bf16-fp32", clipping=0.5),
    *piped((), "pipeline", "-tp2-clipped", world=4, tensor=2, clipping=0.5, full_at=(1,)),
    *piped((), "pipeline-tied", "-tp2-lars", world=4, tensor=2, base="lars", full_at=(0, 1)),
    *piped((), "pipeline-tied", "-tp2-block", world=4, tensor=2, layer="block", full_at=(0, 1)),
    *piped((), "pipeline-tied", "-tp2-bf16", world=4, tensor=2, precision="bf16", full_at=(0, 1)),
    *piped((), "pipeline-tied", "-tp2-fp16", world=4, tensor=2, lena=LARGER_EPS, precision="fp16", full_at=(1,)),
    *piped((), "pipeline-tied", "-tp2-8", world=8, tensor=2, clipping=0.5, full_at=(1,)),
]


@pytest.mark.parametrize("case", TWO_RANKS + FOUR_RANKS + IN_PARTS, ids=lambda case: case.name)
def test_stages_do_not_show(case: Case, run_case: Any) -> None:
    check(case, run_case)
