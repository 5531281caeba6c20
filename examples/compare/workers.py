"""Runs the stages on all cores; what has been run is not run again."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.synchronize import Lock
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import torch
from optuna.trial import TrialState

from .runs import Runs, Stage
from .training import train

_ROOT = Path(__file__).parents[2]
_VERSIONED = ("torch", "transformers", "datasets", "optuna", "schedulefree")
_AT_ONCE = 2
"""Trials of one method that run at the same time: the more, the less each of them knows of the others."""
_POLL_SECONDS = 0.5


class _Job(NamedTuple):
    stage: Stage
    study: optuna.Study
    trial: optuna.Trial
    settings: dict[str, Any]


def run(stages: Sequence[Stage], folder: Path, workers: int) -> None:
    """Run all stages. Interrupted at any time, the next call goes on from the runs that have ended."""
    studies = {stage.study.name: stage.study for stage in stages}.values()
    runs = Runs(folder)
    for study in studies:
        runs.tidy(study)
    for stage in stages:
        runs.check(stage)
    left = sum(max(0, stage.size - len(runs.of(stage))) for stage in stages)
    print(f"{left} runs to go", flush=True)
    if left > 0:
        lock = get_context("spawn").Lock()
        torch.multiprocessing.spawn(_work, (stages, folder, lock, _code()), nprocs=min(workers, left), daemon=True)
        for study in studies:
            runs.tidy(study)


def _work(rank: int, stages: Sequence[Stage], folder: Path, lock: Lock, code: dict[str, str]) -> None:
    for job in _jobs(stages, Runs(folder), lock):
        for key, value in code.items():
            job.trial.set_user_attr(key, value)
        _train(job)


def _jobs(stages: Sequence[Stage], runs: Runs, lock: Lock) -> Iterator[_Job]:
    """Runs for this process, until all have begun."""
    while True:
        with lock:
            todo = [stage for stage in stages if len(runs.of(stage)) < stage.size]
            job = next(filter(None, (_begin(stage, runs) for stage in todo)), None)
        if not todo:
            return
        if job is None:
            time.sleep(_POLL_SECONDS)  # all that is left waits for runs of other processes
        else:
            yield job


def _begin(stage: Stage, runs: Runs) -> _Job | None:
    settings = runs.settings(stage)
    running = sum(not run.state.is_finished() for run in runs.of(stage))
    if settings is None or (stage.tunes and running >= _AT_ONCE):
        return None
    study, trial = runs.begin(stage, settings)
    return _Job(stage, study, trial, settings | trial.params)


def _train(job: _Job) -> None:
    stage, trial = job.stage, job.trial
    seed = trial.user_attrs.get("seed", 0)
    began = time.monotonic()
    try:
        found: float | None = train(stage, job.settings, seed, trial)
    except optuna.TrialPruned:
        found = None
    trial.set_user_attr("seconds", round(time.monotonic() - began))
    job.study.tell(trial, found, TrialState.PRUNED if found is None else TrialState.COMPLETE)
    tried = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial.params.items())
    what = f"trial {trial.number}" if stage.tunes else f"seed {seed}"
    result = "diverged" if found is None else f"{found:.4f}"
    print(f"{stage.study.name} {stage.method.name} {what}: {result} {tried}", flush=True)


def _code() -> dict[str, str]:
    """What the runs are made with: the commit, with a `+` where files differ from it, and versions of others."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=False, cwd=_ROOT
        ).stdout.strip()

    changed = git("status", "--porcelain", "--", "ds_lena", "examples/common", "examples/compare/*.py")
    commit = (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")
    return {"commit": commit, "versions": ", ".join(f"{package} {version(package)}" for package in _VERSIONED)}
