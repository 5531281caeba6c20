"""What the benchmarks' command lines share: options, ranks, results."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "deepspeed", "transformers", "timm", "ds_lena")
NOT_SETTINGS = {"out", "local_rank", "quick"}


def parser(description: str | None, seconds: float | None = None) -> argparse.ArgumentParser:
    """With the options that every benchmark has; `seconds`: the default, for one that measures time."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = made.add_argument
    add("--quick", action="store_true", help="tiny sizes and few repeats: whether it runs, not how fast")
    add("--threads", type=int, default=1, help="torch's threads in each process; default: 1")
    add("--out", type=Path, help="write all measurements to this JSON file")
    add("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher's
    if seconds is not None:
        add("--seconds", type=float, default=seconds, help=f"to measure each case; default: {seconds:g}")
    return made


def parse(made: argparse.ArgumentParser, quick: Mapping[str, Any]) -> argparse.Namespace:
    """`quick`: the defaults under --quick."""
    if "--quick" in sys.argv:
        made.set_defaults(**quick)
    args = made.parse_args()
    if not isinstance(vars(args).get("ranks", []), list):  # as a launcher says, as asked for, one for each GPU, or 2
        args.ranks = int(os.environ.get("WORLD_SIZE", args.ranks or torch.accelerator.device_count() or 2))
    return args


def one_process(threads: int) -> torch.device:
    """Prepare this process for a benchmark without ranks; returns the device."""
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for the OpenMP that DeepSpeed's kernels bring
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def remove_buffers(port: int) -> None:
    """Of DeepSpeed's communication kernel, which leaves 66 MiB of main memory for each rank behind when it ends."""
    for file in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_127.0.0.1_{port}_*"):
        file.unlink(missing_ok=True)


def launcher(ranks: int, port: int) -> list[str]:
    """The `deepspeed` command for ranks on this machine, of this very environment; a script and its options follow."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner"]
    return [*command, "--num_gpus", str(ranks), "--num_nodes", "1", "--master_port", str(port)]


def start_ranks(module: str, options: Sequence[str], ranks: int, threads: int, quiet: bool = False) -> int:
    """Run a module of this folder once for each rank by torchrun, which ends all when one fails; its exit code."""
    port = free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(port), "-m", module, *options]
    environment = os.environ | {"LOCAL_SIZE": str(ranks), "OMP_NUM_THREADS": str(threads)}
    try:
        return subprocess.run(
            command, env=environment, stdout=subprocess.DEVNULL if quiet else None, check=False
        ).returncode
    finally:
        remove_buffers(port)


def leave(status: int = 0) -> NoReturn:
    """End a rank that has done its work. Without the interpreter's clean-up, which threads of gloo may not survive."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_on_ranks(module: str, args: argparse.Namespace, run: Callable[[], tuple[str, Any]]) -> int:
    """Start the ranks of a module, or, as one of them, run the benchmark; rank 0 presents."""
    if "RANK" not in os.environ:
        return start_ranks(module, sys.argv[1:], args.ranks, args.threads)
    machine = describe()
    tables, found = run()
    if os.environ["RANK"] == "0":
        present(module, args, machine, tables, found)
    leave()


def present(module: str, args: argparse.Namespace, machine: str, tables: str, found: Any) -> None:
    """Print the tables and write the file. `machine`: described before the run, for the load average."""
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    words = {name: " ".join(map(str, value)) if isinstance(value, list) else value for name, value in settings.items()}
    command = shlex.join(["python", "-m", module, *(word for word in sys.argv[1:] if "local_rank" not in word)])
    said = "; ".join(f"{name} {value}" for name, value in words.items() if value)
    print(f"`{command}`\n\n- {machine}\n- {said}\n\n{tables}")
    if args.out:
        results = {"command": command, "machine": machine, "settings": settings, "found": found}
        args.out.write_text(json.dumps(results, indent=1) + "\n")


def describe() -> str:
    """Hardware, its load at present, versions, and the commit of ds_lena, "+changes" where files differ from it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    found = [(name, next(iter(importlib.metadata.distributions(name=name)), None)) for name in PACKAGES]
    versions = ", ".join(f"{name} {one.version}" for name, one in found if one)
    commit = _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain", "ds_lena") else "")
    hardware = ", ".join(gpus or [f"{cpu}, {len(os.sched_getaffinity(0))} cores"])
    return f"{hardware}; load average before {os.getloadavg()[0]:.1f}; {versions}, commit {commit or 'unknown'}"


def _git(*arguments: str) -> str:
    if not shutil.which("git"):
        return ""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()
