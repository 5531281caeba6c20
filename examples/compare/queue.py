"""Runs the jobs of all studies, one on each core, in their order; what has a record is not run again."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from .jobs import Job, needed_jobs, settings
from .plan import Study
from .records import Record, Records
from .training import train

_ROOT = Path(__file__).parents[2]
_VERSIONED = ("torch", "transformers", "datasets", "optuna", "schedulefree")


def run(studies: Mapping[str, Study], records: Records, wanted: set[str], workers: int | None = None) -> None:
    """Run the studies named in `wanted` and what chooses their settings. Interrupted, it goes on where it was."""
    waiting = [job for job in needed_jobs(wanted, studies) if job.name not in records.of(job.study.name)]
    code = _code()  # now: files may change while the queue runs what it has loaded
    running: dict[Future[dict[str, Any]], tuple[Job, dict[str, Any]]] = {}
    workers = workers or os.cpu_count() or 1
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        while waiting or running:
            for job in list(waiting):
                if len(running) == workers:
                    break
                chosen = settings(job, studies, records)
                if chosen is not None:
                    running[pool.submit(_train, job, chosen)] = job, chosen
                    waiting.remove(job)
            assert running, f"nothing that {waiting[0].name} waits for is going to be run"
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                job, chosen = running.pop(future)
                record = _record(job, chosen, future.result(), code)
                records.add(job.study.name, record)
                print(_line(job, record), f"{len(waiting) + len(running)} to go", flush=True)


def _train(job: Job, chosen: dict[str, Any]) -> dict[str, Any]:
    study, measured = job.study, job.trial is None
    return train(
        study.task,
        job.method.optimizer,
        chosen,
        study.n,
        job.seed,
        job.split,
        evaluations=study.task.evaluations if measured else 1,  # a trial is judged by its last loss
        reports=measured and job.seed == study.seeds[0],
    )


def _record(job: Job, chosen: dict[str, Any], found: dict[str, Any], code: dict[str, Any]) -> Record:
    return {
        "job": job.name,
        "method": job.method.name,
        "trial": job.trial,
        "seed": job.seed,
        "split": job.split,
        "settings": chosen,
        "tried": {key: chosen[key] for key in job.method.search} if job.trial is not None else {},
        **found,
        "digest": job.study.digest(job.method),
        "command": f"python -m examples.compare run {job.study.name}",
        **code,
    }


def _code() -> dict[str, Any]:
    """What the runs are made with: this repository's commit, and versions of others."""
    return {"commit": _commit(), "versions": {package: version(package) for package in _VERSIONED}}


def _commit() -> str:
    """The commit of the code that was run, with a `+` where files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=False, cwd=_ROOT
        ).stdout.strip()

    changed = git("status", "--porcelain", "--", "ds_lena", "examples/common", "examples/compare/*.py")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def _line(job: Job, record: Record) -> str:
    loss = "diverged" if record["loss"] is None else f"{record['loss']:.4f}"
    tried = ", ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in record["tried"].items())
    return f"{job.study.name} {job.name}: {loss} in {record['seconds']} s  {tried} "
