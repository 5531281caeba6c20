"""Gloo ranks that live as long as the test session, since starting a DeepSpeed process costs seconds.

`ranks.run(function, …)` calls a function of a module on every rank and returns what each of them returned.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from benchmarks.command import free_port, remove_buffers
from tests.helpers.launch import rank_environment

WORLD = 2
START_PATIENCE = 600.0  # seconds; on its first start DeepSpeed compiles an extension
PATIENCE = 90.0  # for one function
GRACE = 15.0  # for the other ranks, once one of them has failed
STACKS = 5.0  # before the patience ends, a rank that still runs writes where it is into its log


class Ranks:
    """A failure on any rank fails the test, and costs a restart: what it left behind must not reach the next test."""

    def __init__(self, folder: Path, world: int = WORLD, patience: float = PATIENCE) -> None:
        self._folder, self._world, self._patience = folder, world, patience
        self._processes: list[BaseProcess] = []
        self._port = 0
        self._channels: list[Connection] = []

    def run(self, function: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> list[Any]:
        """The results of `function(*arguments, **keywords)` in the order of ranks."""
        if not self._processes:
            self._start()
        for channel in self._channels:
            channel.send_bytes(pickle.dumps((function, arguments, keywords)))
        answers = self._answers()
        failures = [f"--- rank {rank} ---\n{text}" for rank, (failed, text) in enumerate(answers) if failed]
        if failures:
            self.stop()
            raise AssertionError("\n".join([f"{function.__name__} failed on {len(failures)} rank(s)", *failures]))
        return [result for _, result in answers]

    def stop(self) -> None:
        """End the ranks; the next `run` starts new ones."""
        for channel in self._channels:
            channel.close()
        for process in self._processes:
            # Megatron's checkpoints start a process of multiprocessing's, which would wait for orders for ever.
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
            process.join()
        remove_buffers(self._port)
        self._processes, self._channels = [], []

    def _start(self) -> None:
        self._port = port = free_port()
        context = multiprocessing.get_context("spawn")
        for rank in range(self._world):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, self._world, port, self._log(rank), self._patience)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._channels.append(ours)
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        """No rank may be killed while it compiles: the lock that it leaves behind stops all later ones for ever."""
        for rank, channel in enumerate(self._channels):
            if not channel.poll(START_PATIENCE) or self._receive(rank)[0]:
                told = self._end_of_log(rank)
                self.stop()
                raise AssertionError(
                    f"rank {rank} did not start. Is there an old `lock` in torch's folder of extensions "
                    f"(TORCH_EXTENSIONS_DIR, or ~/.cache/torch_extensions)? {told}"
                )

    def _answers(self) -> list[tuple[bool, Any]]:
        """(failed, result or what went wrong) in the order of ranks."""
        received: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + self._patience
        while len(received) < self._world and time.monotonic() < deadline:
            for rank, channel in enumerate(self._channels):
                if rank in received or not channel.poll(0.01):
                    continue
                received[rank] = self._receive(rank)
                failed, _ = received[rank]
                if failed:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return [received.get(rank) or (True, f"hung; {self._end_of_log(rank)}") for rank in range(self._world)]

    def _receive(self, rank: int) -> tuple[bool, Any]:
        try:
            return pickle.loads(self._channels[rank].recv_bytes())
        except (EOFError, OSError):
            return True, f"died; {self._end_of_log(rank)}"

    def _log(self, rank: int) -> str:
        return str(self._folder / f"rank{rank}.log")

    def _end_of_log(self, rank: int) -> str:
        return "the end of its log:\n" + Path(self._log(rank)).read_text(errors="replace")[-4000:]


def _serve(channel: Connection, rank: int, world: int, port: int, log: str, patience: float) -> None:
    """The program of one rank."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(rank_environment(rank, world, port))
    import deepspeed
    import torch

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=patience))
    channel.send_bytes(pickle.dumps((False, "ready")))
    while True:
        try:
            function, arguments, keywords = pickle.loads(channel.recv_bytes())
        except EOFError:
            os._exit(0)  # no destructors: an engine of a failed test may wait for its peers for ever
        channel.send_bytes(pickle.dumps(_attempt(function, arguments, keywords, patience - STACKS)))


def _attempt(function: Callable[..., Any], arguments: Any, keywords: Any, stacks: float) -> tuple[bool, Any]:
    import torch

    torch.manual_seed(0)
    faulthandler.dump_traceback_later(stacks, file=sys.__stderr__)
    try:
        return False, function(*arguments, **keywords)
    except Exception:
        return True, traceback.format_exc()
    finally:
        faulthandler.cancel_dump_traceback_later()
        gc.collect()
        gc.freeze()  # what is left: imports. The collection after the next test need not look at them again.
