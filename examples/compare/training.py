"""One run: a model, a method, a batch, a seed -> the losses over the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import optuna
import torch

import ds_lena

from .optimizers import Contestant, build, windows
from .plan import Problem, Task


def train(
    task: Task,
    optimizer: str,
    settings: Mapping[str, Any],
    n: int,
    seed: int,
    split: str,
    trial: optuna.trial.BaseTrial,
    *,
    evaluations: int,
    with_gains: bool = False,
) -> float:
    """Train once, on one core, with `evaluations` evaluations in even steps, the last one at the end.

    Each is reported to `trial`, by the number of updates. `with_gains` needs a LENA, and gives the trial an attribute
    `gains`: rows of (update, {layer: (gain, noise scale)}).

    Returns:
        The last loss on `split`.

    Raises:
        optuna.TrialPruned: the run diverged.
    """
    torch.set_num_threads(1)
    torch.compiler.reset()
    problem = task.problem(seed)
    batches = windows(settings, n, task.micro_batches)
    contestant = build(optimizer, settings, problem.model, n, len(batches))
    contestant.mode(training=True)
    ends = {round(task.micro_batches * (i + 1) / evaluations) for i in range(evaluations)}
    done, loss, gains = 0, math.nan, []
    for update, batch in enumerate(batches, start=1):
        _update(problem, contestant, settings, done, batch, task.micro_batches)
        before, done = done, done + batch
        if any(before < end <= done for end in ends):
            contestant.mode(training=False)
            loss = round(problem.evaluate(split), 5)
            contestant.mode(training=True)
            _prune_unless_finite(loss)
            trial.report(loss, update)
            if with_gains:
                gains.append((update, _gains(ds_lena.report(contestant.optimizers[0]))))
    if gains:
        trial.set_user_attr("gains", gains)
    return loss


def _update(
    problem: Problem, contestant: Contestant, settings: Mapping[str, Any], done: int, batch: int, total: int
) -> None:
    """Average over `batch` micro-batches, clip, step."""
    loss = 0.0
    for index in range(done, done + batch):
        part = problem.loss(index) / batch
        part.backward()
        loss += float(part.detach())
    torch.nn.utils.clip_grad_norm_(problem.model.parameters(), settings.get("clip", math.inf))
    contestant.set_lr(done / total, (done + batch) / total, batch ** settings.get("batch_lr_power", 0.0))
    contestant.step()
    _prune_unless_finite(loss)


def _prune_unless_finite(loss: float) -> None:
    if not math.isfinite(loss):
        raise optuna.TrialPruned


def _gains(report: dict[str, Any]) -> dict[str, list[float | None]]:
    """Gain and noise scale of the model and of each layer, to four digits; None where one is not finite."""
    told = {"model": report, **report["layers"]}
    return {name: [_short(of["gain"]), _short(of["noise_scale"])] for name, of in told.items()}


def _short(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None
