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
from .allowed import SPLITS, make, refuse_method, refuse_number, refuse_others, refuse_task

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

    def __post_init__(self) -> None:
        where = f"task {self.name}"
        refuse_task(where, self.kind, self.model, self.data, self.settings)
        refuse_number(where, "micro_batches", self.micro_batches, 1)
        refuse_number(where, "evaluations", self.evaluations, 1)

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

    def __post_init__(self) -> None:
        refuse_method(f"method {self.name}", self.optimizer, self.settings, self.search)


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

    def __post_init__(self) -> None:
        where = f"study {self.name}"
        refuse_number(where, "n", self.n, 1)
        refuse_number(where, "trials", self.trials, 0)
        refuse_others(where, "split", [self.split], SPLITS)
        for seed in self.seeds:
            refuse_number(where, "a seed", seed, 1)  # 0 is that of the trials
        for several in ([method.name for method in self.methods], self.seeds):
            if len(set(several)) < len(several):
                raise InputError(f"{where}: one of {', '.join(map(str, several))} is there twice")

    def method(self, name: str) -> Method:
        return next(method for method in self.methods if method.name == name)

    def digest(self, method: Method) -> str:
        """A name for what a run of `method` depends on, apart from other runs."""
        told = [asdict(self.task), self.n, asdict(method), self.split, self.base, self.settings_of]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def chooser(study: Study, studies: Mapping[str, Study]) -> Study:
    """The study whose trials choose the settings."""
    return study if study.settings_of is None else studies[study.settings_of]


def read(path: Path = STUDIES) -> dict[str, Study]:
    """The studies by name, in the order in which they are to run.

    Raises:
        InputError: no such file, no YAML, a name that nothing has, or a key that is not known.
    """
    try:
        told = yaml.safe_load(path.read_text())
        return _studies(**told)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except KeyError as error:
        raise InputError(f"{path}: nothing is called {error}, or not before it is used") from error
    except (TypeError, AttributeError) as error:
        raise InputError(f"{path}: tasks, methods and studies are needed, each a mapping by name: {error}") from error


def _studies(tasks: Mapping[str, Any], methods: Mapping[str, Any], studies: Mapping[str, Any]) -> dict[str, Study]:
    known_tasks = {name: make(Task, f"task {name}", told, name=name) for name, told in tasks.items()}
    known_methods = {name: make(Method, f"method {name}", told, name=name) for name, told in methods.items()}
    found: dict[str, Study] = {}
    for name, told in studies.items():
        study = found[name] = _study(name, told, known_tasks, known_methods)
        for other in (study.base, study.settings_of):
            if other is not None:
                found[other]
        _refuse_unchosen(study, found)
    if not found:
        raise InputError("no studies")
    return found


def _study(name: str, told: Any, tasks: Mapping[str, Task], methods: Mapping[str, Method]) -> Study:
    where = f"study {name}"
    more: dict[str, Any] = {"name": name}
    if isinstance(told, Mapping):
        for several in told.keys() & {"methods", "seeds"}:
            if not isinstance(told[several], list):
                raise InputError(f"{where}: {several} is {told[several]!r}; a list is needed")
        meant = {"task": tasks.__getitem__, "methods": lambda names: tuple(methods[n] for n in names), "seeds": tuple}
        more |= {entry: of(told[entry]) for entry, of in meant.items() if entry in told}
    return make(Study, where, told, **more)


def _refuse_unchosen(study: Study, studies: Mapping[str, Study]) -> None:
    """Raise InputError where a method would run without what it searches, or without a learning rate."""
    where = f"study {study.name}"
    choosing = chooser(study, studies)
    if choosing.settings_of is not None:
        raise InputError(
            f"{where}: settings_of is {choosing.name}, which has them of {choosing.settings_of}; name that"
        )
    single = () if study.base is None else studies[study.base].methods[:1]
    for method in study.methods:
        if method.search and (choosing.trials == 0 or method not in choosing.methods):
            raise InputError(f"{where}: {method.name} is searched, but {choosing.name} has no trials for it")
        if not any("lr" in told for m in (method, *single) for told in (study.task.settings, m.settings, m.search)):
            raise InputError(f"{where}: {method.name} has no lr, of its own or of a base")
