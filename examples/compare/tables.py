"""The tables of all studies, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .plan import Study
from .records import Records
from .summary import TARGETS, Outcome, Spread, outcomes, targets

_MIDDLE = 1
"""The target of the overviews: what the single worker has after a quarter of its run."""
_HIDDEN = ("weight_decay", "clip")
"""Settings that all methods of a task share."""


def tables(studies: Mapping[str, Study], records: Records) -> str:
    """All studies of which a method has been run with all its seeds."""
    parts = [part for study in studies.values() if (part := table(study, studies, records))]
    overviews = [part for s in studies.values() if s.base is None and (part := overview(s, studies, records))]
    return "\n\n".join(["# Results", _HOW, *overviews, *parts]) + "\n"


def overview(single: Study, studies: Mapping[str, Study], records: Records) -> str:
    """All batches of a task beside each other, a row for each method; the layout of the LENA paper's tables. Of
    several studies of one batch, the first is shown."""
    of_task = [s for s in studies.values() if s.base and s.task == single.task and s.split == "test"]
    first = {study.n: study for study in reversed(of_task)}
    larger = [first[n] for n in sorted(first)]
    goals = targets(single, records)
    cells: dict[str, dict[int, str]] = {}
    for study in larger:
        for outcome in outcomes(study, studies, goals, records):
            cells.setdefault(outcome.method.name, {})[study.n] = _cell(outcome, study)
    if not cells or not goals:
        return ""
    ns = [study.n for study in larger if any(study.n in row for row in cells.values())]
    measure = "accuracy" if single.task.kind == "images" else "loss"
    lines = [
        f"## {single.task.name}: last {measure}, updates to {_target(goals[_MIDDLE])}",
        "",
        _row("method", *(f"n = {n}" for n in ns)),
        _row(*["---"] * (1 + len(ns))),
        *(_row(name, *(row.get(n, "") for n in ns)) for name, row in cells.items()),
    ]
    return "\n".join(lines)


def _cell(outcome: Outcome, study: Study) -> str:
    if not outcome.loss.values:
        return "diverged"
    loss = outcome.loss.mean
    value = f"{100 * (1 - loss):.2f}%" if study.task.kind == "images" else f"{loss:.3f}"
    return f"{value}, {_took(outcome.updates[_MIDDLE], outcome.micro_batches[_MIDDLE], study.n)}"


def table(study: Study, studies: Mapping[str, Study], records: Records) -> str:
    """One study, a row for each method."""
    goals = targets(studies[study.base or study.name], records)
    found = outcomes(study, studies, goals, records)
    if not found:
        return ""
    runs = records.of(study.name).values()
    updates = max((run["curve"][-1][0] for run in runs if run["trial"] is None and run["curve"]), default=0)
    lines = [
        f"## {study.name}: {study.task.name}, n = {study.n}",
        f"{study.task.measure.capitalize()} on the {study.split} split, {len(study.seeds)} seeds; "
        f"{study.task.micro_batches:,} micro-batches" + (f" in {updates:,} updates at most." if study.n > 1 else "."),
        "",
        _row("method", study.task.measure, *(f"updates to {_target(goal)}" for goal in goals), "trials", "settings"),
        _row(*["---"] * (4 + len(goals))),
    ]
    lines += [_line(outcome, study) for outcome in found]
    return "\n".join(lines)


def _line(outcome: Outcome, study: Study) -> str:
    settings = {key: value for key, value in outcome.settings.items() if key not in _HIDDEN}
    loss = f"{outcome.diverged} of {len(study.seeds)} diverged" if outcome.diverged else _spread(outcome.loss, 3)
    reached = [_took(*both, study.n) for both in zip(outcome.updates, outcome.micro_batches, strict=True)]
    return _row(outcome.method.name, loss, *reached, str(outcome.trials), _words(settings))


def _took(updates: Spread, micro_batches: Spread, n: int) -> str:
    """Updates, and micro-batches where the batch was not n all the time."""
    smaller = updates.values and micro_batches.mean < 0.99 * n * updates.mean
    return _spread(updates, 0) + (f" ({micro_batches.mean:,.0f} micro-batches)" if smaller else "")


def _target(goal: float) -> str:
    return f"{goal:.3f}"


def _spread(spread: Spread, digits: int) -> str:
    return f"{spread.mean:.{digits}f} ± {spread.half_range:.{digits}f}" if spread.values else "not reached"


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in sorted(settings.items()))


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


_HOW = f"""Made by `python -m examples.compare report` from the records here; `studies.yaml` says what is run.

- Every method that is searched has the same number of trials, with seed 0, chosen by the last loss on the validation
  split. The seeds of the tables are others, and their split has been seen by no choice, unless the split is called
  validation.
- "±" is half the range over the seeds. "updates to X": X is the mean loss of the single worker after
  {", ".join(f"{share:.3g}" for share in TARGETS)} of its run; between two evaluations a straight line is taken.
  Micro-batches stand beside them where the batch grows over the run: such a run has more and smaller updates.
- `lr` is the single worker's, or the method's own; `lr_power` p multiplies it by n^p. `beta2` that is not searched is
  the single worker's, too."""
