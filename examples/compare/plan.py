"""What `studies.yaml` asks for, checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..common.errors import InputError

STUDIES = Path(__file__).with_name("studies.yaml")


@dataclass(frozen=True)
class Task:
    """What is learned. `model` and `data` are keyword arguments of the task's kind.

    A run sees `micro_batches` micro-batches, whatever the batch, and is evaluated `evaluations` times. `settings` are
    those that all methods share.
    """

    name: str
    kind: str
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    micro_batches: int
    evaluations: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def measure(self) -> str:
        """What an evaluation gives, and what is to be small."""
        return "share of errors" if self.kind == "images" else "loss"


@dataclass(frozen=True)
class Method:
    """A way to train: an optimizer, settings that are fixed, and the space that trials search.

    `search` maps a setting to `{"uniform": [low, high]}`, `{"log": [low, high]}` or `{"choice": [...]}`.
    """

    name: str
    optimizer: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Mapping[str, list[Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """Methods on one task at one batch: `trials` each with seed 0 to choose settings by the validation split, then
    one run for each of `seeds` that is measured on `split`.

    `n`: micro-batches in one update. `base`: the study that tuned the single worker, whose choice is where every
    method's settings start. `settings_of`: the study whose choice is taken over, instead of trials.
    """

    name: str
    task: Task
    n: int
    methods: tuple[Method, ...]
    trials: int = 0
    seeds: tuple[int, ...] = ()
    split: str = "test"
    base: str | None = None
    settings_of: str | None = None

    def method(self, name: str) -> Method:
        return next(method for method in self.methods if method.name == name)

    def digest(self, method: Method) -> str:
        """A name for what a run of `method` depends on, apart from other runs."""
        told = [asdict(self.task), self.n, asdict(method), self.split, self.base, self.settings_of]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def read(path: Path = STUDIES) -> dict[str, Study]:
    """The studies by name, in the order in which they are to run.

    Raises:
        InputError: a name that nothing has, or a key that is not known.
    """
    told = yaml.safe_load(path.read_text())
    try:
        tasks = {name: Task(name, **task) for name, task in told["tasks"].items()}
        methods: dict[str, Method] = {}
        for name, method in told["methods"].items():
            methods[name] = _method(name, method, methods)
        studies: dict[str, Study] = {}
        for name, study in told["studies"].items():
            chosen = {"task": tasks[study["task"]], "methods": tuple(methods[m] for m in study["methods"])}
            chosen["seeds"] = tuple(study.get("seeds", ()))
            studies[name] = Study(name, **(study | chosen))
            for other in (studies[name].base, studies[name].settings_of):
                if other is not None:
                    studies[other]
    except KeyError as error:
        raise InputError(f"{path}: nothing is called {error}, or not before it is used") from error
    except TypeError as error:
        raise InputError(f"{path}: {error}") from error
    return studies


def _method(name: str, told: Mapping[str, Any], known: Mapping[str, Method]) -> Method:
    """`like` takes optimizer, settings and search of another method; settings are added to, a search is replaced."""
    told = dict(told)
    if (like := told.pop("like", None)) is None:
        return Method(name, **told)
    other = known[like]
    settings = {**other.settings, **told.pop("settings", {})}
    search = told.pop("search", {key: space for key, space in other.search.items() if key not in settings})
    return Method(name, other.optimizer, settings, search, **told)
