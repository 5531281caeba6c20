"""What a measured noise scale says of the batch: numbers with their uncertainty, and a sentence for people.

The noise scale is s2 / m2, in micro-batches: the batch at which noise and signal of the averaged gradient are equal
(McCandlish et al. 2018, https://arxiv.org/abs/1812.06162, where it estimates the critical batch).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .schedule import algorithm
from .schedule.noise import Remembered, Tally

Z = 1.96
"""Standard errors on each side of the noise scale: about 95 % where the updates of the window are alike."""


def noise_scale(noise: float, signal: float) -> float:
    """s2 / m2. It is inf if the signal is not positive."""
    return noise / signal if signal > 0 else math.inf


def interval(tally: Tally) -> tuple[float, float]:
    """Between which numbers the noise scale lies, from the spread over the updates of the averaging window.

    It is Fieller's interval of a ratio. The upper end is inf where the signal cannot be told from 0. (0, inf) before
    the second update. A noise scale that drifts within the window widens it.
    """
    (weight, *_), (s, ss, sm), (m, _, mm) = tally.moments.tolist()
    if weight <= 0:
        return 0.0, math.inf
    s, m, ss, sm, mm = (moment / weight for moment in (s, m, ss, sm, mm))
    share = float(tally.squares) / weight**2  # 1 over the number of updates, if all had the same weight
    if not math.isfinite(s + m) or share >= 1 - 1e-9:
        return 0.0, math.inf
    of_mean = Z**2 * share / (1 - share)
    a = m * m - of_mean * max(mm - m * m, 0.0)
    b = s * m - of_mean * (sm - s * m)
    c = s * s - of_mean * max(ss - s * s, 0.0)
    root = math.sqrt(max(b * b - a * c, 0.0))
    if m > 0 and a > 0:
        return max((b - root) / a, 0.0), (b + root) / a
    if c <= 0:  # neither can be told from 0
        return 0.0, math.inf
    return max(c / (b + root), 0.0) if b + root > 0 else 0.0, math.inf


def report_of(memory: Remembered, tokens_per_sample: float | None, differences: float = 0) -> dict[str, Any]:
    """See `ds_lena.watch`. This waits for the numbers from the device."""
    noise, signal = memory.noise_and_signal()
    sums = algorithm.model_noise_and_signal(noise, signal, memory.weight)
    n = memory.n.clamp(min=1)
    worth = float(algorithm.model_gain(noise, signal, memory.weight, n, 1.0))
    all_noise, all_signal = (float(x) for x in sums)
    low, high = interval(memory.tally)
    size = memory.micro_batch_size
    scale = noise_scale(all_noise, all_signal)
    is_measured = bool((memory.weight > 0).any())
    columns = [noise.tolist(), signal.tolist()]
    found = {
        "update": int(memory.updates),
        "n": int(memory.n),
        "skipped": memory.skipped,
        "nonfinite": int(memory.nonfinite),
        "micro_batches": int(memory.tally.micro_batches),
        "samples": int(memory.tally.samples) if size is not None else None,
        "tokens": int(memory.tally.samples * tokens_per_sample) if size is not None and tokens_per_sample else None,
        "micro_batch_size": size,
        "estimator": ("differences" if differences else "micro-batches") if is_measured else None,
        "noise": all_noise,
        "signal": all_signal,
        "noise_scale": scale,
        "noise_scale_low": low,
        "noise_scale_high": high,
        "noise_scale_samples": None if size is None else scale * size,
        "noise_scale_tokens": None if size is None or tokens_per_sample is None else scale * size * tokens_per_sample,
        "gain": worth,
        "efficiency": worth / float(n),
        "layers": {
            name: {"noise": s, "signal": m, "noise_scale": noise_scale(s, m)}
            for name, s, m in zip(memory.table.names, *columns, strict=True)
        },
    }
    return found | {"advice": sentence(found)}


def sentence(report: dict[str, Any]) -> str:
    """What the numbers of a report mean for the batch."""
    if report["estimator"] is None:
        return (
            "no noise scale yet: it needs an update of two micro-batches or more, over all ranks and accumulation, or "
            '"differences": true in one process'
            if report["update"]
            else "no update yet"
        )
    scale, n = report["noise_scale"], report["n"]
    how = " (from differences of consecutive gradients)" if report["estimator"] == "differences" else ""
    if math.isinf(scale):
        return f"noise scale{how}: no signal yet above the noise; at your {n} an update is all noise"
    units = [
        f"{_number(report[f'noise_scale_{unit}'])} {unit}"
        for unit in ("samples", "tokens")
        if report[f"noise_scale_{unit}"] is not None
    ]
    others = f" ({', '.join(units)})" if units else ""
    high = report["noise_scale_high"]
    bounds = f"between {_number(report['noise_scale_low'])} and {'infinity' if math.isinf(high) else _number(high)}"
    return (
        f"noise scale{how} {_number(scale)} micro-batches{others}, {bounds}; at your {n} an update is worth "
        f"{_number(report['gain'])} single ones: efficiency {report['efficiency']:.2f}"
    )


def _number(value: float) -> str:
    """Three digits below 1000, all before the point above it."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


EVENTS = (
    "noise_scale",
    "noise_scale_low",
    "noise_scale_high",
    "noise_scale_samples",
    "noise_scale_tokens",
    "efficiency",
)
"""What loggers get of a report beside the gain, under `lena/NAME`."""


def silent_layers(silent: torch.Tensor, names: tuple[str, ...]) -> list[str]:
    """The layers to which no gradient arrives. `silent` (L,): see `NoiseState`. It waits for the device."""
    return [name for name, count in zip(names, silent.tolist(), strict=True) if count > 0]
