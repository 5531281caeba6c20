"""What tasks and methods may say. A name that nothing reads would change nothing, in silence."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ds_lena.config import KEYS, LenaConfig
from ds_lena.errors import ConfigError

from ..common.errors import InputError

TASK_KINDS = ("language", "images")
ARCHITECTURES = ("gpt2", "bert", "modernbert", "llama")
"""Of language models."""
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
SETTINGS: dict[str, set[str]] = {
    "adamw": _SHARED,
    "sgd": _SHARED,
    "schedule-free": _SHARED,
    "muon": _SHARED | {"muon_lr"},
    "lena": _SHARED | set(KEYS),
    "lena-muon": _SHARED | set(KEYS) | {"muon_lr"},
    "preconditioned-lena": _SHARED | set(KEYS),
}
"""By optimizer."""


def refuse_unknown_task(task: str, kind: str, model: Mapping[str, Any]) -> None:
    """Raise InputError for a kind of task or an architecture that does not exist."""
    where = f"task {task}"
    _refuse_unless(kind in TASK_KINDS, where, "kind", kind, TASK_KINDS)
    if kind == "language":
        architecture = model.get("architecture")
        _refuse_unless(architecture in ARCHITECTURES, where, "architecture", architecture, ARCHITECTURES)


def refuse_unknown(
    method: str, optimizer: str, settings: Mapping[str, Any], search: Mapping[str, Mapping[str, Any]]
) -> None:
    """Raise InputError for an optimizer, a setting, a kind of space or a value for LENA that does not exist."""
    where = f"method {method}"
    _refuse_unless(optimizer in SETTINGS, where, "optimizer", optimizer, SETTINGS)
    for setting in (*settings, *search):
        _refuse_unless(setting in SETTINGS[optimizer], where, "setting", setting, SETTINGS[optimizer])
    for setting, space in search.items():
        is_space = isinstance(space, Mapping) and len(space) == 1 and isinstance(next(iter(space.values())), list)
        _refuse_unless(is_space and set(space) <= set(SPACES), where, f"space for {setting}", space, SPACES)
    if set(KEYS) <= SETTINGS[optimizer]:
        try:
            LenaConfig.from_keys({key: value for key, value in settings.items() if key in KEYS})
        except ConfigError as error:
            raise InputError(f"{where}: {error}") from error


def _refuse_unless(known: bool, where: str, what: str, given: object, allowed: Collection[str]) -> None:
    if not known:
        raise InputError(f"{where}: no {what} is called {given}; there are {', '.join(sorted(allowed))}")
