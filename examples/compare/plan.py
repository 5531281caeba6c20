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
from .allowed import refuse_unknown, refuse_unknown_task

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
        refuse_unknown_task(self.name, self.kind, self.model)

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
        refuse_unknown(self.name, self.optimizer, self.settings, self.search)


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
    known_tasks = {name: Task(name, **task) for name, task in tasks.items()}
    known_methods = {name: Method(name, **method) for name, method in methods.items()}
    found: dict[str, Study] = {}
    for name, study in studies.items():
        chosen = {"task": known_tasks[study["task"]], "methods": tuple(known_methods[m] for m in study["methods"])}
        chosen["seeds"] = tuple(study.get("seeds", ()))
        found[name] = Study(name, **(study | chosen))
        for other in (found[name].base, found[name].settings_of):
            if other is not None:
                found[other]
    if not found:
        raise InputError("no studies")
    return found
