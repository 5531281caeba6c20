"""From runs to numbers, and to the tables of all studies as Markdown."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean
from typing import Any

from optuna.trial import FrozenTrial

from .optimizers import windows
from .plan import Method, Study
from .runs import Runs, Stage, loss

TARGETS = (1 / 8, 1 / 4, 1 / 2)
"""The targets are the mean losses that the single worker has after these shares of its run."""
_MIDDLE = 1
"""The target of the overviews."""
_HIDDEN = ("weight_decay", "clip")
"""Settings that all methods of a task share."""
Curve = Sequence[tuple[int, int, float]]
"""Evaluations: (update, micro-batches seen, loss)."""


@dataclass(frozen=True)
class Spread:
    """Values of several seeds; none where a seed has none."""

    values: tuple[float, ...]

    def to(self, digits: int) -> str:
        """Mean and half the range."""
        if not self.values:
            return "not reached"
        return f"{self.mean:.{digits}f} ± {(max(self.values) - min(self.values)) / 2:.{digits}f}"

    @property
    def mean(self) -> float:
        return fmean(self.values)


@dataclass(frozen=True)
class Outcome:
    """What a method reached in a study, with all seeds: the curve of each, and the last losses."""

    study: Study
    method: Method
    settings: Mapping[str, Any]
    runs: Sequence[FrozenTrial]
    curves: Sequence[Curve]
    loss: Spread

    def took(self, target: float) -> str:
        """Updates to a target, and micro-batches where the batch was not n all the time."""
        updates, seen = (_spread([updates_to(curve, target, column) for curve in self.curves]) for column in (0, 1))
        smaller = updates.values and seen.mean < 0.99 * self.study.n * updates.mean
        return updates.to(0) + (f" ({seen.mean:,.0f} micro-batches)" if smaller else "")


def outcomes(study: Study, runs: Runs) -> list[Outcome]:
    """The methods whose seeds have all been run, the lowest loss first."""
    found = filter(None, (_outcome(study, method, runs) for method in study.methods))
    return sorted(found, key=lambda o: (not o.loss.values, o.loss.values and o.loss.mean))


def _outcome(study: Study, method: Method, runs: Runs) -> Outcome | None:
    stage = Stage(study, method, tunes=False)
    by_seed = {run.user_attrs["seed"]: run for run in runs.of(stage) if run.state.is_finished()}
    settings = runs.settings(stage)
    if settings is None or not by_seed.keys() >= set(study.seeds):
        return None
    own = [by_seed[seed] for seed in study.seeds]
    seen = [0, *accumulate(windows(settings, study.n, study.task.micro_batches))]
    curves = [[(update, seen[update], loss) for update, loss in run.intermediate_values.items()] for run in own]
    return Outcome(study, method, settings, own, curves, _spread([loss(run) for run in own]))


def targets(study: Study, runs: Runs) -> list[float]:
    """Mean losses of the single worker after the shares `TARGETS` of its run; none while a seed is missing, or
    where one diverged."""
    single = study.base or study
    found = _outcome(single, single.methods[0], runs)
    if found is None or not found.loss.values:
        return []
    goals = [share * single.task.micro_batches for share in TARGETS]
    return [fmean(next(loss for _, seen, loss in curve if seen >= goal) for curve in found.curves) for goal in goals]


def updates_to(curve: Curve, target: float, column: int = 0) -> float | None:
    """Where a curve first reaches `target`, by a line from the point before; None where it never does.

    `column` 0 gives updates, 1 micro-batches.
    """
    for before, point in zip([None, *curve], curve, strict=False):
        if point[2] <= target:
            if before is None:
                return point[column]
            share = (before[2] - target) / (before[2] - point[2])
            return before[column] + share * (point[column] - before[column])
    return None


def _spread(values: Sequence[float | None]) -> Spread:
    known = tuple(value for value in values if value is not None)
    return Spread(known if len(known) == len(values) else ())


def tables(studies: Collection[Study], runs: Runs) -> str:
    """All studies of which a method has been run with all its seeds."""
    overviews = [overview(study, studies, runs) for study in studies if study.base is None]
    return "\n\n".join(["# Results", _HOW, *filter(None, [*overviews, *(table(s, runs) for s in studies)])]) + "\n"


def overview(single: Study, studies: Collection[Study], runs: Runs) -> str:
    """All batches of a task beside each other, a row for each method; the layout of the LENA paper's tables. Of
    several studies of one batch, the first is shown."""
    of_task = [s for s in studies if s.base and s.task == single.task and s.split == "test"]
    first = {study.n: study for study in reversed(of_task)}
    goals = targets(single, runs)
    cells: dict[str, dict[int, str]] = {}
    for n in sorted(first):
        for outcome in outcomes(first[n], runs) if goals else []:
            cells.setdefault(outcome.method.name, {})[n] = _cell(outcome, goals[_MIDDLE])
    if not cells:
        return ""
    ns = [n for n in sorted(first) if any(n in row for row in cells.values())]
    measure = "accuracy" if single.task.measure == "share of errors" else "loss"
    lines = [
        f"## {single.task.name}: last {measure}, updates to {goals[_MIDDLE]:.3f}",
        "",
        _row("method", *(f"n = {n}" for n in ns)),
        _row(*["---"] * (1 + len(ns))),
        *(_row(name, *(row.get(n, "") for n in ns)) for name, row in cells.items()),
    ]
    return "\n".join(lines)


def _cell(outcome: Outcome, goal: float) -> str:
    if not outcome.loss.values:
        return "diverged"
    loss, errors = outcome.loss.mean, outcome.study.task.measure == "share of errors"
    return (f"{100 * (1 - loss):.2f}%" if errors else f"{loss:.3f}") + f", {outcome.took(goal)}"


def table(study: Study, runs: Runs) -> str:
    """One study, a row for each method."""
    found, goals, task = outcomes(study, runs), targets(study, runs), study.task
    if not found:
        return ""
    updates = max((curve[-1][0] for outcome in found for curve in outcome.curves if curve), default=0)
    lines = [
        f"## {study.name}: {task.name}, n = {study.n}",
        f"{task.measure.capitalize()} on the {study.split} split, {len(study.seeds)} seeds; "
        f"{task.micro_batches:,} micro-batches" + (f" in {updates:,} updates at most." if study.n > 1 else "."),
        "",
        _row("method", task.measure, *(f"updates to {goal:.3f}" for goal in goals), "trials", "settings"),
        _row(*["---"] * (4 + len(goals))),
    ]
    for outcome in found:
        diverged = sum(loss(run) is None for run in outcome.runs)
        last = f"{diverged} of {len(study.seeds)} diverged" if diverged else outcome.loss.to(3)
        trials = Stage(study.chooser, outcome.method, tunes=True).size
        took = map(outcome.took, goals)
        lines.append(_row(outcome.method.name, last, *took, str(trials), _words(outcome.settings)))
    return "\n".join(lines)


def _words(settings: Mapping[str, Any]) -> str:
    shown = sorted((key, value) for key, value in settings.items() if key not in _HIDDEN)
    return ", ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


_HOW = f"""Made by `python -m examples.compare report` from the records here; `studies.py` says what is run.

- Every method that is searched has the same number of trials, with seed 0, chosen by the last loss on the validation
  split. The seeds of the tables are others, and their split has been seen by no choice, unless the split is called
  validation.
- "±" is half the range over the seeds. "updates to X": X is the mean loss of the single worker after
  {", ".join(f"{share:.3g}" for share in TARGETS)} of its run; between two evaluations a straight line is taken.
  Micro-batches stand beside them where the batch grows over the run: such a run has more and smaller updates.
- `lr` is the single worker's, or the method's own; `lr_power` p multiplies it by n^p. `beta2` that is not searched is
  the single worker's, too."""
