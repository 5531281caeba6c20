"""From records to numbers: mean and range over seeds, and the updates that a target took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from .jobs import Job, trials
from .plan import Method, Study, chooser
from .records import Record, Records

TARGETS = (1 / 8, 1 / 4, 1 / 2)
"""The targets are the mean losses that the single worker has after these shares of its run."""


@dataclass(frozen=True)
class Spread:
    """Values of several seeds; `values` is empty where a seed has none."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def half_range(self) -> float:
        return (max(self.values) - min(self.values)) / 2


@dataclass(frozen=True)
class Outcome:
    """What a method reached in a study.

    `loss`: the last one; `updates`, `micro_batches`: what each target took; `trials`: how many chose `settings`;
    `diverged`: seeds that did.
    """

    method: Method
    settings: dict[str, Any]
    trials: int
    loss: Spread
    updates: tuple[Spread, ...]
    micro_batches: tuple[Spread, ...]
    diverged: int


def outcomes(study: Study, studies: Mapping[str, Study], targets: Sequence[float], records: Records) -> list[Outcome]:
    """The methods whose seeds have all been run, the lowest loss first."""
    choosing = chooser(study, studies)
    found = (_outcome(study, method, trials(choosing, method), targets, records) for method in study.methods)
    return sorted(
        filter(None, found), key=lambda outcome: (not outcome.loss.values, outcome.loss.values and outcome.loss.mean)
    )


def targets(single_worker: Study, records: Records) -> list[float]:
    """Mean losses of the single worker after the shares `TARGETS` of its run; none while a seed is missing, or
    where one diverged."""
    runs = seed_runs(single_worker, single_worker.methods[0], records)
    if not runs or any(run["loss"] is None for run in runs):
        return []
    total = single_worker.task.micro_batches
    return [fmean(_loss_at(run["curve"], share * total) for run in runs) for share in TARGETS]


def updates_to(curve: Sequence[Sequence[float]], target: float, column: int = 0) -> float | None:
    """Where a curve of (update, micro-batches, loss) first reaches `target`, by a line from the point before; None
    where it never does. `column` 0 gives updates, 1 micro-batches."""
    for i, point in enumerate(curve):
        if point[2] <= target:
            if i == 0:
                return point[column]
            before = curve[i - 1]
            share = (before[2] - target) / (before[2] - point[2])
            return before[column] + share * (point[column] - before[column])
    return None


def _outcome(study: Study, method: Method, tried: int, targets: Sequence[float], records: Records) -> Outcome | None:
    runs = seed_runs(study, method, records)
    if not runs:
        return None
    reached = [run for run in runs if run["loss"] is not None]
    spreads = [[_spread([updates_to(run["curve"], t, column) for run in runs]) for t in targets] for column in (0, 1)]
    return Outcome(
        method=method,
        settings=runs[0]["settings"],
        trials=tried,
        loss=_spread([run["loss"] for run in runs]),
        updates=tuple(spreads[0]),
        micro_batches=tuple(spreads[1]),
        diverged=len(runs) - len(reached),
    )


def seed_runs(study: Study, method: Method, records: Records) -> list[Record]:
    """The runs that measure a method; none while one is missing."""
    runs = [records.of(study.name).get(Job(study, method, seed).name) for seed in study.seeds]
    return [] if None in runs else runs


def _spread(values: Sequence[float | None]) -> Spread:
    known = tuple(value for value in values if value is not None)
    return Spread(known if len(known) == len(values) else ())


def _loss_at(curve: Sequence[Sequence[float]], micro_batches: float) -> float:
    return next(loss for _, seen, loss in curve if seen >= micro_batches)
