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
class Outcome:
    """What a method reached in a study: a run and its curve for each seed, the mean of the last losses.

    `loss` is None where a run diverged.
    """

    study: Study
    method: Method
    settings: Mapping[str, Any]
    runs: Sequence[FrozenTrial]
    curves: Sequence[Curve]
    loss: float | None

    def took(self, target: float) -> str:
        """Updates to a target, and micro-batches where the batch was not n all the time."""
        updates, seen = ([updates_to(curve, target, column) for curve in self.curves] for column in (0, 1))
        if None in updates:
            return "not reached"
        smaller = fmean(seen) < 0.99 * self.study.n * fmean(updates)
        return spread(updates, 0) + (f" ({fmean(seen):,.0f} micro-batches)" if smaller else "")


def outcomes(study: Study, runs: Runs) -> list[Outcome]:
    """The methods whose seeds have all been run, the lowest loss first."""
    found = filter(None, (_outcome(study, method, runs) for method in study.methods))
    return sorted(found, key=lambda outcome: (outcome.loss is None, outcome.loss))


def _outcome(study: Study, method: Method, runs: Runs) -> Outcome | None:
    stage = Stage(study, method, tunes=False)
    by_seed = {run.user_attrs["seed"]: run for run in runs.of(stage) if run.state.is_finished()}
    settings = runs.settings(stage)
    if settings is None or not by_seed.keys() >= set(study.seeds):
        return None
    own = [by_seed[seed] for seed in study.seeds]
    curves = []
    for run in own:
        counted = [size for size, updates in run.user_attrs.get("batches", []) for _ in range(updates)]
        seen = [0, *accumulate(counted or windows(settings, study.n, study.task.micro_batches))]
        curves.append([(update, seen[update], loss) for update, loss in run.intermediate_values.items()])
    losses = [loss(run) for run in own]
    return Outcome(study, method, settings, own, curves, None if None in losses else fmean(losses))


def targets(study: Study, runs: Runs) -> list[float]:
    """Mean losses of the single worker after the shares `TARGETS` of its run; none while a seed is missing, or
    where one diverged."""
    single = study.base or study
    found = _outcome(single, single.methods[0], runs)
    if found is None or found.loss is None:
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
    rows: dict[str, dict[int, str]] = {}
    for n in sorted(first):
        for outcome in outcomes(first[n], runs) if goals else []:
            rows.setdefault(outcome.method.name, {})[n] = _cell(outcome, goals[_MIDDLE])
    if not rows:
        return ""
    ns = [n for n in sorted(first) if any(n in row for row in rows.values())]
    measure = "accuracy" if single.task.measure == "share of errors" else "loss"
    title = f"## {single.task.name}: last {measure}, updates to {goals[_MIDDLE]:.3f}\n"
    cells = [[name, *(row.get(n, "") for n in ns)] for name, row in rows.items()]
    return "\n".join([title, *markdown(["method", *(f"n = {n}" for n in ns)], cells)])


def _cell(outcome: Outcome, goal: float) -> str:
    if outcome.loss is None:
        return "diverged"
    errors = outcome.study.task.measure == "share of errors"
    value = f"{100 * (1 - outcome.loss):.2f}%" if errors else f"{outcome.loss:.3f}"
    return f"{value}, {outcome.took(goal)}"


def table(study: Study, runs: Runs) -> str:
    """One study, a row for each method."""
    found, goals, task = outcomes(study, runs), targets(study, runs), study.task
    if not found:
        return ""
    updates = max((curve[-1][0] for outcome in found for curve in outcome.curves if curve), default=0)
    title = (
        f"## {study.name}: {task.name}, n = {study.n}\n"
        f"{task.measure.capitalize()} on the {study.split} split, {len(study.seeds)} seeds; "
        f"{task.micro_batches:,} micro-batches" + (f" in {updates:,} updates at most.\n" if study.n > 1 else ".\n")
    )
    rows = []
    for outcome in found:
        losses = [loss(run) for run in outcome.runs]
        last = f"{losses.count(None)} of {len(losses)} diverged" if outcome.loss is None else spread(losses, 3)
        trials = Stage(study.chooser, outcome.method, tunes=True).size
        rows.append([outcome.method.name, last, *map(outcome.took, goals), str(trials), _words(outcome.settings)])
    head = ["method", task.measure, *(f"updates to {goal:.3f}" for goal in goals), "trials", "settings"]
    return "\n".join([title, *markdown(head, rows)])


def spread(values: Sequence[float], digits: int) -> str:
    """Mean, and half the range."""
    return f"{fmean(values):.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"


def _words(settings: Mapping[str, Any]) -> str:
    shown = sorted((key, value) for key, value in settings.items() if key not in _HIDDEN)
    return ", ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


_HOW = f"""Made by `python -m examples.compare report` from the records here; `studies.py` says what is run.

- Every method that is searched has the same number of trials, with seed 0, chosen by the last loss on the validation
  split. The seeds of the tables are others, and their split has been seen by no choice, unless the split is called
  validation.
- "±" is half the range over the seeds. "updates to X": X is the mean loss of the single worker after
  {", ".join(f"{share:.3g}" for share in TARGETS)} of its run; between two evaluations a straight line is taken.
  Micro-batches stand beside them where the batch grows over the run: such a run has more and smaller updates.
- `lr` is the single worker's, or the method's own; `lr_power` p multiplies it by n^p. `beta2` that is not searched is
  the single worker's, too."""
