"""Runs the stages on all cores; what has been run is not run again."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import version
from multiprocessing import get_context, parent_process
from multiprocessing.synchronize import Lock
from pathlib import Path
from typing import Any

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
    """One process: run what no other has begun, until there is no more."""
    # torch has SIGINT sent when the parent dies. As a KeyboardInterrupt it could get lost, say in a destructor.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    runs = Runs(folder)
    while parent_process().is_alive():
        with lock:
            todo = [stage for stage in stages if len(runs.of(stage)) < stage.size]
            begun = next(filter(None, (_begin(stage, runs) for stage in todo)), None)
        if begun:
            _train(*begun, code)
        elif todo:
            time.sleep(_POLL_SECONDS)  # all that is left waits for runs of other processes
        else:
            return


def _begin(stage: Stage, runs: Runs) -> tuple[Stage, dict[str, Any], optuna.Study, optuna.Trial] | None:
    settings = runs.settings(stage)
    running = sum(not run.state.is_finished() for run in runs.of(stage))
    if settings is None or (stage.tunes and running >= _AT_ONCE):
        return None
    return stage, settings, *runs.begin(stage, settings)


def _train(
    stage: Stage, settings: dict[str, Any], study: optuna.Study, trial: optuna.Trial, code: dict[str, str]
) -> None:
    for key, value in code.items():
        trial.set_user_attr(key, value)
    seed = trial.user_attrs.get("seed", 0)
    began = time.monotonic()
    try:
        found: float | None = train(stage, settings | trial.params, seed, trial)
    except optuna.TrialPruned:
        found = None
    trial.set_user_attr("seconds", round(time.monotonic() - began))
    study.tell(trial, found, TrialState.PRUNED if found is None else TrialState.COMPLETE)
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
