"""Step time of LENA and of the stock optimizer with the same rule, measured in turn in one run.

    python -m benchmarks.step_time --out results.json           under DeepSpeed; starts its own ranks
    deepspeed --module benchmarks.step_time --model gpt2        the same, started by a launcher
    python -m benchmarks.step_time --optimizer-only             without DeepSpeed, in one process
    python -m benchmarks.step_time --check-sync                 on CUDA: count what makes the host wait, instead

README.md in this folder says what the numbers mean.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks import command, optimizers, tables
from benchmarks.machine import describe
from benchmarks.models import POSITIONS, SIZES
from benchmarks.ready_made import PLAIN
from benchmarks.roster import KEYS, LENA
from benchmarks.timing import compare

QUICK = {"model": "tiny", "tokens": [64], "seconds": 1.0, "accumulation": [1]}


def main() -> int:
    args = _arguments()
    if args.optimizer_only:
        return _optimizer_only(args)
    return command.run_on_ranks(args, lambda: _run(args), as_tables)


def _run(args: argparse.Namespace) -> command.Found:
    from benchmarks.engines import run  # only the ranks need DeepSpeed

    return run(args)


def _optimizer_only(args: argparse.Namespace) -> int:
    """A part of `benchmarks.optimizers`."""
    args.tokens = args.tokens[0]
    args.families = [args.base]
    args.contestants = [LENA[args.base], LENA[args.base] + PLAIN]
    machine = describe()
    command.present(args, machine, optimizers.run(args), optimizers.as_tables)
    return 0


def _arguments() -> argparse.Namespace:
    parser = command.parser(__doc__, seconds=25)
    command.add_ranks(parser)
    add = parser.add_argument
    add("--optimizer-only", action="store_true", help="the optimizers alone, in one process")
    add("--check-sync", action="store_true", help="count operations that make the host wait for the GPU; no times")
    add("--base", choices=KEYS, default="adamw", help="LENA's base rule; beside it the stock optimizer with that rule")
    add("--model", choices=SIZES, help="default: 30m; gpt2 with --optimizer-only")
    add("--stages", type=int, nargs="+", choices=range(4), default=[0, 1, 2, 3], help="ZeRO stages")
    add("--accumulation", type=int, nargs="+", default=[1, 4], help="micro-batches per update; default: 1 4")
    add("--tokens", type=int, nargs="+", default=[512], help=f"per micro-batch, at most {POSITIONS}; default: 512")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="under DeepSpeed")
    args = command.parse(parser, QUICK)
    args.model = args.model or ("gpt2" if args.optimizer_only else "30m")
    args.ranks = 1 if args.optimizer_only else command.count_ranks(args.ranks)
    if args.check_sync and not torch.cuda.is_available():
        parser.error("--check-sync needs CUDA")
    if not all(2 <= tokens <= POSITIONS for tokens in args.tokens):
        parser.error(f"--tokens {args.tokens}: from 2 to {POSITIONS}")
    return args


LAYOUT = ["ZeRO", "accumulation", "tokens"]


def as_tables(results: Mapping[str, Any]) -> str:
    cases = results["cases"]
    if "syncs" in cases[0]:
        return tables.syncs(LAYOUT, [(_layout(case), case["syncs"]) for case in cases])
    parts = {
        "Time of one update, as a multiple of the stock optimizer's:": "update",
        "Of that, forward and backward, with LENA's hooks:": "forward_backward",
        "Of that, the step, with everything else:": "step",
    }
    return "\n\n".join(f"{title}\n\n{_versus(cases, phase)}" for title, phase in parts.items())


def _versus(cases: Sequence[Mapping[str, Any]], phase: str) -> str:
    reference = cases[0]["reference"]
    rows: tables.Rows = []
    for case in cases:
        rows += tables.versus(_layout(case), compare(case["seconds"], reference)[phase], reference)
    return tables.table([*LAYOUT, *tables.versus_head(reference)], rows)


def _layout(case: Mapping[str, Any]) -> list[str]:
    return [str(case[name]) for name in ("stage", "accumulation", "tokens")]


if __name__ == "__main__":
    sys.exit(main())
