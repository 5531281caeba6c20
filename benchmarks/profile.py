"""What the processor does in some updates: torch.profiler's table of operators, as text.

python -m benchmarks.profile profile.txt --layout 2         rank 0 of a run under ZeRO-2
python -m benchmarks.profile profile.txt --layout plain     in plain PyTorch, one process
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import command
from benchmarks.roster import LENA, MAKERS
from benchmarks.timing import Update, warm_up
from benchmarks.training import LAYOUTS, PLAIN, add_training, observe

QUICK = {"model": "tiny", "tokens": 64}
UPDATES_BEFORE = 3
ROWS = 40


def main() -> int:
    parser = command.parser(__doc__)
    command.add_ranks(parser)
    add_training(parser)
    parser.add_argument("file", type=Path, help="where the table is written")
    parser.add_argument("--layout", choices=LAYOUTS, default=PLAIN, help="plain PyTorch or a ZeRO stage")
    parser.add_argument("--optimizer", choices=MAKERS, default=LENA["adamw"], help="default: LENA")
    parser.add_argument("--updates", type=int, default=5, help="profiled; default: 5")
    args = command.parse(parser, QUICK)
    if "RANK" not in os.environ:
        ranks = 1 if args.layout == PLAIN else command.count_ranks(args.ranks)
        return command.start_ranks(command.own_command(), ranks, args.threads)
    by_rank = observe(args.layout, args.optimizer, args, lambda update, _: {"table": _profile(update, args)})
    if by_rank:
        args.file.write_text(by_rank[0]["table"] + "\n")
    command.leave()


def _profile(update: Update, args: argparse.Namespace) -> str:
    warm_up({"": update}, UPDATES_BEFORE)
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as seen:
        warm_up({"": update}, args.updates)
    averages: Any = seen.key_averages()
    return averages.table(sort_by="self_cpu_time_total", row_limit=ROWS)


if __name__ == "__main__":
    sys.exit(main())
