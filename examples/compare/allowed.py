"""What tasks, methods and studies may say. A name that nothing reads would change nothing, in silence."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import MISSING, fields
from typing import Any

from ds_lena.config import KEYS, LenaConfig
from ds_lena.errors import ConfigError

from ..common.errors import InputError

MODELS = {
    "language": {"architecture", "layers", "width", "heads", "initializer_range"},
    "images": {"width", "depths"},
}
"""What the model of each kind of task says."""
DATA = {
    "language": {"vocab_size", "sequence_length", "blocks_per_micro_batch", "evaluation_blocks"},
    "images": {"rows_per_micro_batch"},
}
ARCHITECTURES = ("gpt2", "bert", "modernbert", "llama")
"""Of language models."""
SPLITS = ("validation", "test")
SPACES = ("uniform", "log", "choice")
_SHARED = {
    "lr",
    "lr_power",
    "beta2",
    "weight_decay",
    "clip",
    "warmup_fraction",
    "full_batch_at",
    "batch_lr_power",
}
_LENA = _SHARED | (set(KEYS) - {"betas", "no_decay", "total_steps"})  # which the harness sets
SETTINGS: dict[str, set[str]] = {
    "adamw": _SHARED,
    "sgd": _SHARED,
    "schedule-free": _SHARED,
    "muon": _SHARED | {"muon_lr"},
    "lena": _LENA,
    "lena-muon": _LENA | {"muon_lr"},
    "preconditioned-lena": _LENA,
}
"""By optimizer."""
_NEEDED = {"muon_lr"}
"""Settings without which an optimizer that has them cannot be."""


def make(kind: type, where: str, told: Any, **more: Any) -> Any:
    """`kind(**told, **more)` for a dataclass, or InputError where `told` has not its entries."""
    _refuse_unless_mapping(where, told)
    entries = fields(kind)
    needed = {entry.name for entry in entries if entry.default is MISSING and entry.default_factory is MISSING}
    _refuse_entries(where, told, {entry.name for entry in entries} - {"name"}, needed - more.keys())
    return kind(**dict(told) | more)


def refuse_others(where: str, what: str, given: Iterable[Any], allowed: Collection[str]) -> None:
    """Raise InputError for what is given and not allowed."""
    for name in given:
        if name not in allowed:
            raise InputError(f"{where}: no {what} is called {name}; there are {', '.join(sorted(allowed))}")


def refuse_number(where: str, what: str, given: Any, least: int) -> None:
    """Raise InputError unless a whole number of `least` or more is given."""
    if not isinstance(given, int) or isinstance(given, bool) or given < least:
        raise InputError(f"{where}: {what} is {given!r}; a whole number of {least} or more is needed")


def refuse_task(
    where: str, kind: str, model: Mapping[str, Any], data: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Raise InputError for a kind of task, an entry or a setting that does not exist, or an entry that is missing."""
    refuse_others(where, "kind", [kind], MODELS)
    for what, given in (("model", model), ("data", data), ("settings", settings)):
        _refuse_unless_mapping(f"{where}, {what}", given)
    for what, given, allowed in (("model", model, MODELS[kind]), ("data", data, DATA[kind])):
        _refuse_entries(where, given, allowed, allowed, f" of {what}")
    if kind == "language":
        refuse_others(where, "architecture", [model["architecture"]], ARCHITECTURES)
    refuse_others(where, "setting", settings, set().union(*SETTINGS.values()))


def refuse_method(
    where: str, optimizer: str, settings: Mapping[str, Any], search: Mapping[str, Mapping[str, Any]]
) -> None:
    """Raise InputError for an optimizer, a setting, a space or a value for LENA that cannot be."""
    refuse_others(where, "optimizer", [optimizer], SETTINGS)
    for what, given in (("settings", settings), ("search", search)):
        _refuse_unless_mapping(f"{where}, {what}", given)
    allowed = SETTINGS[optimizer]
    refuse_others(where, "setting", [*settings, *search], allowed)
    if missing := (_NEEDED & allowed) - settings.keys() - search.keys():
        raise InputError(f"{where}: {', '.join(missing)} is missing, in its settings or its search")
    for setting, space in search.items():
        _refuse_space(where, setting, space)
    if allowed >= _LENA:
        _refuse_values(where, settings, search)


def _refuse_unless_mapping(where: str, given: Any) -> None:
    if not isinstance(given, Mapping):
        raise InputError(f"{where}: a mapping is needed, {given!r} is given")


def _refuse_entries(
    where: str, given: Mapping[str, Any], allowed: Set[str], needed: Set[str], of_what: str = ""
) -> None:
    refuse_others(where, f"entry{of_what}", given, allowed)
    if missing := sorted(needed - given.keys()):
        raise InputError(f"{where}: {', '.join(missing)}{of_what} is missing")


def _refuse_space(where: str, setting: str, space: Any) -> None:
    kind, values = next(iter(space.items())) if isinstance(space, Mapping) and len(space) == 1 else (None, None)
    if kind not in SPACES or not isinstance(values, list):
        raise InputError(f"{where}: no space for {setting} is called {space}; there are {', '.join(sorted(SPACES))}")
    if kind == "choice":
        allowed, good = "at least one value", bool(values)
    else:
        allowed = "two numbers, the smaller one first" + (", both above 0" if kind == "log" else "")
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
        good = numbers and len(values) == 2 and values[0] < values[1] and (kind != "log" or values[0] > 0)
    if not good:
        raise InputError(f"{where}: the space for {setting} is {kind} {values}; it needs {allowed}")


def _refuse_values(where: str, settings: Mapping[str, Any], search: Mapping[str, Mapping[str, Any]]) -> None:
    """What is fixed, and then each value at the ends of what is searched, has to be one that LENA takes."""
    fixed = {key: value for key, value in settings.items() if key in KEYS}
    spaces = [(key, values) for key, space in search.items() if key in KEYS for values in space.values()]
    for tried in ({}, *({key: value} for key, values in spaces for value in values)):
        try:
            LenaConfig.from_keys(fixed | tried)
        except ConfigError as error:
            raise InputError(f"{where}: {error}") from error
