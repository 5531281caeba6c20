"""Step time of LENA and of torch's fused AdamW, measured in turn in one run.

    python -m benchmarks.step_time --out results.json           under DeepSpeed; starts its own ranks
    deepspeed --module benchmarks.step_time --model gpt2        the same, started by a launcher
    python -m benchmarks.step_time --optimizer-only             without DeepSpeed, in one process
    python -m benchmarks.step_time --check-sync                 on CUDA: count what makes the host wait, instead

README.md in this folder says what the numbers mean.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.contestants import POSITIONS, SIZES
from benchmarks.machine import describe
from benchmarks.report import markdown
from benchmarks.timing import CLOCKS

QUICK = {"model": "tiny", "tokens": 64, "seconds": 1.0, "accumulation": [1]}
SETTINGS = ("model", "tokens", "ranks", "threads", "precision", "seconds", "clock")


def main() -> int:
    args = _arguments()
    if args.optimizer_only:
        from benchmarks.alone import run
    elif "RANK" in os.environ:
        from benchmarks.engines import run
    else:
        return _start_ranks(args.ranks, args.threads)
    machine = describe()
    cases = run(args)
    if int(os.environ.get("RANK", 0)) == 0:
        _present(args, machine, cases)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--optimizer-only", action="store_true", help="the optimizers alone, in one process")
    add("--check-sync", action="store_true", help="count operations that make the host wait for the GPU; no times")
    add("--quick", action="store_true", help="a tiny model and few repeats: whether it runs, not how fast")
    add("--model", choices=SIZES, help="default: 30m; gpt2 with --optimizer-only")
    add("--stages", type=int, nargs="+", choices=range(4), default=[0, 1, 2, 3], help="ZeRO stages")
    add("--accumulation", type=int, nargs="+", default=[1, 4], help="micro-batches per update; default: 1 4")
    add("--tokens", type=int, default=512, help=f"per micro-batch, at most {POSITIONS}; default: 512")
    add("--seconds", type=float, default=25.0, help="to measure each stage and accumulation; default: 25")
    add("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for a busy machine without a GPU")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="under DeepSpeed")
    add("--ranks", type=int, help="default: the number of GPUs; 2 without one")
    add("--threads", type=int, default=1, help="torch's threads on each rank; default: 1")
    add("--out", type=Path, help="write all measurements to this JSON file")
    add("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher's
    if "--quick" in sys.argv:
        parser.set_defaults(**QUICK)
    args = parser.parse_args()
    args.model = args.model or ("gpt2" if args.optimizer_only else "30m")
    gpus = torch.accelerator.device_count()
    args.ranks = 1 if args.optimizer_only else int(os.environ.get("WORLD_SIZE", args.ranks or gpus or 2))
    if args.check_sync and not torch.cuda.is_available():
        parser.error("--check-sync needs CUDA")
    if not 2 <= args.tokens <= POSITIONS:
        parser.error(f"--tokens {args.tokens}: from 2 to {POSITIONS}")
    return args


def _start_ranks(ranks: int, threads: int) -> int:
    """Run this very command once for each rank; when one fails, end the others."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": threads}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("step_time: terminated"))  # not without ending the ranks
    running = []
    for rank in range(ranks):
        own = {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_SIZE": ranks, **common}
        environment = os.environ | {name: str(value) for name, value in own.items()}
        running.append(subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=environment))
    try:
        while any(process.poll() is None for process in running) and not any(process.poll() for process in running):
            time.sleep(0.1)
    finally:
        for process in running:
            process.terminate()
    return max(abs(process.wait()) for process in running)


def _present(args: argparse.Namespace, machine: dict[str, Any], cases: list[dict[str, Any]]) -> None:
    results = {
        "command": shlex.join(["python", *(word for word in sys.orig_argv[1:] if "local_rank" not in word)]),
        "machine": machine,
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "cases": cases,
    }
    print(markdown(results))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
