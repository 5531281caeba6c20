"""What the benchmarks' command lines share: options, ranks, results."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks.machine import describe
from benchmarks.tables import heading
from benchmarks.timing import CLOCKS, Stopwatch

NOT_SETTINGS = {"out", "local_rank", "quick"}
Found = dict[str, Any]
"""What a benchmark returns: "cases", a list, and "left_out", names and reasons."""


def parser(description: str | None, seconds: float | None = None) -> argparse.ArgumentParser:
    """With the options that every benchmark has; `seconds`: the default, for one that measures time."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--quick", action="store_true", help="tiny sizes and few repeats: whether it runs, not how fast")
    made.add_argument("--threads", type=int, default=1, help="torch's threads in each process; default: 1")
    made.add_argument("--out", type=Path, help="write all measurements to this JSON file")
    made.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher's
    if seconds is not None:
        made.add_argument("--seconds", type=float, default=seconds, help=f"to measure each case; default: {seconds:g}")
        made.add_argument(
            "--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for a busy machine without a GPU"
        )
    return made


def parse(made: argparse.ArgumentParser, quick: Mapping[str, Any]) -> argparse.Namespace:
    """`quick`: the defaults under --quick."""
    if "--quick" in sys.argv:
        made.set_defaults(**quick)
    return made.parse_args()


def add_ranks(made: argparse.ArgumentParser) -> None:
    made.add_argument("--ranks", type=int, help="default: the number of GPUs; 2 without one")


def count_ranks(asked: int | None) -> int:
    """As a launcher says, as asked for, one for each GPU, or 2."""
    return int(os.environ.get("WORLD_SIZE", asked or torch.accelerator.device_count() or 2))


def one_process(threads: int) -> torch.device:
    """Prepare this process for a benchmark without ranks; returns the device."""
    # DeepSpeed's kernels bring an OpenMP of their own, which reads this when it is loaded.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def stopwatch_for(device: torch.device, clock: str) -> Stopwatch:
    return Stopwatch(clock, _no_wait if device.type == "cpu" else torch.accelerator.synchronize)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_ranks(
    command: Sequence[str], ranks: int, threads: int, quiet: bool = False, patience: float = math.inf
) -> int:
    """Run a command once for each rank; when one fails, end the others. Returns the highest exit code.

    `quiet`: without what they print; `patience`: seconds after which all are ended.
    """
    port = free_port()
    common = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": threads}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("benchmarks: terminated"))  # not without ending the ranks
    running = []
    for rank in range(ranks):
        own = {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_SIZE": ranks, **common}
        environment = os.environ | {name: str(value) for name, value in own.items()}
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL if quiet else None))
    deadline = time.monotonic() + patience
    try:
        while any(process.poll() is None for process in running) and time.monotonic() < deadline:
            if any(process.poll() for process in running):
                break
            time.sleep(0.1)
    finally:
        for process in running:
            process.terminate()
        codes = [abs(process.wait()) for process in running]
        remove_buffers(port)
    return max(codes)


def remove_buffers(port: int) -> None:
    """Of DeepSpeed's communication kernel, which leaves 66 MiB of main memory for each rank behind when it ends."""
    for file in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_127.0.0.1_{port}_*"):
        file.unlink(missing_ok=True)


def launcher(ranks: int, port: int) -> list[str]:
    """The `deepspeed` command for ranks on this machine, of this very environment; a script and its options follow."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner"]
    return [*command, "--num_gpus", str(ranks), "--num_nodes", "1", "--master_port", str(port)]


def own_command() -> list[str]:
    """The command line of this process, to run it once more."""
    return [sys.executable, *sys.orig_argv[1:]]


def run_on_ranks(args: argparse.Namespace, run: Callable[[], Found], tables: Callable[[Mapping[str, Any]], str]) -> int:
    """Start the ranks, or, as one of them, run the benchmark; rank 0 presents."""
    if "RANK" not in os.environ:
        return start_ranks(own_command(), args.ranks, args.threads)
    machine = describe()
    found = run()
    if int(os.environ["RANK"]) == 0:
        present(args, machine, found, tables)
    leave()


def leave(status: int = 0) -> NoReturn:
    """End a rank that has done its work. Without the interpreter's clean-up, which threads of gloo may not survive."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def present(
    args: argparse.Namespace, machine: Mapping[str, Any], found: Found, tables: Callable[[Mapping[str, Any]], str]
) -> None:
    """Print the tables and write the file. `machine`: described before the run, for the load average."""
    results = {
        "command": shlex.join(["python", *(word for word in sys.orig_argv[1:] if "local_rank" not in word)]),
        "machine": machine,
        "settings": {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS},
        **found,
    }
    print(markdown(results, tables))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


def markdown(results: Mapping[str, Any], tables: Callable[[Mapping[str, Any]], str]) -> str:
    return f"{heading(results)}\n\n{tables(results)}"


def _no_wait() -> None:
    pass
