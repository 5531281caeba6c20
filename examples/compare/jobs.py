"""The runs that the studies ask for, in order, and which of them can start."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..common.errors import InputError
from . import search
from .plan import Method, Study, chooser
from .records import Record, Records

_AT_ONCE = 2
"""Trials of one method that run at the same time: a trial knows all earlier ones but the last."""


@dataclass(frozen=True)
class Job:
    """One run. A trial has seed 0 and a number; other runs measure the chosen settings."""

    study: Study
    method: Method
    seed: int
    trial: int | None = None

    @property
    def name(self) -> str:
        """`METHOD/trial-I` or `METHOD/seed-I`: what finds the record within its study."""
        return f"{self.method.name}/" + (f"seed-{self.seed}" if self.trial is None else f"trial-{self.trial}")

    @property
    def split(self) -> str:
        return self.study.split if self.trial is None else "validation"


def all_jobs(studies: Mapping[str, Study]) -> Iterator[Job]:
    """All runs, in order: the first method of every study with its trials and seeds, then the second, and so on."""
    for place in range(max(len(study.methods) for study in studies.values())):
        for study in studies.values():
            for method in study.methods[place : place + 1]:
                yield from (Job(study, method, 0, trial) for trial in range(trials(study, method)))
                yield from (Job(study, method, seed) for seed in study.seeds)


def needed_jobs(wanted: set[str], studies: Mapping[str, Study]) -> list[Job]:
    """All runs of the studies named in `wanted`, and of others those that choose settings for them, in order."""
    choosers = {(chooser(studies[name], studies).name, m.name) for name in wanted for m in studies[name].methods}
    bases = {base for name in wanted | {study for study, _ in choosers} if (base := studies[name].base)}
    return [
        job
        for job in all_jobs(studies)
        if job.study.name in wanted | bases or (job.trial is not None and (job.study.name, job.method.name) in choosers)
    ]


def settings(job: Job, studies: Mapping[str, Study], records: Records) -> dict[str, Any] | None:
    """What the run is to use: the task's settings, the single worker's lr and beta2, the method's, then the trials'.

    None while it depends on runs that have not ended.
    """
    study, method = job.study, job.method
    given = _given(job, studies, records)
    if given is None:
        return None
    searched = _suggestion(job, records) if job.trial is not None else choice(chooser(study, studies), method, records)
    return None if searched is None else given | searched


def refuse_outdated(studies: Mapping[str, Study], records: Records) -> None:
    """Raise InputError for records whose settings are others than those that trials choose now.

    So it is where trials were added, or taken away, after what depends on their choice had been run.
    """
    for job in all_jobs(studies):
        record = records.of(job.study.name).get(job.name)
        if record is not None and (now := _expected(job, studies, records)) is not None:
            then = {key: value for key, value in record["settings"].items() if job.trial is None or key in now}
            if then != now:
                raise InputError(
                    f"{job.study.name} {job.name} was run with {_difference(then, now)} by what trials have chosen "
                    "since; delete the records that are older than the choice, or put the trials back"
                )


def _expected(job: Job, studies: Mapping[str, Study], records: Records) -> dict[str, Any] | None:
    """What `settings` gives, for a trial without what it tries itself."""
    if job.trial is None:
        return settings(job, studies, records)
    given = _given(job, studies, records)
    return None if given is None else {k: v for k, v in given.items() if k not in job.method.search}


def _difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    changed = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
    return ", ".join(f"{key} {then.get(key)}, which would be {now.get(key)}" for key in changed)


def _given(job: Job, studies: Mapping[str, Study], records: Records) -> dict[str, Any] | None:
    """The settings that are not the method's to search; None while the single worker's are not known."""
    study = job.study
    found = dict(study.task.settings)
    if study.base is not None:
        base = studies[study.base]
        tuned = choice(base, base.methods[0], records)
        if tuned is None:
            return None
        tuned = dict(base.methods[0].settings) | tuned
        found |= {key: tuned[key] for key in ("lr", "beta2") if key in tuned}
    return found | job.method.settings


def trials(study: Study, method: Method) -> int:
    """How many trials a method has in a study."""
    return study.trials if method.search and study.settings_of is None else 0


def choice(study: Study, method: Method, records: Records) -> dict[str, Any] | None:
    """What the trials of a method have chosen; None while some are missing, nothing where there are none."""
    tried = _trial_records(study, method, trials(study, method), records)
    if tried is None:
        return None
    return min(tried, key=_loss)["tried"] if tried else {}


def _suggestion(job: Job, records: Records) -> dict[str, Any] | None:
    assert job.trial is not None
    earlier = _trial_records(job.study, job.method, job.trial - _AT_ONCE + 1, records)
    if earlier is None:
        return None
    return search.suggest(job.method.search, job.trial, [(trial["tried"], trial["loss"]) for trial in earlier])


def _trial_records(study: Study, method: Method, count: int, records: Records) -> list[Record] | None:
    found = [records.of(study.name).get(Job(study, method, 0, trial).name) for trial in range(count)]
    complete = [record for record in found if record is not None]
    return complete if len(complete) == len(found) else None


def _loss(record: Record) -> float:
    return math.inf if record["loss"] is None else record["loss"]
