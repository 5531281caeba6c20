"""Programs in processes of their own: one rank of Python code, or a script under the deepspeed launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.command import free_port, remove_buffers
from tests.integrations._ranks import WORLD, rank_environment

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "scripts"
PATIENCE = 600.0  # seconds; on its first start DeepSpeed compiles an extension


def python(*arguments: str) -> str:
    """What `python …` printed, as the only rank of its world."""
    return _finish([sys.executable, *arguments], rank_environment(0, 1, free_port()))


def launch(*arguments: str) -> str:
    """What `deepspeed … …` printed, with two ranks on this machine."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]
    port = free_port()
    options = ["--num_gpus", str(WORLD), "--num_nodes", "1", "--master_port", str(port)]
    try:
        return _finish([*launcher, *options, *arguments], {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})
    finally:
        remove_buffers(port)


def _finish(command: list[str], environment: dict[str, str]) -> str:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        env=os.environ | environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout
