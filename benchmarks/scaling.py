"""Check the cost model of `ds_lena.cost` on this machine: predict what LENA adds to an update, and measure it.

    python -m benchmarks.scaling

On 1, 2, 4 and 8 ranks (gloo, one thread each): the all-reduce alone, and what LENA adds to an update of
`benchmarks.engines`. The network's constants are fitted to the all-reduces of 1, 2 and 4 ranks; the others are those of
--machine. Bytes and collectives are checked by the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import command, contestants, engines
from benchmarks.timing import against, table
from ds_lena.cost import MACHINES, Job, Machine, all_reduce_seconds, estimate

LAYERS = (10, 100, 1000, 2000, 100_000)  # the last for the bandwidth only
PARTS = {"forward_backward": ("hooks",), "step": ("average", "collectives", "factors", "calls")}


def main() -> int:
    parser = command.parser(__doc__, seconds=15)
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[1, 2, 4, 8], help="default: 1 2 4 8")
    add("--model", choices=contestants.SIZES, default="tiny", help="default: tiny")
    add("--stage", choices="0123", default="2", help="ZeRO stage; default: 2")
    add("--tokens", default="64", help="of a micro-batch; default: 64")
    add("--machine", choices=MACHINES, default="cpu-2-cores", help="whose constants; default: cpu-2-cores")
    args = command.parse(parser, {"ranks": [1, 2], "seconds": 2.0})
    if "RANK" in os.environ:
        return _time_all_reduces(args)
    os.environ["DS_ACCELERATOR"] = "cpu"  # gloo is what is measured
    about = command.describe()
    of_engine = ["--model", args.model, "--stages", args.stage, "--tokens", args.tokens, "--accumulation", "1"]
    of_engine += ["--seconds", str(args.seconds)]
    times, updates = {}, {}
    for ranks in args.ranks:
        times[ranks] = {int(layers): taken for layers, taken in _result("scaling", [], ranks, args).items()}
        updates[ranks] = _result("engines", [*of_engine, "--seconds", str(args.seconds)], ranks, args)["found"][0][
            "seen"
        ]
    machine = fitted(MACHINES[args.machine], times)
    found = {"machine": asdict(machine), "all_reduce": times, "updates": updates}
    command.present("benchmarks.scaling", args, about, as_tables(machine, times, updates, args), found)
    return 0


def _result(module: str, options: list[str], ranks: int, args: argparse.Namespace) -> Any:
    """What a module writes that runs on so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        words = [*options, "--out", str(path)]
        if command.start_ranks(f"benchmarks.{module}", words, ranks, args.threads, quiet=True):
            sys.exit(f"benchmarks: {ranks} ranks ended without a result")
        return json.loads(path.read_text())


def _time_all_reduces(args: argparse.Namespace) -> int:
    """As one of the ranks: seconds of an all-reduce of an update's buffer, one right after the other, by layers."""
    engines.join(args.threads)
    taken = {}
    for layers in LAYERS:
        buffer, times = torch.zeros(2 + 2 * layers, dtype=torch.float64), []
        for _ in range(60 if layers < LAYERS[-1] else 10):
            begin = time.perf_counter()
            torch.distributed.all_reduce(buffer)
            times.append(time.perf_counter() - begin)
        means = [statistics.mean(of_ranks) for of_ranks in zip(*engines.from_all_ranks(times[2:]), strict=True)]
        taken[layers] = statistics.median(means)
    if engines.rank() == 0:
        args.out.write_text(json.dumps(taken))
    torch.distributed.destroy_process_group()
    command.leave()


def fitted(machine: Machine, times: dict[int, dict[int, float]]) -> Machine:
    """With the network's constants as measured. So eight ranks are a prediction.

    The median of all buffers but the largest gives the latencies: one rank the base, two ranks the hop, four ranks the
    wait for a core that ranks share. The largest at two ranks gives the bandwidth.
    """
    machine = replace(machine, cores=len(os.sched_getaffinity(0)))
    if not {1, 2, 4} <= times.keys():
        return machine
    large = LAYERS[-1]
    base, two, four = (statistics.median(t for n, t in times[ranks].items() if n < large) for ranks in (1, 2, 4))
    hop = max(0.0, two - base) / 2
    crowding, waits = machine.crowding(4), max(0.0, (four - base) / 6 - hop)  # at four ranks, 2 x 3 hops
    bandwidth = 16 * (1 + large) / max(times[2][large] - two, 1e-9)
    turn = waits / (crowding - 1) if crowding > 1 else 0.0
    network = {"hop_inside_s": hop, "hop_between_s": hop, "bandwidth_inside": bandwidth, "bandwidth_between": bandwidth}
    return replace(machine, collective_s=base, turn_s=turn, **network)


def as_tables(machine: Machine, times: Any, updates: Any, args: argparse.Namespace) -> str:
    sizes = [parameter.numel() for parameter in contestants.build_model(args.model).parameters()]
    shape = {"params": sum(sizes), "tensors": len(sizes), "tokens": float(args.tokens), "precision": "fp32"}
    reduces, parts = [], []
    for ranks in args.ranks:
        for layers, taken in times[ranks].items() if ranks > 1 else ():
            predicted = all_reduce_seconds(16 * (1 + layers), ranks, machine)
            reduces.append([str(ranks), f"{layers:,}", *_cells(predicted, taken)])
        cost = estimate(Job(ranks=ranks, stage=int(args.stage), **shape), machine)
        for phase, names in PARTS.items():
            added = against(updates[ranks][contestants.LENA["adamw"]][phase], updates[ranks][contestants.ADAMW][phase])
            parts.append([str(ranks), phase, *_cells(sum(cost.parts[name].seconds for name in names), added["added"])])
    head = ["predicted, ms", "measured, ms", "predicted / measured"]
    reduced, added = table(["ranks", "layers", *head], reduces), table(["ranks", "added to", *head], parts)
    return f"{machine}\n\n{reduced}\n\n{added}"


def _cells(predicted: float, measured: float) -> list[str]:
    return [f"{1000 * predicted:.3f}", f"{1000 * measured:.3f}", f"{predicted / measured:.2f}" if measured > 0 else "–"]


if __name__ == "__main__":
    sys.exit(main())
