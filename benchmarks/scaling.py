"""Check the cost model of `ds_lena.cost` on this machine: measure its constants, then predict and measure an update.

    python -m benchmarks.scaling --out scaling.json

Starts its own ranks (gloo, one thread each). docs/cost-model.md says what the numbers mean.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.command import own_command, start_ranks
from benchmarks.machine import describe
from benchmarks.tables import table
from ds_lena.cost import MACHINES, Job, Machine, estimate
from ds_lena.cost.model import FLOAT64, NUMBERS_PER_LAYER, OTHER_NUMBERS, all_reduce_seconds, collective_bytes

PATIENCE = 300.0  # seconds for all ranks of one size; on its first start DeepSpeed compiles an extension
PARTS = {"hooks": "hooks", "average": "average", "collectives": "all_reduce", "factors": "factors", "calls": "calls"}
"""The model's part -> the name under which it was measured."""


def main() -> int:
    args = _arguments()
    if args.rank_result:
        from benchmarks.added import run

        result = run(args)
        if os.environ["RANK"] == "0":
            args.rank_result.write_text(json.dumps(result))
        return 0
    about = describe()
    from benchmarks.constants import measure_host

    constants = measure_host_alone(measure_host)
    measured = [_run_ranks(ranks) for ranks in args.ranks]
    machine = fitted(constants, measured)
    results = {
        "machine": about,
        "constants": asdict(machine),
        "all_reduce": [row for one in measured for row in compare_all_reduce(one, machine)],
        "updates": [compare(one, args, machine) for one in measured],
    }
    print(markdown(results))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[1, 2, 4, 8], help="default: 1 2 4 8")
    add("--stage", type=int, choices=range(4), default=2, help="ZeRO stage; default: 2")
    add("--depth", type=int, default=24, help="linear layers of the model, two tensors each; default: 24")
    add("--width", type=int, default=256, help="of each; default: 256")
    add("--tokens", type=int, default=64, help="rows of a micro-batch; default: 64")
    add("--updates", type=int, default=40, help="to be timed; default: 40")
    add("--out", type=Path, help="write everything to this JSON file")
    add("--rank-result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_host_alone(measure: Any) -> dict[str, float]:
    """On one thread, as each rank computes."""
    import torch

    torch.set_num_threads(1)
    return measure()


def fitted(constants: dict[str, float], measured: list[dict[str, Any]]) -> Machine:
    """This machine: the host's constants as measured, and the network's from the runs with the fewest ranks.

    The median of all buffers but the largest gives the latencies: one rank the base, two ranks the hop, four ranks the
    wait for a core that ranks share. The largest at two ranks gives the bandwidth. So eight ranks are a prediction.
    """
    machine = replace(MACHINES["cpu-2-cores"], **constants, cores=len(os.sched_getaffinity(0)))
    times = {one["ranks"]: {int(layers): taken for layers, taken in one["all_reduce_s"].items()} for one in measured}
    if not {1, 2, 4} <= times.keys():
        return machine
    large = max(times[2])
    base, two, four = (
        statistics.median(taken for layers, taken in times[ranks].items() if layers < large) for ranks in (1, 2, 4)
    )
    hop = max(0.0, two - base) / 2
    waits = max(0.0, (four - base) / 6 - hop)  # at four ranks, 2 x 3 hops
    crowding = machine.crowding(4)
    bandwidth = _buffer(large) / max(times[2][large] - two, 1e-9)
    return replace(
        machine,
        collective_s=base,
        hop_inside_s=hop,
        hop_between_s=hop,
        turn_s=waits / (crowding - 1) if crowding > 1 else 0.0,
        bandwidth_inside=bandwidth,
        bandwidth_between=bandwidth,
    )


def compare_all_reduce(one: dict[str, Any], machine: Machine) -> list[dict[str, float]]:
    """Predicted and measured seconds of the all-reduce alone."""
    return [
        {
            "ranks": one["ranks"],
            "layers": int(layers),
            "predicted": all_reduce_seconds(_buffer(int(layers)), one["ranks"], machine),
            "measured": taken,
        }
        for layers, taken in one["all_reduce_s"].items()
        if one["ranks"] > 1
    ]


def compare(one: dict[str, Any], args: argparse.Namespace, machine: Machine) -> dict[str, Any]:
    """Predicted and measured update: collectives and their bytes, which must agree, and seconds by part."""
    job = Job(ranks=one["ranks"], stage=args.stage, tokens=args.tokens, precision="fp32", **one["model"])
    cost = estimate(job, machine)
    expected = [["allreduce", size, 1] for size in collective_bytes(job)]
    if one["collectives_per_update"] != expected:
        raise SystemExit(f"scaling: expected the collectives {expected}, counted {one['collectives_per_update']}")
    seconds = {
        part: {"predicted": cost.parts[part].seconds, "measured": one["seconds"].get(name, 0.0)}
        for part, name in PARTS.items()
    }
    total = {key: sum(part[key] for part in seconds.values()) for key in ("predicted", "measured")}
    return {
        "ranks": one["ranks"],
        "crowding": machine.crowding(one["ranks"]),
        **one["model"],
        "collectives": {"predicted": expected, "counted": one["collectives_per_update"]},
        "seconds": seconds | {"together": total},
    }


def markdown(results: dict[str, Any]) -> str:
    """Three tables."""
    about, constants = results["machine"], results["constants"]
    head = f"{about['cpu']}, {about['cores']} cores; load average before {about['load_average']:.1f}; " + ", ".join(
        f"{name} {version}" for name, version in about["versions"].items()
    )
    values = [[f"`{name}`", f"{value:.3g}"] for name, value in constants.items() if isinstance(value, float)]
    reduces = [[str(row["ranks"]), f"{row['layers']:,}", *_times(row)] for row in results["all_reduce"]]
    parts = [
        [str(update["ranks"]), f"{update['crowding']:.0f}", part, *_times(times)]
        for update in results["updates"]
        for part, times in update["seconds"].items()
        if times["predicted"] or times["measured"]
    ]
    counts = [
        [
            str(update["ranks"]),
            *(
                ", ".join(f"{n:g} x {size:,} B" for _, size, n in update["collectives"][key]) or "none"
                for key in ("predicted", "counted")
            ),
        ]
        for update in results["updates"]
    ]
    times = ["predicted ms", "measured ms", "predicted / measured"]
    return "\n\n".join([
        head,
        table(["constant", "value"], values),
        table(["ranks", "predicted all-reduces per update", "counted"], counts),
        table(["ranks", "layers", *times], reduces),
        table(["ranks", "ranks per core", "part", *times], parts),
    ])  # fmt: skip


def _times(row: dict[str, float]) -> list[str]:
    ratio = f"{row['predicted'] / row['measured']:.2f}" if row["measured"] > 0 else "–"
    return [f"{1000 * row['predicted']:.3f}", f"{1000 * row['measured']:.3f}", ratio]


def _buffer(layers: int) -> int:
    return FLOAT64 * (OTHER_NUMBERS + NUMBERS_PER_LAYER * layers)


def _run_ranks(ranks: int) -> dict[str, Any]:
    """Run this very command once for each rank; all are ended when one fails."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # the ranks', gloo is what is measured
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        start_ranks([*own_command(), "--rank-result", str(path)], ranks, threads=1, quiet=True, patience=PATIENCE)
        if not path.exists():
            raise SystemExit(f"scaling: {ranks} ranks ended without a result")
        return json.loads(path.read_text())


if __name__ == "__main__":
    sys.exit(main())
