"""One contestant of `benchmarks.memory` in one layout: trains, and writes down what memory that took."""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import command
from benchmarks.roster import NotAvailable
from benchmarks.timing import Update, warm_up
from benchmarks.training import LAYOUTS, add_training, observe

PROFILED = 3
_MARK = "benchmarks: "


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("optimizer")
    parser.add_argument("layout", choices=LAYOUTS)
    parser.add_argument("--updates", type=int)
    add_training(parser)
    args = parser.parse_args()

    def look(update: Update, parameters: int) -> dict[str, Any]:
        warm_up({"": update}, args.updates)
        peak = peak_rss()  # before the profiler, which needs memory itself
        return {"parameters": parameters, "peak_rss": peak, "live": live_bytes(), **tracked_peaks(update)}

    try:
        by_rank = observe(args.layout, args.optimizer, args, look)
    except NotAvailable as reason:
        by_rank = [{"left_out": str(reason)}] if int(os.environ["RANK"]) == 0 else None
    if by_rank:
        most = {name: max(found[name] for found in by_rank) for name in by_rank[0]}
        args.out.write_text(json.dumps(most))
    command.leave()


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


def tracked_peaks(update: Update) -> dict[str, int]:
    """By phase: bytes that torch's allocator had handed out at most, beyond what was there before the update."""
    device = torch.accelerator.current_accelerator()
    if device is None or device.type == "cpu":
        # What a thread of gloo frees escapes the profiler, now and then and in every contestant: the least of several.
        several = [peaks_by_phase(_memory_events(update)) for _ in range(PROFILED)]
        return {phase: min(peaks[phase] for peaks in several) for phase in several[0]}
    memory = torch.get_device_module(device)
    before = memory.memory_allocated()
    memory.reset_peak_memory_stats()
    peaks = {}

    def lap(phase: str) -> None:
        peaks[phase] = memory.max_memory_allocated() - before
        memory.reset_peak_memory_stats()

    update(lap)
    return peaks


def peaks_by_phase(events: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Highest sum so far during each phase. `events`: (phase, 0) where a phase ends, ("", bytes) for a change."""
    peaks: dict[str, int] = {}
    level = peak = 0
    for phase, change in events:
        if phase:
            peaks[phase], peak = peak, level
        level += change
        peak = max(peak, level)
    return peaks


def _memory_events(update: Update) -> list[tuple[str, int]]:
    """For `peaks_by_phase`, of one update on the CPU."""

    def mark(phase: str) -> None:
        with torch.autograd.profiler.record_function(_MARK + phase):
            pass

    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        warm_up({"": update}, 1)  # frees what was allocated before, of which the profiler knows nothing
        mark("")
        update(mark)
    events = sorted(profile.kineto_results.events(), key=lambda event: event.start_ns())
    begin = next(i for i, event in enumerate(events) if event.name() == _MARK)
    return [
        (event.name().removeprefix(_MARK), 0) if event.name() != "[memory]" else ("", event.nbytes())
        for event in events[begin + 1 :]
        if event.name() == "[memory]" or event.name().startswith(_MARK)
    ]


if __name__ == "__main__":
    main()
