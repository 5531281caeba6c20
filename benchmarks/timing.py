"""Contestants take turns, so that whatever the machine does meanwhile meets all of them; how long each phase took.

A contestant is a function that trains for one update and calls `lap(phase)` at the end of each phase. A phase may come
more than once, as backward passes do, and is added up.
"""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Lap = Callable[[str], None]
Update = Callable[[Lap], None]
Samples = dict[str, dict[str, list[float]]]
"""Contestant -> phase -> seconds. Entry i of all contestants was measured in the same round, right after each other."""

MIN_ROUNDS = 3


def warm_up(contestants: Mapping[str, Update], updates: int) -> None:
    """Updates that are not measured: they allocate the optimizers' states, and ZeRO-3 records the order of modules."""
    for _ in range(updates):
        for update in contestants.values():
            update(lambda phase: None)


def measure(
    contestants: Mapping[str, Update], seconds: float, device: torch.device, meet: Callable[[bool], bool] = bool
) -> Samples:
    """Time the contestants in turn for about `seconds`: every phase, and the whole as phase "update".

    A GPU runs behind the host, and waiting for it at a phase's end makes an update slower than it is. So there wholes
    and phases are measured in rounds of their own, each for half of the time.

    All ranks call `meet` before each update: it waits for the others, and is true if all of them passed true.
    """
    if device.type != "cpu":
        phases = _alternate(contestants, seconds / 2, True, torch.accelerator.synchronize, meet)
        wholes = _alternate(contestants, seconds / 2, False, torch.accelerator.synchronize, meet)
        return {name: wholes[name] | phases[name] for name in contestants}
    samples = _alternate(contestants, seconds, True, lambda: None, meet)
    for phases in samples.values():
        phases["update"] = [sum(parts) for parts in zip(*phases.values(), strict=True)]
    return samples


def _alternate(
    contestants: Mapping[str, Update],
    seconds: float,
    by_phase: bool,
    wait: Callable[[], None],
    meet: Callable[[bool], bool],
) -> Samples:
    """Rounds A B C, C B A, A B C, …, so that no contestant always comes first; no garbage collection, as in timeit."""
    samples: Samples = {name: defaultdict(list) for name in contestants}
    order = list(contestants)
    rounds, deadline = 0, time.monotonic() + seconds
    gc.collect()
    gc.disable()
    try:
        while meet(rounds < MIN_ROUNDS or time.monotonic() < deadline):
            for name in order:
                meet(True)
                for phase, taken in _time(contestants[name], by_phase, wait).items():
                    samples[name][phase].append(taken)
            order.reverse()
            rounds += 1
    finally:
        gc.enable()
    return samples


def _time(update: Update, by_phase: bool, wait: Callable[[], None]) -> Mapping[str, float]:
    """Seconds of one update, by phase or as phase "update"."""
    seconds: defaultdict[str, float] = defaultdict(float)

    def lap(phase: str) -> None:
        nonlocal last
        wait()
        now = time.perf_counter()
        seconds[phase] += now - last
        last = now

    wait()
    last = time.perf_counter()
    update(lap if by_phase else lambda phase: None)
    if not by_phase:
        lap("update")
    return seconds


def count_syncs(update: Update) -> dict[str, int]:
    """By phase of one update: how often the host waited for the GPU, as far as CUDA's sync debug mode notices."""
    counts: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def lap(phase: str) -> None:
            counts[phase] += sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
            caught.clear()

        torch.cuda.set_sync_debug_mode("warn")
        try:
            update(lap)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return dict(counts)


def against(own: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """One contestant's seconds beside the reference's; "paired" and "added" within rounds: quartiles and median."""
    rounds = list(zip(own, theirs, strict=True))
    paired = statistics.quantiles([a / b for a, b in rounds], n=4, method="inclusive")
    added = statistics.quantiles([a - b for a, b in rounds], n=4, method="inclusive")
    return {
        "rounds": len(rounds),
        "reference": statistics.median(theirs),
        "median": statistics.median(own),
        "ratio_of_medians": statistics.median(own) / statistics.median(theirs),
        "ratio_of_minima": min(own) / min(theirs),
        **dict(zip(("paired_q1", "paired", "paired_q3"), paired, strict=True)),
        **dict(zip(("added_q1", "added", "added_q3"), added, strict=True)),
    }


HEAD = ["rival", "optimizer", "rounds", "rival, ms", "ms", "ratio of medians", "of minima", "within rounds", "added ms"]


def versus(cells: Sequence[str], samples: Mapping[str, Mapping[str, Any]], rival: str, phase: str) -> list[list[str]]:
    """Under HEAD: a row for every contestant but the rival, with these cells in front."""
    rows = []
    for name, phases in samples.items():
        if name != rival:
            found = against(phases[phase], samples[rival][phase])
            times = [f"{1000 * found[key]:.1f}" for key in ("reference", "median")]
            ratios = [f"**{found['ratio_of_medians']:.3f}**", f"{found['ratio_of_minima']:.3f}"]
            paired = "{paired:.3f} [{paired_q1:.3f}, {paired_q3:.3f}]".format(**found)
            added = [f"{1000 * found[key]:+.1f}" for key in ("added", "added_q1", "added_q3")]
            spread = [paired, f"{added[0]} [{added[1]}, {added[2]}]"]
            rows.append([*cells, rival, name, str(found["rounds"]), *times, *ratios, *spread])
    return rows


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """As markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---:"] * len(head), *rows))
