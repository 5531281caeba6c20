"""Memory of training with LENA and with torch's fused AdamW, each in processes of its own.

    python -m benchmarks.memory --out memory.json

Every contestant is started several times, in alternated order, in plain PyTorch and under DeepSpeed's stages.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import command, tables
from benchmarks.machine import describe
from benchmarks.roster import LENA, REFERENCE, available
from benchmarks.training import LAYOUTS, PLAIN, add_training

QUICK = {"model": "tiny", "tokens": 64, "repeats": 1, "layouts": [PLAIN, "2"]}
CONTESTANTS = [REFERENCE, LENA["adamw"], LENA["lamb"]]
MEASURES = {
    "peak_rss": "peak RSS",
    "live": "tensors after an update",
    "forward_backward": "peak in forward and backward",
    "step": "peak in the step",
}
PASSED_ON = ("model", "tokens", "precision", "updates", "threads")


def main() -> int:
    parser = command.parser(__doc__)
    command.add_ranks(parser)
    add_training(parser)
    add = parser.add_argument
    add("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="plain PyTorch, ZeRO stages; default: all")
    add("--updates", type=int, default=3, help="before anything is read; default: 3")
    add("--repeats", type=int, default=2, help="starts of each contestant; default: 2")
    args = command.parse(parser, QUICK)
    args.ranks = command.count_ranks(args.ranks)
    machine = describe()
    command.present(args, machine, run(args), as_tables)
    return 0


def run(args: argparse.Namespace) -> command.Found:
    """One case for each layout and contestant, with one entry of "runs" for each start."""
    names, left_out = available(CONTESTANTS, torch.device("cpu"))
    cases = []
    for layout in args.layouts:
        runs: dict[str, list[dict[str, int]]] = {name: [] for name in names}
        order = list(names)
        for _ in range(args.repeats):
            for name in order:
                found = _start(name, layout, args)
                if "left_out" in found:
                    left_out[f"{name}, {_title(layout)}"] = found["left_out"]
                else:
                    runs[name].append(found)
            order.reverse()
        cases += [{"layout": layout, "optimizer": name, "runs": found} for name, found in runs.items() if found]
        print(f"{_title(layout)}: done", file=sys.stderr)
    return {"cases": cases, "left_out": left_out}


def _start(optimizer: str, layout: str, args: argparse.Namespace) -> dict[str, Any]:
    """What `memory_worker` finds, in new processes."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "found.json"
        options = [word for name in PASSED_ON for word in (f"--{name}", str(getattr(args, name)))]
        worker = [sys.executable, "-m", "benchmarks.memory_worker", optimizer, layout, *options, "--out", str(results)]
        failed = command.start_ranks(worker, 1 if layout == PLAIN else args.ranks, args.threads)
        if failed:
            sys.exit(f"benchmarks: {optimizer}, {_title(layout)}: a rank ended with code {failed}")
        return json.loads(results.read_text())


def as_tables(results: Mapping[str, Any]) -> str:
    head = [
        "",
        "optimizer",
        *(f"{title}, {unit}" for title in MEASURES.values() for unit in ("MiB", "extra B/parameter")),
    ]
    rows: tables.Rows = []
    for case in results["cases"]:
        reference = next(
            one for one in results["cases"] if one["layout"] == case["layout"] and one["optimizer"] == REFERENCE
        )
        cells = []
        for measure in MEASURES:
            cells += [_mebibytes(case, measure), f"{extra(case, reference, measure):+.3f}"]
        rows.append([_title(case["layout"]), case["optimizer"], *cells])
    title = "Memory of the rank that needs most, medians over the starts [least, most]:"
    return f"{title}\n\n{tables.table(head, rows)}"


def extra(case: Mapping[str, Any], reference: Mapping[str, Any], measure: str) -> float:
    """Bytes for each parameter of the model more than the reference."""
    return (_median(case, measure) - _median(reference, measure)) / case["runs"][0]["parameters"]


def _median(case: Mapping[str, Any], measure: str) -> float:
    return statistics.median(run[measure] for run in case["runs"])


def _mebibytes(case: Mapping[str, Any], measure: str) -> str:
    """The median of the starts, and what they differ by if they do."""
    each = sorted(run[measure] / 2**20 for run in case["runs"])
    median, least, most = f"{statistics.median(each):.1f}", f"{each[0]:.1f}", f"{each[-1]:.1f}"
    return median if least == most else f"{median} [{least}, {most}]"


def _title(layout: str) -> str:
    return "plain PyTorch" if layout == PLAIN else f"ZeRO {layout}"


if __name__ == "__main__":
    sys.exit(main())
