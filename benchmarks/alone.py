"""The two optimizers without DeepSpeed: one process, fp32, both move the same weights.

The backward pass that is timed computes nothing: it adds ready-made gradients to `p.grad`, and LENA's hooks run. In
plain PyTorch LENA measures the averaged gradient at the end of the pass too, which it does in its step under DeepSpeed.
The model's own passes are timed to show how much that is.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contestants import build_model, make_optimizer, random_tokens
from benchmarks.timing import Lap, Stopwatch, Update, compare, count_syncs, measure, warm_up

MODEL_PASSES = 3


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One case, with the phases "backward" and "step"."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    runs_ahead = device.type != "cpu"
    stopwatch = Stopwatch(args.clock, torch.accelerator.synchronize if runs_ahead else _no_wait)
    model = build_model(args.model).to(device)
    case: dict[str, Any] = {"model_pass": _time_model(model, args, stopwatch)}
    gradients = [torch.randn_like(weight) * 1e-3 for weight in model.parameters()]
    for weight, gradient in zip(model.parameters(), gradients, strict=True):
        weight.grad = gradient.clone()
    contestants = {name: _contestant(name, model, gradients) for name in ("adamw", "lena")}
    warm_up(contestants, updates=2)
    if args.check_sync:
        case["syncs"] = {name: count_syncs(update) for name, update in contestants.items()}
    else:
        case["seconds"] = measure(contestants, args.seconds, stopwatch, runs_ahead)
        case["compared"] = compare(case["seconds"])
    return [case]


def _contestant(name: str, model: nn.Module, gradients: list[Tensor]) -> Update:
    """Parameters of its own, hooks and all, in the memory of the model's weights and gradients."""
    parameters = [nn.Parameter(weight.detach()) for weight in model.parameters()]
    for parameter, weight in zip(parameters, model.parameters(), strict=True):
        parameter.grad = weight.grad
    optimizer = make_optimizer(name, parameters)

    def update(lap: Lap) -> None:
        torch.autograd.backward(parameters, gradients)
        lap("backward")
        optimizer.step()
        lap("step")

    return update


def _time_model(model: nn.Module, args: argparse.Namespace, stopwatch: Stopwatch) -> float:
    """Seconds of one forward and backward pass of the model itself, the median of a few."""
    tokens = random_tokens(args.model, (1, args.tokens), seed=0).to(next(model.parameters()).device)

    def one_pass(lap: Lap) -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        model.zero_grad()

    return statistics.median(stopwatch.time_whole(one_pass)["update"] for _ in range(MODEL_PASSES))


def _no_wait() -> None:
    pass
