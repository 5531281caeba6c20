"""Contestants take turns, so that whatever the machine does meanwhile meets all; how long each phase took.

A contestant is a function that trains for one update and calls `lap(phase)` at the end of each phase. A phase may come
more than once, as backward passes do, and is added up.
"""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Lap = Callable[[str], None]
Update = Callable[[Lap], None]
Samples = dict[str, dict[str, list[float]]]
"""Contestant -> phase -> seconds. Entry i of all contestants was measured in the same round, right after each other."""

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
MIN_ROUNDS = 3


@dataclass(frozen=True)
class Stopwatch:
    """`clock`: one of CLOCKS. `wait`: returns once the device is idle."""

    clock: str
    wait: Callable[[], None]

    def time_whole(self, update: Update) -> dict[str, float]:
        """Seconds of one update, as phase "update"."""
        begin = self._read()
        update(_ignore)
        return {"update": self._read() - begin}

    def time_phases(self, update: Update) -> dict[str, float]:
        """Seconds of each phase of one update."""
        seconds: defaultdict[str, float] = defaultdict(float)
        last = self._read()

        def lap(phase: str) -> None:
            nonlocal last
            now = self._read()
            seconds[phase] += now - last
            last = now

        update(lap)
        return seconds

    def _read(self) -> float:
        self.wait()
        return CLOCKS[self.clock]()


def warm_up(contestants: Mapping[str, Update], updates: int) -> None:
    """Updates that are not measured: they allocate the optimizers' states, and ZeRO-3 records the order of modules."""
    for _ in range(updates):
        for update in contestants.values():
            update(_ignore)


def measure(
    contestants: Mapping[str, Update],
    seconds: float,
    stopwatch: Stopwatch,
    runs_ahead: bool,
    meet: Callable[[bool], bool] = bool,
) -> Samples:
    """Time the contestants in turn for about `seconds`: every phase, and the whole as phase "update".

    Args:
        runs_ahead: the host queues work for the device. Then waiting after each phase makes an update slower than it
            is, so wholes and phases are measured in rounds of their own, each for half of the time.
        meet: called by all ranks before each update: waits for the others, and is true if all of them passed true.
    """
    if runs_ahead:
        wholes = _alternate(contestants, seconds / 2, stopwatch.time_whole, meet)
        phases = _alternate(contestants, seconds / 2, stopwatch.time_phases, meet)
    else:
        phases = _alternate(contestants, seconds, stopwatch.time_phases, meet)
        wholes = {name: {"update": _sums(phases[name])} for name in contestants}
    return {name: wholes[name] | phases[name] for name in contestants}


def compare(samples: Samples, reference: str) -> dict[str, dict[str, dict[str, Any]]]:
    """By phase and contestant: seconds, as a multiple of the reference's, and how many more than the reference's.

    Phases that the reference has; the reference is compared with itself too.
    """
    return {
        phase: {name: against(phases[phase], theirs) for name, phases in samples.items()}
        for phase, theirs in samples[reference].items()
    }


def against(own: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """One contestant's seconds beside the reference's, entry by entry of the same round."""
    rounds = list(zip(own, theirs, strict=True))
    return {
        "rounds": len(rounds),
        "median": statistics.median(own),
        "minimum": min(own),
        "ratio_of_medians": statistics.median(own) / statistics.median(theirs),
        "ratio_of_minima": min(own) / min(theirs),
        "paired_ratio": quartiles([a / b for a, b in rounds]),
        "added": quartiles([a - b for a, b in rounds]),
    }


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Of at least two values."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"q1": low, "median": middle, "q3": high}


def fit_line(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Least squares: y = intercept + slope x."""
    slope, intercept = statistics.linear_regression(x, y)
    return {"slope": slope, "intercept": intercept}


def count_syncs(update: Update) -> dict[str, int]:
    """By phase: how often the host waited for the GPU, as far as CUDA's sync debug mode notices."""
    counts: defaultdict[str, int] = defaultdict(int)
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


def _alternate(
    contestants: Mapping[str, Update],
    seconds: float,
    time_one: Callable[[Update], Mapping[str, float]],
    meet: Callable[[bool], bool],
) -> Samples:
    """Rounds A B C, C B A, A B C, …, so that no contestant always comes first."""
    samples: Samples = {name: defaultdict(list) for name in contestants}
    order = list(contestants)
    rounds, deadline = 0, time.monotonic() + seconds
    with _no_garbage_collection():
        while meet(rounds < MIN_ROUNDS or time.monotonic() < deadline):
            for name in order:
                meet(True)
                for phase, taken in time_one(contestants[name]).items():
                    samples[name][phase].append(taken)
            order.reverse()
            rounds += 1
    return samples


def _ignore(phase: str) -> None:
    pass


def _sums(phases: Mapping[str, list[float]]) -> list[float]:
    return [sum(parts) for parts in zip(*phases.values(), strict=True)]


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """As timeit does."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
