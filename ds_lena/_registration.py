"""Makes `"type": "LENA"` known to DeepSpeed and transformers, without importing them.

An action runs right after a script imports one of them, or now if it is imported already.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import logging
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

import torch

from .grad_stats.reduce import is_first_rank
from .optimizer import LENA

Action = Callable[[ModuleType], None]


def register() -> None:
    """Called by `import ds_lena`. Calling it again changes nothing."""
    if getattr(torch.optim, LENA.__name__, None) is LENA:
        return
    logging.getLogger("ds_lena").addFilter(_is_for_this_rank)
    torch.optim.LENA = LENA  # type: ignore[attr-defined]  # DeepSpeed looks up there the names that are not its own
    _when_imported("deepspeed.runtime.engine", _prepare_deepspeed)
    _when_imported("transformers.integrations.deepspeed", _prepare_transformers)
    _when_imported("megatron.core.parallel_state", _prepare_megatron)


def _is_for_this_rank(record: logging.LogRecord) -> bool:
    """Rank 0 says for all ranks what they would say alike."""
    return record.levelno > logging.WARNING or getattr(record, "every_rank", False) or is_first_rank()


def _prepare_deepspeed(module: ModuleType) -> None:
    from .integrations.deepspeed import attach

    attach.install(module)


def _prepare_transformers(module: ModuleType) -> None:
    from .integrations import _transformers_internals

    _transformers_internals.install(module)


def _prepare_megatron(module: ModuleType) -> None:
    from .integrations import megatron

    megatron.name_mpu_calls(module)


def _when_imported(name: str, action: Action) -> None:
    """Run `action(module)` now if the module is imported, else right after its import."""
    if name in sys.modules:
        action(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, action))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as Python does, and has an action run after the module's code."""

    def __init__(self, name: str, action: Action) -> None:
        self._name, self._action = name, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._action)
        return spec


class _Loader(importlib.abc.Loader):
    """A loader that runs an action after the module's own code."""

    def __init__(self, loader: importlib.abc.Loader, action: Action) -> None:
        self._loader, self._action = loader, action

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._action(module)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)  # get_source and the like
