"""What torch.profiler sees in an update: kernels launched, time on the device, and the operations that take longest."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch.autograd import DeviceType

from benchmarks.timing import Update, table

Profile = dict[str, Any]
"""All per update. "phases": by phase, `COLUMNS`. "host", "device": by operation or kernel, [calls, ms of its own]."""

COLUMNS = ["kernels launched", "copies and fills", "torch operations", "device ms", "host ms"]
MARK = "end of phase "
LAUNCHES, COPIES = ("cudaLaunch", "cuLaunch"), ("cudaMemcpy", "cudaMemset", "cuMemcpy", "cuMemset")
TOP = 12


def profile(update: Update, updates: int = 3) -> Profile:
    """The mean of some updates. The host waits for the device at a phase's end, so that each kernel is in its phase."""

    def lap(phase: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        with torch.profiler.record_function(MARK + phase):
            pass

    lap("warm-up")
    with torch.profiler.profile() as seen:
        lap("before")
        for _ in range(updates):
            update(lap)
    return _mean(seen.events(), updates)


def _mean(events: Any, updates: int) -> Profile:
    """The sums over all events, divided by the number of updates."""
    host_events = [event for event in events if event.device_type == DeviceType.CPU]
    marks = sorted((e.time_range.start, e.name.removeprefix(MARK)) for e in host_events if e.name.startswith(MARK))
    ends = [end for end, _ in marks]
    sums: dict[str, list[float]] = {phase: [0.0] * len(COLUMNS) for _, phase in marks[1:]}
    for (before, _), (end, phase) in itertools.pairwise(marks):
        sums[phase][4] += (end - before) / 1000
    top: dict[str, tuple[Counter[str], Counter[str]]] = {
        "host": (Counter(), Counter()),
        "device": (Counter(), Counter()),
    }
    for event in events:
        place = bisect.bisect_left(ends, event.time_range.start)
        on_host = event.device_type == DeviceType.CPU
        named_span = not on_host and event.is_user_annotation  # around kernels that are counted on their own
        if event.name.startswith(MARK) or named_span or not 0 < place < len(marks):
            continue
        phase = sums[marks[place][1]]
        own = (event.self_cpu_time_total if on_host else event.time_range.elapsed_us()) / 1000
        phase[0] += on_host and event.name.startswith(LAUNCHES)
        phase[1] += on_host and event.name.startswith(COPIES)
        phase[2] += on_host and event.name.startswith("aten::")
        phase[3] += 0.0 if on_host else own
        calls, times = top["host" if on_host else "device"]
        calls[event.name] += 1
        times[event.name] += own
    return {
        "phases": {name: [value / updates for value in values] for name, values in sums.items()},
        **{
            where: {name: [calls[name] / updates, time / updates] for name, time in times.most_common(TOP)}
            for where, (calls, times) in top.items()
        },
    }


def summary(profiles: Mapping[str, Profile]) -> str:
    """Tables of what was seen of each optimizer."""
    phases = [
        [name, phase, *(f"{value:.0f}" for value in values[:3]), *(f"{value:.2f}" for value in values[3:])]
        for name, seen in profiles.items()
        for phase, values in seen["phases"].items()
    ]
    tables = [table(["optimizer", "phase", *COLUMNS], phases)]
    for name, seen in profiles.items():
        for where in ("host", "device"):
            rows = [[op[:90], f"{calls:.0f}", f"{time:.2f}"] for op, (calls, time) in seen[where].items()]
            tables += [table([f"{name}: own time on the {where}", "calls", "ms"], rows)] if rows else []
    return "\n\n".join(tables)
