"""The constants of `ds_lena.cost.Machine`, measured on this machine: one thread, one process, no network."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import ds_lena
from ds_lena.norms import SquaredNorms
from ds_lena.rules import RULES
from ds_lena.shards import Segment, plan_flat
from ds_lena.stepper import Stepper

LARGE = 1 << 24  # elements: far beyond any cache
SMALL = 64
FEW, MANY = 50, 1000  # tensors: what is paid once for all of them should not be lost in them
ADAMW = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def measure_host() -> dict[str, float]:
    """Constants in seconds, bytes per second and FLOP per second; medians of repeats.

    Each repeat begins with caches that hold other things, as it does after forward and backward.
    """
    norms = _norms()
    hook_s = _hook(norms["memory_bandwidth"])
    return {**norms, "hook_s": hook_s, "call_s": _call(), **_factors(), "flops": _arithmetic()}


def median_seconds(action: Callable[[], object], repeats: int) -> float:
    """Of one call, after two that are not counted."""
    action(), action()
    others = torch.zeros(LARGE)
    taken = []
    for _ in range(repeats):
        others.add_(1)
        begin = time.perf_counter()
        action()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def _norms() -> dict[str, float]:
    written = SquaredNorms(FEW, torch.float32, torch.device("cpu"))
    large, pieces = torch.randn(LARGE), torch.randn(FEW, SMALL).unbind()

    def norms() -> None:
        for index, piece in enumerate(pieces):
            written.write(index, piece)

    return {
        "memory_bandwidth": 4 * LARGE / median_seconds(lambda: written.write(0, large), 15),
        "norm_s": median_seconds(norms, 30) / FEW,
    }


def _hook(memory_bandwidth: float) -> float:
    """What the backward pass of some linear layers takes longer with LENA's hooks, per tensor, without the reading.

    The layers matter: a hook that follows other work finds none of what it needs in the caches. LENA's second pass,
    which follows every backward in plain PyTorch only, is left out.
    """
    width = 128

    def backward_seconds(watched: bool) -> float:
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(FEW // 2)))
        if watched:
            optimizer = ds_lena.LENA(model.parameters(), warmup="none", **ADAMW)
            optimizer._probe.after_pass = None
        batch, taken = torch.randn(64, width), []
        for _ in range(150):
            loss = model(batch).square().mean()
            begin = time.perf_counter()
            loss.backward()
            taken.append(time.perf_counter() - begin)
        return statistics.median(taken[2:])

    reading = 4 * (FEW // 2) * (width + 1) * width / memory_bandwidth
    return max(0.0, backward_seconds(True) - backward_seconds(False) - reading) / FEW


def _call() -> float:
    """What an update of many small pieces takes longer than one of a single piece, per piece."""

    def step_seconds(pieces: int) -> float:
        flat = torch.zeros(FEW * SMALL)
        flat.grad = torch.ones_like(flat)
        size = flat.numel() // pieces
        segments = [Segment(i, i * size, size, 0) for i in range(pieces)]
        plan = plan_flat(flat.numel(), segments, range(pieces), [True] * pieces)
        stepper = Stepper(RULES["adamw"], {flat: plan})
        state: dict[Tensor, dict[str, object]] = {flat: {}}
        factor = torch.ones(pieces + 1, dtype=torch.float64)
        return median_seconds(lambda: stepper.step([{"params": [flat], **ADAMW}], state, factor), 50)

    return max(0.0, step_seconds(FEW) - step_seconds(1)) / (FEW - 1)


def _factors() -> dict[str, float]:
    """Seconds of `begin_update` and `end_update` without norms and network: of an update, and of each layer."""

    def update_seconds(layers: int) -> float:
        parameters = _small_parameters(layers)
        optimizer = ds_lena.LENA(parameters, total_steps=1_000_000, **ADAMW)
        others, taken = torch.zeros(LARGE), []
        for _ in range(20):
            torch.autograd.backward(parameters, [torch.randn(SMALL) for _ in parameters])
            others.add_(1)
            begin = time.perf_counter()
            optimizer.begin_update()
            optimizer.end_update(applied=True)
            taken.append(time.perf_counter() - begin)
        return statistics.median(taken[2:])

    at_few, at_many = update_seconds(FEW), update_seconds(MANY)
    layer = max(0.0, at_many - at_few) / (MANY - FEW)
    return {"update_s": at_few - FEW * layer, "layer_s": layer}


def _arithmetic() -> float:
    """FLOP per second that forward and backward of two linear layers reach."""
    width, tokens = 512, 512
    model = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
    batch = torch.randn(tokens, width, requires_grad=True)
    return 6 * 2 * width * width * tokens / median_seconds(lambda: model(batch).sum().backward(), 20)


def _small_parameters(count: int) -> list[Tensor]:
    return [nn.Parameter(torch.zeros(SMALL)) for _ in range(count)]
