"""What a run must agree on with the float64 reference, and how closely."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tests.helpers.case import Case
from tests.helpers.reference import Snapshot


@dataclass(frozen=True)
class Tolerance:
    """Relative bounds. `path` is a share of the way a tensor has moved, summed over updates."""

    gain: float
    report: float
    path: float


FP32 = Tolerance(gain=5e-5, report=1e-4, path=1e-4)
# bf16: roundings of single gradients, as stock rules show them in the same layouts (test_stock.py).
BF16 = Tolerance(gain=2e-2, report=3e-2, path=8e-2)
BF16_OTHER_LINEAR = Tolerance(gain=4e-2, report=8e-2, path=1.5e-1)


def tolerance(case: Case) -> Tolerance:
    if case.precision == "fp32":
        return FP32
    return BF16_OTHER_LINEAR if case.zero.get("memory_efficient_linear") else BF16


def assert_same_run(case: Case, results: Sequence[Mapping[str, Any]], reference: Sequence[Snapshot]) -> None:
    """Every rank's reports and weights against the reference; all differences are told at once."""
    bounds = tolerance(case)
    for rank, result in enumerate(results):
        assert result["reports"] == results[0]["reports"], f"rank {rank} reports other numbers than rank 0"
    differences = []
    if case.optimizer != "stock":
        for update, (report, snapshot) in enumerate(zip(results[0]["reports"], reference, strict=True), start=1):
            differences += [f"update {update}: {text}" for text in report_differences(report, snapshot.report, bounds)]
    for rank, result in enumerate(results):
        differences += [f"rank {rank}: {text}" for text in weight_differences(result["params"], reference, bounds)]
    assert not differences, f"{len(differences)} differences, the first of them\n" + "\n".join(differences[:25])


def weight_differences(params: Mapping[str, Tensor], reference: Sequence[Snapshot], bounds: Tolerance) -> list[str]:
    """Tensors that ended too far from the reference.

    Beside the share of the path, one rounding of an fp32 weight per update is allowed: a parameter that only decays
    moves by little more than that.
    """
    expected = reference[-1].params
    if set(params) != set(expected):
        return [f"parameters {sorted(set(params) ^ set(expected))} are on one side only"]
    found = []
    for name, weight in expected.items():
        path = sum(snapshot.moved[name] for snapshot in reference)
        distance = float((params[name].double() - weight).norm())
        rounding = len(reference) * 2**-24 * float(weight.norm())
        if not distance <= bounds.path * path + rounding:
            found.append(f"{name} is {distance / path if path else math.inf:.1e} of its path away")
    return found


def report_differences(report: Mapping[str, Any], expected: Mapping[str, Any], bounds: Tolerance) -> list[str]:
    """Numbers of one report that differ too much."""
    if set(report) != set(expected) or set(report["layers"]) != set(expected["layers"]):
        names = set(report) ^ set(expected) or set(report["layers"]) ^ set(expected["layers"])
        return [f"{sorted(names)} are in one report only"]
    if expected["update"] == 0:  # before the first update little is defined
        idle = {**report, "layers": [layer["gain"] for layer in report["layers"].values()]}
        wanted = {"update": 0, "skipped": expected["skipped"], "gain": 1.0, "layers": [1.0] * len(report["layers"])}
        return [_told("model", key, idle, wanted) for key in wanted if idle[key] != wanted[key]]
    counts = ("update", "n", "base", "skipped", "nonfinite")
    found = _number_differences("model", report, expected, bounds, exact=counts)
    total = _moments_of_model(expected)
    found += _noise_scale_difference("model", report, expected, *total, bounds)
    for name, layer in expected["layers"].items():
        got = report["layers"][name]
        if set(got) != set(layer):
            return [f"{name} reports {sorted(got)}"]
        # Which of two warm-up terms is larger is compared where rounding cannot decide it.
        found += _number_differences(name, got, layer, bounds, exact=("capped",) if bounds is FP32 else ())
        # Noise and signal are differences of squared norms: close in terms of those.
        size = layer["noise"] + abs(layer["signal"])
        found += [
            _told(name, key, got, layer)
            for key in ("noise", "signal")
            if not abs(got[key] - layer[key]) <= bounds.report * size
        ]
        found += _noise_scale_difference(name, got, layer, layer["noise"], layer["signal"], bounds)
    return found


def _number_differences(
    where: str, got: Mapping[str, Any], expected: Mapping[str, Any], bounds: Tolerance, exact: Sequence[str]
) -> list[str]:
    allowed = dict.fromkeys(exact, 0.0) | {"gain": bounds.gain}
    allowed |= dict.fromkeys(("factor", "warmup", "state"), bounds.report)
    return [
        _told(where, key, got, expected)
        for key, bound in allowed.items()
        if key in expected and not abs(got[key] - expected[key]) <= bound * abs(expected[key])
    ]


def _noise_scale_difference(
    where: str, got: Mapping[str, Any], expected: Mapping[str, Any], noise: float, signal: float, bounds: Tolerance
) -> list[str]:
    """noise / signal, as closely as an error in the signal of `report` times both allows."""
    uncertain = bounds.report * (noise + abs(signal))
    if noise + abs(signal) > 0 and abs(signal) <= 2 * uncertain:
        return []  # the sign of the signal is rounding
    value, wanted = got["noise_scale"], expected["noise_scale"]
    if value == wanted or abs(value - wanted) <= 2 * uncertain * (1 / abs(signal) + noise / signal**2):
        return []
    return [_told(where, "noise_scale", got, expected)]


def _moments_of_model(report: Mapping[str, Any]) -> tuple[float, float]:
    layers = report["layers"].values()
    return sum(layer["noise"] for layer in layers), sum(layer["signal"] for layer in layers)


def _told(where: str, key: str, got: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    return f"{where} {key}: {got[key]!r}, expected {expected[key]!r}"
