"""The front of updates and loss at equal tokens: batches that follow the noise beside fixed ones, on one task."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from .optimizers import FOLLOWS_NOISE, GROWS
from .plan import Study
from .runs import Runs, Stage, loss
from .tables import Outcome, markdown, outcomes, spread


@dataclass(frozen=True)
class Point:
    """A method at a batch, over all seeds that it has in any study.

    `family`: the method, without its factor. `batch`: the factor, or the micro-batches, in words. `is_fixed`: it is the
    same all the time. `follows_noise`: it is neither fixed nor planned. `is_muon`: Muon moves the matrices. `updates`,
    `losses`: of each seed; a loss is None where the run diverged.
    """

    family: str
    batch: str
    is_fixed: bool
    follows_noise: bool
    is_muon: bool
    trials: int
    updates: Sequence[int]
    losses: Sequence[float | None]

    @property
    def place(self) -> tuple[float, float] | None:
        """Mean updates and mean loss; None where a run diverged."""
        return None if None in self.losses else (fmean(self.updates), fmean(self.losses))


_SIGNS = {"growth_factor": "×", "update_price": "r = ", "norm_test": "η = "}


def points(single: Study, studies: Collection[Study], runs: Runs) -> list[Point]:
    """All that was run on the task of `single`, with the test split, the fewest updates first.

    None where no batch follows the noise.
    """
    pooled: dict[object, list[Outcome]] = defaultdict(list)
    for study in studies:
        if study.task == single.task and study.split == "test":
            for outcome in outcomes(study, runs):
                pooled[outcome.method.name, study.n, str(sorted(outcome.settings.items()))].append(outcome)
    found = [_point(same) for same in pooled.values()]
    if not any(point.follows_noise for point in found):
        return []
    return sorted(found, key=lambda point: (fmean(point.updates), point.family))


def _point(same: Sequence[Outcome]) -> Point:
    first, own = same[0], [run for outcome in same for run in outcome.runs]
    name, batch = first.method.name, f"n = {first.study.n}"
    follows = FOLLOWS_NOISE & first.settings.keys()
    for key in follows:
        name, batch = name.removesuffix(f"-{first.settings[key]}"), f"{_SIGNS[key]}{first.settings[key]:g}"
    trials = Stage(first.study.chooser, first.method, tunes=True).size
    updates = [max(run.intermediate_values, default=0) for run in own]
    is_fixed, is_muon = not GROWS & first.settings.keys(), "muon" in first.method.optimizer
    return Point(name, batch, is_fixed, bool(follows), is_muon, trials, updates, [loss(run) for run in own])


Line = Sequence[tuple[float, float, str]]
"""(updates, loss, batch), the fewest updates first."""


def lines(found: Iterable[Point]) -> dict[str, Line]:
    """The families of these points."""
    by_family = defaultdict(list)
    for point in found:
        if point.place:
            by_family[point.family].append((*point.place, point.batch))
    return {family: sorted(line) for family, line in by_family.items()}


def best(found: Iterable[Point]) -> Line:
    """The lowest loss at each number of updates, whatever the family."""
    lowest = {}
    for point in sorted((point for point in found if point.place), key=lambda point: -point.place[1]):
        lowest[point.place[0]] = (*point.place, point.batch)
    return sorted(lowest.values())


def at(line: Line, updates: float) -> float | None:
    """The loss of a line at so many updates, straight over their logarithm; None beyond its ends."""
    for (few, first, _), (many, second, _) in pairwise(line):
        if few <= updates <= many:
            return first + (second - first) * math.log(updates / few) / math.log(many / few)
    return None


def fronts(studies: Collection[Study], runs: Runs) -> str:
    """The fronts of all tasks on which a batch follows the noise, as Markdown."""
    tables = [_table(study.task.name, points(study, studies, runs)) for study in studies if study.base is None]
    return "\n\n".join(["# Updates and loss at equal tokens", _HOW, *filter(None, tables)]) + "\n"


def _table(task: str, found: Sequence[Point]) -> str:
    fixed = {is_muon: best(p for p in found if p.is_fixed and p.is_muon == is_muon) for is_muon in (True, False)}
    rows = []
    for point in found:
        last = "diverged" if point.place is None else spread(point.losses, 3)
        beside = None if point.is_fixed or point.place is None else at(fixed[point.is_muon], point.place[0])
        cells = ["", ""] if beside is None else [f"{beside:.3f}", f"{point.place[1] - beside:+.3f}"]
        seeds, trials = str(len(point.losses)), str(point.trials)
        rows.append([point.family, point.batch, spread(point.updates, 0), last, seeds, trials, *cells])
    head = ["method", "batch", "updates", "loss", "seeds", "trials", "fixed", "difference"]
    return "\n".join([f"## {task}\n", *markdown(head, rows)]) if rows else ""


_HOW = """Made by `python -m examples.compare report` from the records here, the fewest updates first.

- All runs of a task see the same tokens. The loss is the last one on the test split, "±" half the range over the seeds.
- A batch that follows the noise has F noise scales B ("×F"), or sqrt(r B) micro-batches, or what a norm test at η asks
  for. "n": micro-batches in a fixed one, and the largest of one that grows as planned (batch-warmup).
- "fixed": the best fixed batch at as many updates, of all methods with Muon beside one with Muon, of all others beside
  another. It lies on a straight line, over the logarithm of updates, between the lowest losses where fixed batches were
  run. The true curve sags below that line. Where "difference" is positive, a fixed batch is better than the one that
  grows."""
