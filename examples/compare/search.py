"""Which settings to try next: optuna's tree-structured Parzen estimator, from nothing but the trials so far."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

Space = Mapping[str, Mapping[str, list[Any]]]
Seen = Sequence[tuple[dict[str, Any], float | None]]

_RANDOM_TRIALS = 5
_DIVERGED = 100.0
"""The loss that stands for a run that broke off."""


def suggest(space: Space, trial: int, seen: Seen) -> dict[str, Any]:
    """Settings for trial number `trial`, the same whenever it is asked for again.

    `seen` has the settings and the loss of earlier trials; the loss is None where the run diverged.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {key: _distribution(told) for key, told in space.items()}
    seed = zlib.crc32(f"trial {trial}".encode())  # seeds 0, 1, 2, … would draw alike
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=_RANDOM_TRIALS, multivariate=True)
    study = optuna.create_study(sampler=sampler)
    for settings, loss in seen:
        value = _DIVERGED if loss is None else loss
        study.add_trial(optuna.trial.create_trial(params=settings, distributions=distributions, value=value))
    return study.ask(distributions).params


def _distribution(told: Mapping[str, list[Any]]) -> BaseDistribution:
    ((kind, values),) = told.items()
    if kind == "choice":
        return CategoricalDistribution(values)
    return FloatDistribution(values[0], values[1], log=kind == "log")
