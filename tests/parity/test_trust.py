"""LARS and LAMB: ratios of whole tensors, however they are cut, from the gradient as it will be clipped."""

from __future__ import annotations

import pytest

from tests.helpers.case import UPDATES, Case, Window
from tests.helpers.check import check
from tests.helpers.make import Cases, stages
from tests.helpers.marks import full
from tests.helpers.model import ModelOptions

ALL = (0, 1, 2, 3)
ZERO = (1, 2, 3)
BASES = ("lars", "lamb")
PLAIN = {"scaling": "none", "warmup": "none"}
SUB_GROUPS = {"sub_group_size": 100, "stage3_param_persistence_threshold": 0}
POISONED = tuple(Window(2, poisoned=update in (0, 4, 5)) for update in range(UPDATES))
USED = ModelOptions(spare=False)  # DDP needs find_unused_parameters elsewhere


def both(which: tuple[int, ...], name: str, lars: tuple[int, ...], lamb: tuple[int, ...], **fields: object) -> Cases:
    """The cases for both rules at the stages `which`; `lars`, `lamb`: their stages in the default run."""
    return [
        case
        for base, default in (("lars", lars), ("lamb", lamb))
        for case in stages(default, f"trust-{name}-{base}", sorted({*which} - {*default}), base=base, **fields)
    ]


CASES = [
    *both(ALL, "clipped", (0, 2), (1, 3), clipping=0.5),
    *both(ALL, "published", (3,), (2,), lena=PLAIN, clipping=5.0),  # clips some updates only
    *both(ALL, "bf16", (0,), (2, 3), precision="bf16", usage="always"),
    *both(ZERO, "bf16-fp32", (1,), (1,), precision="bf16-fp32", clipping=0.5, usage="always"),
    *both(ALL, "unused-window", (0, 3), (1, 3), usage="every other window", clipping=0.5),
    *both(ZERO, "four-ranks", (2,), (), world=4, clipping=0.5),
    *both(ZERO, "skipped", (3,), (2,), windows=POISONED),
    *both((0, 3), "flat", (3,), (0,), groups="flat", lena={"no_decay": ["*bias"], "weight_decay": 0.1}),
    *both((1, 3), "blocks", (1,), (3,), layer="block"),
    *both((0, 2), "excluded", (2,), (0,), lena={"exclude": ["h.0.*"]}, clipping=0.5),
    *both((1, 3), "coefficient", (3,), (1,), lena={"trust_coefficient": 0.3, "trust_clip": [0.01, 0.2]}),
    *both((2,), "scheduler", (), (2,), schedule="decaying", optimizer="client"),
    *both((1, 2), "round-robin", (), (2,), zero={"round_robin_gradients": True}, world=4, clipping=0.5),
]


def sub_groups(base: str, world: int) -> Case:
    return Case(f"trust-sub-groups-{base}-{world}", stage=3, base=base, world=world, zero=SUB_GROUPS, clipping=0.5)


CASES += [sub_groups("lars", 2), sub_groups("lamb", 4)]
CASES += full(sub_groups(*which) for which in (("lars", 1), ("lars", 4), ("lamb", 1), ("lamb", 2)))

PLAIN_PYTORCH = [
    Case(f"trust-{name}-{base}", stage=None, base=base, clipping=clipping, **fields)  # type: ignore[arg-type]
    for base in BASES
    for clipping in (0.0, 0.5)
    for name, fields in (
        (f"plain-{clipping}", {"world": 1, "accumulation": 4}),
        (f"ddp-{clipping}", {"world": 2, "usage": "always", "model": USED}),
    )
]


@pytest.mark.parametrize("case", CASES + PLAIN_PYTORCH, ids=lambda case: case.name)
def test_trust_ratios_are_of_whole_tensors(case, run_case):
    check(case, run_case)
