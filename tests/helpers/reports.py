"""Two reports of the same update, number by number."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from tests.helpers.tolerance import FP32, Tolerance

Numbers = Mapping[str, Any]

COUNTS = ("update", "n", "base", "skipped", "nonfinite")
SQUARED_ROUNDING = 2**-40  # of gradients, in terms of the model's: a layer whose true gradient is zero shows no more


def report_differences(report: Numbers, expected: Numbers, bounds: Tolerance) -> list[str]:
    """The numbers of a report that differ too much from the expected ones."""
    for mine, others in ((report, expected), (report["layers"], expected["layers"])):
        if set(mine) != set(others):
            return [f"{sorted(set(mine) ^ set(others))} are in one report only"]
    if expected["update"] == 0:
        return list(_before_the_first_update(report, expected))
    return list(_all(report, expected, bounds))


def noise_differences(report: Numbers, expected: Numbers, bounds: Tolerance) -> list[str]:
    """The same of the report of a watch: counts, noise, signal and noise scales."""
    if set(report["layers"]) != set(expected["layers"]):
        return [f"{sorted(set(report['layers']) ^ set(expected['layers']))} are in one report only"]
    counts = (key for key in COUNTS if key != "base")
    return [*_off("model", tuple(counts), report, expected, 0.0), *_noises_off(report, expected, bounds)]


def _before_the_first_update(report: Numbers, expected: Numbers) -> Iterator[str]:
    """Little is defined there: the counts and the gains."""
    yield from _off("model", ("update", "skipped", "gain"), report, expected, 0.0)
    for name, layer in expected["layers"].items():
        yield from _off(name, ("gain",), report["layers"][name], layer, 0.0)


def _all(report: Numbers, expected: Numbers, bounds: Tolerance) -> Iterator[str]:
    yield from _off("model", COUNTS, report, expected, 0.0)
    yield from _off("model", ("gain",), report, expected, bounds.gain)
    for name, layer in expected["layers"].items():
        got = report["layers"][name]
        if set(got) != set(layer):
            yield f"{name} reports {sorted(got)}"
            continue
        yield from _off(name, ("gain",), got, layer, bounds.gain)
        yield from _off(name, ("factor", "warmup", "state"), got, layer, bounds.report)
        if bounds is FP32:  # in bf16, rounding may decide which term of the warm-up is the larger one
            yield from _off(name, ("capped",), got, layer, 0.0)
    yield from _noises_off(report, expected, bounds)


def _noises_off(report: Numbers, expected: Numbers, bounds: Tolerance) -> Iterator[str]:
    """Noise, signal and noise scale of each layer, and the noise scale of the model."""
    layers = expected["layers"]
    noise, signal = (math.fsum(layer[key] for layer in layers.values()) for key in ("noise", "signal"))
    rounding = SQUARED_ROUNDING * math.fsum(layer["noise"] + abs(layer["signal"]) for layer in layers.values())
    yield from _scale_off("model", report, expected, noise, signal, bounds.report * (noise + abs(signal)))
    for name, layer in layers.items():
        got = report["layers"][name]
        # Noise and signal are differences of squared norms: close in terms of those.
        slack = bounds.report * (layer["noise"] + abs(layer["signal"])) + rounding
        for key in ("noise", "signal"):
            if not abs(got[key] - layer[key]) <= slack:
                yield _told(name, key, got, layer)
        yield from _scale_off(name, got, layer, layer["noise"], layer["signal"], slack)


def _off(where: str, keys: tuple[str, ...], got: Numbers, expected: Numbers, bound: float) -> Iterator[str]:
    for key in keys:
        if not abs(got[key] - expected[key]) <= bound * abs(expected[key]):
            yield _told(where, key, got, expected)


def _scale_off(where: str, got: Numbers, expected: Numbers, noise: float, signal: float, slack: float) -> Iterator[str]:
    """noise / signal, as closely as both are known; nothing is known where `slack` may turn the signal's sign."""
    value, wanted = got["noise_scale"], expected["noise_scale"]
    if noise == signal == 0 or signal < -2 * slack:
        close = value == wanted
    elif abs(signal) <= 2 * slack:
        close = True
    else:
        close = abs(value - wanted) <= 2 * slack * (1 / signal + noise / signal**2)
    if not close:
        yield _told(where, "noise_scale", got, expected)


def _told(where: str, key: str, got: Numbers, expected: Numbers) -> str:
    return f"{where} {key}: {got[key]!r}, expected {expected[key]!r}"
