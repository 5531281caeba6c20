"""The assertion of the parity suite: a case agrees with its float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from tests.helpers.case import Case
from tests.helpers.compare import assert_same_run
from tests.helpers.groups import case_groups
from tests.helpers.launch import Outcome
from tests.helpers.model import build
from tests.helpers.reference import Snapshot, train
from tests.helpers.split_run import whole_model

_references: dict[str, list[Snapshot]] = {}


def check(case: Case, run_case: Callable[[Case], Outcome]) -> None:
    """Run the case in its ranks and in float64, and compare."""
    results = run_case(case).on_every_rank()
    assert_same_run(case, results, reference(case))


def reference(case: Case) -> list[Snapshot]:
    """The run in float64; layouts that must agree with each other share it."""
    options = replace(case.model, checkpointing="none")
    key = repr((options, case.split, case.groups, case.keys, case.plan, case.usage, case.data_ranks, case.settings))
    if key not in _references:
        model = whole_model(case) if case.split else build(options, torch.float64)
        groups = case_groups(case, model)
        _references[key] = list(train(model, groups, case.keys, case.reference_windows(), case.settings))
    return _references[key]
