"""Communication of an update: calls of collectives and bytes put into them, with LENA and with AdamW, at stages 0 to 3.

python -m benchmarks.traffic --out traffic.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks import command, tables
from benchmarks.collectives import Collectives
from benchmarks.models import random_tokens
from benchmarks.roster import LENA, REFERENCE, NotAvailable, available
from benchmarks.timing import warm_up
from benchmarks.training import add_training

QUICK = {"model": "tiny", "tokens": 64}
CONTESTANTS = [REFERENCE, LENA["adamw"], LENA["lamb"], LENA["lars"]]
UPDATES_BEFORE, UPDATES_COUNTED = 3, 3  # DeepSpeed gets to know the model in the first ones


def main() -> int:
    parser = command.parser(__doc__)
    command.add_ranks(parser)
    add_training(parser)
    parser.add_argument("--stages", type=int, nargs="+", choices=range(4), default=[0, 1, 2, 3], help="ZeRO stages")
    args = command.parse(parser, QUICK)
    args.ranks = command.count_ranks(args.ranks)
    return command.run_on_ranks(args, lambda: run(args), as_tables)


def run(args: argparse.Namespace) -> command.Found:
    """The program of one rank: one case for each stage and contestant; every rank returns the same."""
    import torch.distributed as dist

    from benchmarks import deepspeed_run as ranks  # only the ranks need DeepSpeed

    ranks.join(args.threads)
    names, left_out = available(CONTESTANTS, ranks.device())
    cases = []
    for stage in args.stages:
        for name in names:
            try:
                engine = ranks.make_engine(name, args, stage)
            except NotAvailable as reason:
                left_out[f"{name}, ZeRO {stage}"] = str(reason)
                continue
            tokens = random_tokens(args.model, (1, 1, args.tokens), seed=dist.get_rank()).to(engine.device)
            found = ranks.from_all_ranks(_count(ranks.trainer(engine, tokens)))
            cases.append({"stage": stage, "optimizer": name, "by_rank": found})
            engines = {name: engine}
            del engine
            ranks.end(engines)
            ranks.free()
    dist.destroy_process_group()
    return {"cases": cases, "left_out": left_out}


def _count(update: Any) -> dict[str, dict[str, float]]:
    """By collective: calls and bytes of one update, on the average of some."""
    warm_up({"": update}, UPDATES_BEFORE)
    with Collectives() as seen:
        warm_up({"": update}, UPDATES_COUNTED)
    return {
        name: {"calls": calls / UPDATES_COUNTED, "bytes": seen.bytes[name] / UPDATES_COUNTED}
        for name, calls in sorted(seen.calls.items())
    }


def as_tables(results: Mapping[str, Any]) -> str:
    rows: tables.Rows = []
    theirs: Mapping[str, Mapping[str, float]] = {}
    for case in results["cases"]:
        own = busiest(case["by_rank"])
        if case["optimizer"] == REFERENCE:
            theirs = own
        for name in sorted(own.keys() | theirs.keys()):
            rows.append([str(case["stage"]), case["optimizer"], name, *_cells(own, theirs, name)])
    head = ["ZeRO", "optimizer", "collective", "calls", "bytes", "calls added", "bytes added"]
    return "Communication of one update, on the rank that puts in most:\n\n" + tables.table(head, rows)


def busiest(by_rank: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """By collective, the calls and bytes of the rank with most of each."""
    names = {name for found in by_rank for name in found}
    none = {"calls": 0.0, "bytes": 0.0}
    return {n: {what: max(found.get(n, none)[what] for found in by_rank) for what in none} for n in names}


def _cells(own: Mapping[str, Any], theirs: Mapping[str, Any], name: str) -> list[str]:
    none = {"calls": 0.0, "bytes": 0.0}
    mine, other = own.get(name, none), theirs.get(name, none)
    counts = [f"{mine[what]:,.10g}" for what in none]
    return counts + [f"{mine[what] - other[what]:+,.10g}" for what in none]


if __name__ == "__main__":
    sys.exit(main())
