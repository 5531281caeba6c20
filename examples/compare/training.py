"""One run: a model, a method, a batch, a seed -> the losses over the run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import ds_lena

from .images import ImageTask
from .language import LanguageTask
from .optimizers import Contestant, build, windows
from .plan import Task

DATA = Path("outputs/compare")
"""Where tokens are kept."""


class Problem(Protocol):
    """A model with its data, at one seed. `evaluate` gives what is to be small: a loss, or a share of errors."""

    model: nn.Module

    def loss(self, index: int) -> Tensor: ...

    def evaluate(self, split: str) -> float: ...


KINDS: dict[str, Callable[..., Problem]] = {"language": LanguageTask, "images": ImageTask}


def train(
    task: Task,
    optimizer: str,
    settings: Mapping[str, Any],
    n: int,
    seed: int,
    split: str,
    *,
    evaluations: int,
    reports: bool = False,
) -> dict[str, Any]:
    """Train once, on one core, with `evaluations` evaluations in even steps, the last one at the end.

    Returns:
        `loss`, the last one on `split`, None where the run diverged; `curve`, rows of (update, micro-batches seen,
        loss); `seconds`; with `reports` and a LENA, `lena`, rows of (update, gain and noise scale by layer).
    """
    torch.set_num_threads(1)
    torch.compiler.reset()
    began = time.monotonic()
    problem = KINDS[task.kind](task.model, task.data, DATA, seed)
    batches = windows(settings, n, task.micro_batches)
    contestant = build(optimizer, settings, problem.model, n, len(batches))
    contestant.mode(training=True)
    ends = {round(task.micro_batches * (i + 1) / evaluations) for i in range(evaluations)}
    curve, lena, done = [], [], 0
    for update, batch in enumerate(batches, start=1):
        finite = _update(problem, contestant, settings, done, batch, task.micro_batches)
        before, done = done, done + batch
        if not finite:
            break
        if any(before < end <= done for end in ends):
            contestant.mode(training=False)
            loss = problem.evaluate(split)
            contestant.mode(training=True)
            if not math.isfinite(loss):
                break
            curve.append((update, done, round(loss, 5)))
            if reports and isinstance(contestant.optimizers[0], ds_lena.LENA):
                lena.append((update, _digest(ds_lena.report(contestant.optimizers[0]))))
    ended = bool(curve) and curve[-1][1] == task.micro_batches
    found = {"loss": curve[-1][2] if ended else None, "curve": curve, "seconds": round(time.monotonic() - began)}
    return found | ({"lena": lena} if lena else {})


def _update(
    problem: Problem, contestant: Contestant, settings: Mapping[str, Any], done: int, batch: int, total: int
) -> bool:
    """Average over `batch` micro-batches, clip, step. False where the loss is not finite."""
    loss = 0.0
    for index in range(done, done + batch):
        part = problem.loss(index) / batch
        part.backward()
        loss += float(part.detach())
    torch.nn.utils.clip_grad_norm_(problem.model.parameters(), settings.get("clip", math.inf))
    scale = batch ** settings.get("batch_lr_power", 0.0)
    contestant.set_lr(done / total, (done + batch) / total, scale)
    contestant.step()
    return math.isfinite(loss)


def _digest(report: dict[str, Any]) -> dict[str, Any]:
    """Gain and noise scale of the model and of each layer, to four digits."""

    def of(told: Mapping[str, Any]) -> tuple[float, float]:
        return float(f"{told['gain']:.4g}"), float(f"{told['noise_scale']:.4g}")

    return {"model": of(report)} | {name: of(layer) for name, layer in report["layers"].items()}
