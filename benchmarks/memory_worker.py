"""One contestant of `benchmarks.memory` in one layout: trains, and writes down what memory that took."""

from __future__ import annotations

import gc
import itertools
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import command
from benchmarks.roster import NotAvailable
from benchmarks.timing import Update
from benchmarks.training import LAYOUTS, add_training, observe


def main() -> int:
    parser = command.parser(__doc__)
    parser.add_argument("optimizer")
    parser.add_argument("layout", choices=LAYOUTS)
    parser.add_argument("--updates", type=int)
    add_training(parser)
    args = parser.parse_args()

    def look(update: Update, parameters: int) -> dict[str, Any]:
        for _ in range(args.updates):
            update(_ignore)
        peak = peak_rss()  # before the profiler, which needs memory itself
        return {"parameters": parameters, "peak_rss": peak, "live": live_bytes(), "tracked": tracked_peak(update)}

    try:
        by_rank = observe(args.layout, args.optimizer, args, look)
    except NotAvailable as reason:
        by_rank = [{"left_out": str(reason)}] if int(os.environ["RANK"]) == 0 else None
    if by_rank:
        most = {name: max(found[name] for found in by_rank) for name in by_rank[0]}
        args.out.write_text(json.dumps(most))
    return 0


def peak_rss() -> int:
    """Bytes of main memory that this process has needed at most."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):  # unlike ru_maxrss, without what the process that started this one needed
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def live_bytes() -> int:
    """Bytes of all tensors of this process, each storage once."""
    while gc.collect():  # once is not enough for engines, which have finalizers
        pass
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def tracked_peak(update: Update) -> int:
    """Bytes that torch's allocator handed out at most during one update, beyond what was there before."""
    device = torch.accelerator.current_accelerator()
    if device is not None and device.type != "cpu":
        memory = torch.get_device_module(device)
        memory.reset_peak_memory_stats()
        before = memory.memory_allocated()
        update(_ignore)
        return memory.max_memory_allocated() - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        update(_ignore)
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


def _ignore(phase: str) -> None:
    pass


if __name__ == "__main__":
    sys.exit(main())
