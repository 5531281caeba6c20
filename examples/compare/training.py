"""One run: a model, a method, a batch, a seed -> the losses over the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import optuna
import torch

import ds_lena

from .optimizers import Contestant, build, windows
from .runs import Stage


def train(stage: Stage, settings: Mapping[str, Any], seed: int, trial: optuna.trial.BaseTrial) -> float:
    """Train once, on one core. Evaluations, in even steps, are reported to `trial` by the number of updates.

    Of the method `lena` in a study with a picture the first seed leaves an attribute `gains` of the trial, too: rows of
    (update, {layer: (gain, noise scale)}). Where the batch follows the noise, an attribute `batches` is what it was:
    (micro-batches of an update, so many updates), in their order.

    Returns:
        The last loss.

    Raises:
        optuna.TrialPruned: the run diverged.
    """
    study, task = stage.study, stage.study.task
    evaluations = 1 if stage.tunes else task.evaluations  # a trial is judged by its last loss
    with_gains = study.picture and stage.method.name == "lena" and seed == study.seeds[0]
    torch.set_num_threads(1)
    torch.compiler.reset()
    problem = task.problem(seed)
    planned = windows(settings, study.n, task.micro_batches)
    contestant = build(stage.method.optimizer, settings, problem.model, study.n, len(planned))
    contestant.mode(training=True)
    ends = {round(task.micro_batches * (i + 1) / evaluations) for i in range(evaluations)}
    done, loss, gains = 0, math.nan, []
    batches: list[int] = []
    while done < task.micro_batches:
        following = planned[len(batches)] if contestant.growing is None else contestant.growing.accumulation
        batch = min(following, task.micro_batches - done)
        batches.append(batch)
        _update(problem, contestant, settings, done, batch, task.micro_batches)
        before, done = done, done + batch
        if any(before < end <= done for end in ends):
            contestant.mode(training=False)
            loss = round(problem.evaluate(stage.split), 5)
            contestant.mode(training=True)
            _prune_unless_finite(loss)
            trial.report(loss, len(batches))
            if with_gains:
                gains.append((len(batches), _gains(ds_lena.report(contestant.optimizers[0]))))
    if gains:
        trial.set_user_attr("gains", gains)
    if contestant.growing is not None:
        trial.set_user_attr("batches", [(size, len(list(same))) for size, same in groupby(batches)])
    return loss


def _update(
    problem: Any, contestant: Contestant, settings: Mapping[str, Any], done: int, batch: int, total: int
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
