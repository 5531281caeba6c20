"""Programs in processes of their own: one rank of Python code, or a script under the deepspeed launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.command import free_port, launcher, remove_buffers
from tests.helpers.launch import rank_environment
from tests.integrations._ranks import WORLD

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "scripts"
EXAMPLES = ROOT / "examples"
PATIENCE = 600.0  # seconds; on its first start DeepSpeed compiles an extension
ON_CPU = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def python(*arguments: str) -> str:
    """What `python …` printed, as the only rank of its world."""
    return _succeeded(_finish([sys.executable, *arguments], rank_environment(0, 1, free_port())))


def launch(*arguments: str) -> str:
    """What `deepspeed … …` printed, with two ranks on this machine."""
    return _succeeded(attempt(*arguments))


def attempt(*arguments: str, ranks: int = WORLD, patience: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    """`deepspeed … …`, however it ends. After `patience` seconds it raises `subprocess.TimeoutExpired`."""
    port = free_port()
    try:
        return _finish(_deepspeed(port, arguments, ranks), ON_CPU, patience)
    finally:
        remove_buffers(port)


def accelerate(config: Path, *arguments: str) -> str:
    """What `accelerate launch … …` printed, with two ranks on this machine.

    The command's module is run by its own name: `accelerate` itself imports timm, which may lack torchvision.
    """
    port = free_port()
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    options = ["--num_processes", str(WORLD), "--main_process_port", str(port)]
    try:
        return _succeeded(_finish([*launcher, *options, *arguments], ON_CPU))
    finally:
        remove_buffers(port)


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """`deepspeed … …`, in a process group of its own as a terminal would start it; killed at the end."""
    port = free_port()
    process = subprocess.Popen(
        _deepspeed(port, arguments),
        cwd=ROOT,
        env=environment(ON_CPU),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        remove_buffers(port)


def _deepspeed(port: int, arguments: Sequence[str], ranks: int = WORLD) -> list[str]:
    return [*launcher(ranks, port), *arguments]


def launcher_of_a_host(hostfile: Path, number: int, first: str, port: int) -> list[str]:
    """The `deepspeed` command as one starts it on each host by hand. `first`: the address of host 0."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_ssh", "--node_rank", str(number)]
    return [*command, "--hostfile", str(hostfile), "--master_addr", first, "--master_port", str(port)]


def environment(more: dict[str, str]) -> dict[str, str]:
    """This process's, with `more`. Programs find this repository's packages in it."""
    return os.environ | more | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def _finish(command: list[str], more: dict[str, str], patience: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment(more),
        capture_output=True,
        text=True,
        timeout=patience,
        check=False,
    )


def _succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, f"{' '.join(done.args)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout
