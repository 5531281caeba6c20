"""Run many cases in one set of gloo ranks: starting DeepSpeed costs seconds, a case costs one.

A case that fails or hangs costs a restart of the ranks; the cases after it still run.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import free_port, remove_buffers
from tests.helpers.case import Case

ROOT = Path(__file__).parents[2]
PATIENCE = 150.0  # seconds without a finished case before the ranks are given up
GRACE = 20.0  # the same once a rank has failed, or has died


@dataclass
class Outcome:
    """What every rank returned from one case, or what went wrong on it."""

    results: dict[int, Any] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)

    def on_every_rank(self) -> list[Any]:
        """The results in the order of ranks; an AssertionError with all that is known where one is missing."""
        if self.errors:
            told = "\n".join(f"--- rank {rank} ---\n{text}" for rank, text in sorted(self.errors.items()))
            raise AssertionError(f"the case failed on {len(self.errors)} rank(s)\n{told}")
        return [self.results[rank] for rank in sorted(self.results)]


def result_path(folder: Path, number: int, rank: int) -> Path:
    """Where a rank leaves what came of a case."""
    return folder / f"case{number}.rank{rank}.pt"


def started_path(folder: Path) -> Path:
    """Exists once all ranks have found each other."""
    return folder / "started"


def launch(cases: Sequence[Case], folder: Path) -> list[Outcome]:
    """One outcome per case; all cases must have the same world size and device."""
    ((world, device),) = {(case.world, case.device) for case in cases}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.pkl").write_bytes(pickle.dumps(list(cases)))
    outcomes: list[Outcome] = []
    while len(outcomes) < len(cases):
        started_path(folder).unlink(missing_ok=True)
        _run_ranks(folder, len(outcomes), len(cases), world, device)
        if not started_path(folder).exists():  # nor would they for the next case
            return outcomes + [_collect(folder, number, world) for number in range(len(outcomes), len(cases))]
        finished = len(outcomes)
        while finished < len(cases) and _complete(folder, finished, world):
            finished += 1
        last_failed = finished > len(outcomes) and any(
            "error" in torch.load(result_path(folder, finished - 1, rank), weights_only=False) for rank in range(world)
        )
        # A case with missing files is the one that hung or killed its ranks.
        stop = finished if finished == len(cases) or last_failed else finished + 1
        outcomes += [_collect(folder, number, world) for number in range(len(outcomes), stop)]
    return outcomes


def _complete(folder: Path, number: int, world: int) -> bool:
    return all(result_path(folder, number, rank).exists() for rank in range(world))


def _collect(folder: Path, number: int, world: int) -> Outcome:
    outcome = Outcome()
    for rank in range(world):
        path = result_path(folder, number, rank)
        if not path.exists():
            log = (folder / f"rank{rank}.log").read_text(errors="replace")
            outcome.errors[rank] = f"hung, died or never started; the end of its log:\n{log[-4000:]}"
            continue
        answer = torch.load(path, weights_only=False)
        if "error" in answer:
            outcome.errors[rank] = answer["error"]
        else:
            outcome.results[rank] = answer["result"]
    return outcome


def _run_ranks(folder: Path, first: int, total: int, world: int, device: str) -> None:
    """Start the ranks at case `first`; return when they have ended, on their own or not."""
    port = free_port()
    processes = [_start(folder, first, rank, world, port, device) for rank in range(world)]
    awaited = [result_path(folder, number, rank) for number in range(first, total) for rank in range(world)]
    finished, since = 0, time.monotonic()
    try:
        while any(process.poll() is None for process in processes):
            time.sleep(0.05)
            now = sum(path.exists() for path in awaited)
            if now > finished:
                finished, since = now, time.monotonic()
            ended = any(process.poll() not in (None, 0) for process in processes)
            uneven = finished % world != 0 and _failed(folder, first + finished // world, world)
            if time.monotonic() - since > (GRACE if ended or uneven else PATIENCE):
                break
    finally:
        for process in processes:
            _end(process)
        remove_buffers(port)


def _failed(folder: Path, number: int, world: int) -> bool:
    paths = [result_path(folder, number, rank) for rank in range(world)]
    return any("error" in torch.load(path, weights_only=False) for path in paths if path.exists())


def rank_environment(rank: int, world: int, port: int, device: str = "cpu") -> dict[str, str]:
    """What a launcher tells a rank, for ranks on this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": device,
        "PYTHONHASHSEED": "0",  # DeepSpeed orders groups of experts by a hash
        # Compiling it takes longer than the patience with a rank. `test_cpu_adam.py` does it.
        "DS_BUILD_CPU_ADAM": "0",
    }


def _start(folder: Path, first: int, rank: int, world: int, port: int, device: str) -> subprocess.Popen[bytes]:
    environment = rank_environment(rank, world, port, device)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with (folder / f"rank{rank}.log").open("wb") as log:
        command = [sys.executable, "-m", "tests.helpers.ranks", str(folder), str(first)]
        return subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, stdout=log, stderr=log, start_new_session=True
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask a rank that still runs where it is (into its log), then kill it."""
    if process.poll() is None:
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.3)
        process.kill()
    process.wait()
