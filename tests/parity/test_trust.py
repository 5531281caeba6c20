"""LARS and LAMB: ratios of whole tensors, however they are cut, from the gradient as it will be clipped."""

from __future__ import annotations

import pytest

from tests.helpers.case import UPDATES, Case, Window
from tests.helpers.check import check
from tests.helpers.make import stages
from tests.helpers.model import ModelOptions

ALL = (0, 1, 2, 3)
ZERO = (1, 2, 3)
BASES = ("lars", "lamb")
PLAIN = {"scaling": "none", "warmup": "none"}
SUB_GROUPS = {"sub_group_size": 500, "stage3_param_persistence_threshold": 0}
POISONED = tuple(Window(2, poisoned=update in (0, 4, 5)) for update in range(UPDATES))
USED = ModelOptions(spare=False)  # DDP needs find_unused_parameters elsewhere


def both(make: object, name: str, *args: object, **fields: object) -> list[Case]:
    """The cases for both rules."""
    return [case for base in BASES for case in make(*args, f"{name}-{base}", base=base, **fields)]  # type: ignore[operator]


CASES = [
    *both(stages, "trust-clipped", ALL, clipping=0.5),
    *both(stages, "trust-published", ALL, lena=PLAIN, clipping=0.5),
    *both(stages, "trust-bf16", ALL, precision="bf16", usage="always"),
    *both(stages, "trust-bf16-fp32", ZERO, precision="bf16-fp32", clipping=0.5, usage="always"),
    *both(stages, "trust-unused-window", ALL, usage="every other window", clipping=0.5),
    *both(stages, "trust-four-ranks", ZERO, world=4, clipping=0.5),
    *both(stages, "trust-skipped", ZERO, windows=POISONED),
    *both(stages, "trust-flat", (0, 3), groups="flat", lena={"no_decay": ["*bias"], "weight_decay": 0.1}),
    *both(stages, "trust-blocks", (1, 3), layer="block"),
    *both(stages, "trust-excluded", (0, 2), lena={"exclude": ["h.0.*"]}, clipping=0.5),
    *both(stages, "trust-coefficient", (1, 3), lena={"trust_coefficient": 0.3, "trust_clip": [0.01, 0.2]}),
    *both(stages, "trust-scheduler", (2,), schedule="decaying", optimizer="client"),
    *both(stages, "trust-round-robin", (1, 2), zero={"round_robin_gradients": True}, world=4, clipping=0.5),
]
SUB_GROUP_CASES = [
    Case(f"trust-sub-groups-{base}-{world}", stage=3, base=base, world=world, zero=SUB_GROUPS, clipping=0.5)
    for base in BASES
    for world in (1, 2, 4)
]
PLAIN_PYTORCH = [
    Case(f"trust-{name}-{base}", stage=None, base=base, clipping=clipping, **fields)  # type: ignore[arg-type]
    for base in BASES
    for clipping in (0.0, 0.5)
    for name, fields in (
        (f"plain-{clipping}", {"world": 1, "accumulation": 4}),
        (f"ddp-{clipping}", {"world": 2, "usage": "always", "model": USED}),
    )
]


@pytest.mark.parametrize("case", CASES + SUB_GROUP_CASES + PLAIN_PYTORCH, ids=lambda case: case.name)
def test_trust_ratios_are_of_whole_tensors(case, run_case):
    check(case, run_case)
