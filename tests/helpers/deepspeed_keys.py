"""Finds the keys of DeepSpeed's JSON: those that it asks a configuration for, and the fields of its pydantic models."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import BaseModel, ValidationError

Path = tuple[str, ...]
DEEPEST = 5
UNKNOWN = "not_a_key_of_deepspeed"


class Asked(dict[str, Any]):
    """A part of a configuration that notes which keys it is asked for, as paths from the top."""

    def __init__(self, content: dict[str, Any], path: Path, asked: set[Path]) -> None:
        super().__init__(content)
        self.path, self.asked = path, asked

    def _note(self, key: object) -> None:
        if isinstance(key, str):
            self.asked.add((*self.path, key))

    def __contains__(self, key: object) -> bool:
        self._note(key)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key)
        return super().get(key, default)

    def keys(self) -> Any:
        """For `key in configuration.keys()`."""
        return Keys(self)

    def __copy__(self) -> Asked:
        return Asked(dict(self), self.path, self.asked)


class Keys:
    """The keys of an `Asked`."""

    def __init__(self, owner: Asked) -> None:
        self._owner = owner

    def __contains__(self, key: object) -> bool:
        return key in self._owner

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner)


def keys_of_deepspeed() -> set[str]:
    """All keys, with dots between the levels."""
    found: set[Path] = set()
    waiting: list[Path] = [()]
    while waiting:
        path = waiting.pop()
        model, asked = _try(path, {UNKNOWN: 1}) if path else (None, set())
        if model is not None:
            found |= asked | set(_fields(model, path))
            continue
        new = _try(path, {})[1] - found
        found |= new
        waiting += [key for key in new if len(key) < DEEPEST]
    return {".".join(path) for path in found if path[-1] != UNKNOWN}


def _try(path: Path, content: dict[str, Any]) -> tuple[type[BaseModel] | None, set[Path]]:
    """Read a configuration with `content` at `path`: the model that refuses an unknown key, and what was asked."""
    asked: set[Path] = set()
    whole: dict[str, Any] = content
    for depth in range(len(path), -1, -1):
        if depth == 0:
            whole = {"train_batch_size": 1, **whole}
        whole = Asked(whole, path[:depth], asked)
        if depth:
            whole = {path[depth - 1]: whole}
    model = None
    try:
        DeepSpeedConfig(whole)
    except ValidationError as error:
        model = _models().get(error.title)
    except Exception:  # a value that has to be a number, say: then it is no block of keys
        pass
    return model, {key for key in asked if key[: len(path)] == path and len(key) == len(path) + 1}


def _models() -> dict[str, type[BaseModel]]:
    found: dict[str, type[BaseModel]] = {}
    waiting: list[type[BaseModel]] = [BaseModel]
    while waiting:
        for model in waiting.pop().__subclasses__():
            waiting.append(model)
            if model.__module__.startswith("deepspeed."):
                found[model.__name__] = model
    return found


def _fields(model: type[BaseModel], path: Path) -> Iterator[Path]:
    for name, field in model.model_fields.items():
        key = (*path, field.alias or name)
        yield key
        for kind in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _fields(kind, key)
