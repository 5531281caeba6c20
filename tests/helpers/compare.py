"""What a run must agree on with the float64 reference, and how closely."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tests.helpers.case import Case
from tests.helpers.reference import Snapshot
from tests.helpers.reports import noise_differences, report_differences
from tests.helpers.tolerance import Tolerance, tolerance


def assert_same_run(case: Case, results: Sequence[Mapping[str, Any]], reference: Sequence[Snapshot]) -> None:
    """Every rank's reports and weights against the reference; all differences are told at once."""
    bounds = tolerance(case)
    for rank, result in enumerate(results):
        assert result["reports"] == results[0]["reports"], f"rank {rank} reports other numbers than rank 0"
    differences = []
    if case.optimizer != "stock":
        compared = noise_differences if case.optimizer == "watched" else report_differences
        for update, (report, snapshot) in enumerate(zip(results[0]["reports"], reference, strict=True), start=1):
            differences += [f"update {update}: {text}" for text in compared(report, snapshot.report, bounds)]
    for rank, result in enumerate(results):
        differences += [f"rank {rank}: {text}" for text in weight_differences(result["params"], reference, bounds)]
    assert not differences, f"{len(differences)} differences, the first of them\n" + "\n".join(differences[:25])


def share_of_path(params: Mapping[str, Tensor], reference: Sequence[Snapshot]) -> float:
    """How far the worst tensor ended from the reference, as a share of the way that it moved, summed over updates."""
    paths = {name: sum(snapshot.moved[name] for snapshot in reference) for name in params}
    expected = reference[-1].params
    return max(float((p.double() - expected[name]).norm()) / paths[name] for name, p in params.items() if paths[name])


def displacement_error(params: Mapping[str, Tensor], reference: Sequence[Snapshot]) -> float:
    """Distance of all weights together from the reference, as a share of the reference's own after its first update."""
    first, last = reference[0].params, reference[-1].params

    def squared(one: Mapping[str, Tensor]) -> float:
        return sum(float((one[name].double() - last[name]).square().sum()) for name in last)

    return math.sqrt(squared(params) / squared(first))


def weight_differences(params: Mapping[str, Tensor], reference: Sequence[Snapshot], bounds: Tolerance) -> list[str]:
    """Tensors that ended too far from the reference.

    Beside the share of the path, one rounding of a weight per update is allowed: a parameter that only decays
    moves by little more than that.
    """
    expected = reference[-1].params
    if set(params) != set(expected):
        return [f"parameters {sorted(set(params) ^ set(expected))} are on one side only"]
    found = []
    for name, weight in expected.items():
        path = sum(snapshot.moved[name] for snapshot in reference)
        distance = float((params[name].double() - weight).norm())
        rounding = len(reference) * bounds.rounding * float(weight.norm())
        if not distance <= bounds.path * path + rounding:
            found.append(f"{name} is {distance / path if path else math.inf:.1e} of its path away")
    return found
