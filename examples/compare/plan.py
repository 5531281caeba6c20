"""What can be compared: a task, a method, a study. `studies.py` says what is."""

from __future__ import annotations

import runpy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from optuna.distributions import BaseDistribution, CategoricalDistribution

from ..common.errors import InputError
from . import optimizers

STUDIES = Path(__file__).with_name("studies.py")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is learned.

    A run sees `micro_batches` micro-batches, whatever the batch, and is evaluated `evaluations` times. All methods
    share `settings`.
    """

    name: str
    micro_batches: int
    evaluations: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    measure: ClassVar[str] = "loss"

    def problem(self, seed: int) -> Any:
        """A `model` with its data; `seed` is that of the weights and of the order of the data.

        `loss(index)` is the mean loss of a micro-batch, (); epoch after epoch, without an end. `evaluate(split)` is
        what the task measures on the split "validation" or "test"; the smaller, the better.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Method:
    """A way to train: an optimizer, settings that are fixed, and the space that trials search."""

    name: str
    optimizer: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, BaseDistribution] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ends = {key: _ends(space) for key, space in self.search.items()}
        lowest = {key: values[0] for key, values in ends.items()}
        for tried in ({}, *({key: value} for key, values in ends.items() for value in values)):
            try:
                optimizers.check(self.optimizer, {**self.settings, **lowest, **tried})
            except InputError as error:
                raise InputError(f"method {self.name}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Study:
    """Methods on one task, with `n` micro-batches in one update.

    First `trials` runs with seed 0 choose the settings of each method that has something to search, by the last loss on
    the validation split. Then one run for each of `seeds` is measured on `split`.

    `base`: the study that tuned the single worker; all methods start from the lr and the beta2 that it chose.
    `settings_of`: the study whose choices are taken over, instead of trials. `picture`: whether `report` draws it.
    """

    name: str
    task: Task
    n: int
    methods: tuple[Method, ...]
    trials: int = 0
    seeds: tuple[int, ...] = (1, 2, 3)
    split: str = "test"
    base: Study | None = None
    settings_of: Study | None = None
    picture: bool = False

    def __post_init__(self) -> None:
        self._require(self.n >= 1, f"n is {self.n}; 1 or more is needed")
        self._require(min(self.seeds, default=0) >= 1, f"seeds are {self.seeds}; 1 and more are needed, trials have 0")
        for several in ([method.name for method in self.methods], self.seeds):
            self._require(len(set(several)) == len(several), f"one of {several} is there twice")
        for method in self.methods:
            chosen = not method.search or (self.chooser.trials > 0 and method in self.chooser.methods)
            self._require(chosen, f"{method.name} has something to search, and {self.chooser.name} no trials for it")

    def _require(self, good: bool, words: str) -> None:
        if not good:
            raise InputError(f"study {self.name}: {words}")

    @property
    def chooser(self) -> Study:
        """The study whose trials choose the settings."""
        return self if self.settings_of is None else self.settings_of.chooser


def read(path: Path = STUDIES) -> dict[str, Study]:
    """The studies by name, in the order in which they are to run.

    Args:
        path: a Python file that makes `STUDIES`, a list of `Study`.

    Raises:
        InputError: there is no such file, it makes no such list, or something in it cannot be.
    """
    try:
        found = runpy.run_path(str(path)).get("STUDIES", [])
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    studies = {study.name: study for study in found}
    if not studies or len(studies) < len(found):
        raise InputError(f"{path}: STUDIES, a list of studies with different names, is needed")
    return studies


def _ends(space: BaseDistribution) -> tuple[Any, ...]:
    return tuple(space.choices) if isinstance(space, CategoricalDistribution) else (space.low, space.high)
