"""Every key of the optimizer entry, each at one of the stages."""

from __future__ import annotations

import pytest

from tests.helpers.case import Case
from tests.helpers.check import check
from tests.helpers.marks import full


def lena(name: str, stage: int, **keys: object) -> Case:
    return Case(name=f"key-{name}", stage=stage, lena=keys)


# AdaScale is the gain of one layer, the model.
POLICIES = [
    lena(f"{policy}-{warmup}", (first + second) % 4, warmup=warmup,
         **({"layer": "model"} if policy == "adascale" else {"scaling": policy}))
    for first, policy in enumerate(("gain", "adascale", "linear", "sqrt", "none"))
    for second, warmup in enumerate(("layer", "fixed", "none"))
]  # fmt: skip

SCALING = [
    lena("linear-power", 2, scaling="linear", gain_power=0.5, max_factor=3.0),
    lena("power", 1, gain_power=0.75),
    lena("power-above-1", 3, gain_power=1.5, max_factor=5.0),
    lena("max-factor", 2, max_factor=1.5),
    lena("no-relative-bound", 1, max_relative_gain=None),
    lena("tight-relative-bound", 3, max_relative_gain=1.1),
]  # fmt: skip

STATISTICS = [
    lena("smoothing", 0, smoothing=0.9),
    lena("no-smoothing", 2, smoothing=0.0),
    lena("base-of-half-a-micro-batch", 1, base_batch_size=1),
    lena("base-of-three-micro-batches", 2, base_batch_size=6),
    lena("base-above-the-batch", 3, base_batch_size=100),
    *(lena(f"exclude-{layer}", stage, layer=layer, exclude=["*.bias", "h.0.up.*"])
      for stage, layer in enumerate(("tensor", "module", "block", "model"))),
]  # fmt: skip

WARMUP = [
    lena("uncapped", 1, warmup_cap=None),
    lena("cap-at-fraction", 3, warmup_fraction=0.3, warmup_cap=0.3),
    lena("long-warmup", 1, warmup_fraction=1.0, warmup_cap=1.0),
    lena("short-run", 2, total_steps=5),
]

RULES = [
    lena("no-decay", 1, no_decay=["*.weight"]),
    lena("betas", 2, betas=[0.8, 0.95], eps=1e-5),
    Case("key-nesterov", stage=2, base="sgd", lena={"nesterov": True}),
    Case("key-no-momentum", stage=3, base="sgd", lena={"momentum": 0.0}),
    Case("key-one-flat-list", stage=1, groups="flat", lena={"no_decay": ["*bias", "*norm*"], "weight_decay": 0.1}),
    Case("key-one-flat-list-defaults", stage=3, groups="flat", lena={"exclude": ["position"]}),
    Case("key-one-flat-list-sgd", stage=2, base="sgd", groups="flat", lena={"weight_decay": 0.02}),
]

# n = 1 measures nothing: the gain is 1 whatever the base.
SINGLE = [
    Case("single", stage=2, world=1, accumulation=1),
    Case("single-linear", stage=3, world=1, accumulation=1, lena={"scaling": "linear", "base_batch_size": 1}),
    *full([Case("single-small-base", stage=0, world=1, accumulation=1, lena={"base_batch_size": 1})]),
]


CASES = POLICIES[::2] + full(POLICIES[1::2]) + SCALING + STATISTICS + WARMUP + RULES + SINGLE


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_key(case, run_case):
    check(case, run_case)
