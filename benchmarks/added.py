"""The program of one rank: the small all-reduce, and what LENA adds to an update under DeepSpeed, counted and timed.

The parts of an update are timed where they happen, by wrapping the functions that do them. Times are medians
over updates of means over ranks. An all-reduce is that of the rank which takes least: the others wait for the last.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_lena
import ds_lena.measure
from benchmarks.collectives import Collectives
from benchmarks.constants import ADAMW
from ds_lena.cost.model import NUMBERS_PER_LAYER, OTHER_NUMBERS
from ds_lena.probe import Probe

LAYERS = (10, 100, 1000, 2000, 100_000)  # the last for the bandwidth only
COUNTED = 3  # updates
PARTS = ("hooks", "begin_update", "average", "all_reduce", "end_update", "lena_step", "stock_step")


class Net(nn.Module):
    """`depth` linear layers; its micro-batches need no data."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """What this machine does with so many ranks; every rank returns the same."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed's use of torch.distributed
    deepspeed.utils.logger.setLevel(logging.ERROR)
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    result = {"ranks": dist.get_world_size(), "all_reduce_s": _all_reduce(), **_what_lena_adds(args)}
    dist.destroy_process_group()
    return result


def _all_reduce() -> dict[int, float]:
    """Seconds of an all-reduce of an update's buffer, one right after the other, by number of layers."""
    taken = {}
    for layers in LAYERS:
        buffer = torch.zeros(OTHER_NUMBERS + NUMBERS_PER_LAYER * layers, dtype=torch.float64)
        times = []
        for _ in range(60 if layers < LAYERS[-1] else 10):
            begin = time.perf_counter()
            dist.all_reduce(buffer)
            times.append(time.perf_counter() - begin)
        taken[layers] = float(_of_all_ranks(torch.tensor(times[2:], dtype=torch.float64)).mean(dim=0).median())
    return taken


def _what_lena_adds(args: argparse.Namespace) -> dict[str, Any]:
    """Collectives by name and bytes, and seconds of each part, of one update."""
    clock = _Clock()
    batch = torch.randn(args.tokens, args.width, generator=torch.Generator().manual_seed(dist.get_rank()))
    with _timed_hooks_and_all_reduce(clock):
        lena, optimizer = _engine(args, lena=True, clock=clock)
        host = optimizer._host
        host.squares_of_mean = clock.timed("average", host.squares_of_mean)
        stock, _ = _engine(args, lena=False, clock=clock)
        _train((lena, stock), batch, 3)
        ours, theirs = _counted(lena, batch), _counted(stock, batch)
        for _ in range(args.updates):
            clock.next_update()
            _train((lena, stock), batch, 1)
    taken = {part: _of_all_ranks(clock.by_update(part, args.updates)) for part in PARTS}
    begin, average, reduce = taken["begin_update"], taken["average"], taken["all_reduce"]
    seconds = {
        "hooks": taken["hooks"].mean(dim=0),
        "average": average.mean(dim=0),
        "all_reduce": reduce.amin(dim=0),
        "factors": (begin - average - reduce + taken["end_update"]).mean(dim=0),
        "calls": (taken["lena_step"] - taken["stock_step"]).mean(dim=0),
    }
    model = Net(args.depth, args.width)
    if theirs.calls - ours.calls:
        raise RuntimeError(f"AdamW has collectives that LENA has not: {theirs.calls - ours.calls}")
    added = sorted((ours.calls - theirs.calls).items())
    return {
        "model": {"params": sum(p.numel() for p in model.parameters()), "tensors": len(list(model.parameters()))},
        "collectives_per_update": [
            [name, (ours.bytes[name] - theirs.bytes[name]) / calls, calls / COUNTED] for name, calls in added
        ],
        "seconds": {name: float(by_update.median()) for name, by_update in seconds.items()},
    }


def _counted(engine: Any, batch: Tensor) -> Collectives:
    with Collectives() as collectives:
        _train((engine,), batch, COUNTED)
    return collectives


def _train(engines: tuple[Any, ...], batch: Tensor, updates: int) -> None:
    """The engines take turns."""
    for _ in range(updates):
        for engine in engines:
            engine.backward(engine(batch))
            engine.step()
    dist.barrier()


def _engine(args: argparse.Namespace, lena: bool, clock: _Clock) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = Net(args.depth, args.width)
    if lena:
        optimizer: Any = ds_lena.LENA(model.parameters(), total_steps=1_000_000, **ADAMW)
        optimizer.begin_update = clock.timed("begin_update", optimizer.begin_update)
        optimizer.end_update = clock.timed("end_update", optimizer.end_update)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    optimizer.step = clock.timed("lena_step" if lena else "stock_step", optimizer.step)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": args.stage},
        "gradient_clipping": 0.0,
        "steps_per_print": 1_000_000,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0], optimizer


class _Clock:
    """Seconds by part and update, once it has been started."""

    def __init__(self) -> None:
        self._update = -1
        self._seconds: defaultdict[tuple[str, int], float] = defaultdict(float)

    def next_update(self) -> None:
        self._update += 1

    def by_update(self, part: str, updates: int) -> Tensor:
        """Seconds of a part on this rank, (updates,)."""
        return torch.tensor([self._seconds[part, update] for update in range(updates)], dtype=torch.float64)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                if self._update >= 0:
                    self._seconds[part, self._update] += time.perf_counter() - begin

        return run


class _timed_hooks_and_all_reduce:
    """Wraps the two functions of ds_lena that belong to no object of ours."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock

    def __enter__(self) -> None:
        self._see, self._sum_over = Probe._see, ds_lena.measure.sum_over
        Probe._see = self._clock.timed("hooks", self._see)  # type: ignore[method-assign]
        ds_lena.measure.sum_over = self._clock.timed("all_reduce", self._sum_over)

    def __exit__(self, *_: object) -> None:
        Probe._see, ds_lena.measure.sum_over = self._see, self._sum_over  # type: ignore[method-assign]


def _of_all_ranks(values: Tensor) -> Tensor:
    """(ranks, …)."""
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values)
    return torch.stack(parts)
