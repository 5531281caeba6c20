"""Which engine trains which parameter. Two engines cannot train the same one."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ...errors import UnsupportedError
from ...layers import named_parameters

_owner: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Parameter -> a weak reference to the engine whose LENA trains it."""


_engine_of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Parameter -> a weak reference to the last engine that was made for its model."""


def remember(engine: Any) -> None:
    """Note that an engine was made."""
    _engine_of.update({parameter: weakref.ref(engine) for parameter in engine.module.parameters()})


def engine_of(model: nn.Module) -> Any:
    """The last engine that was made for a model. None if there is none."""
    found = (_engine_of.get(parameter) for parameter in model.parameters())
    return next((engine() for engine in found if engine is not None), None)


def require_free(engine: Any, model: nn.Module, given: Iterable[Any]) -> None:
    """Raise `UnsupportedError` if another engine trains one of the given parameters or groups of parameters.

    Call it before DeepSpeed wraps the parameters: wrapping gives them new memory, and the other engine keeps the old.
    """
    names = {id(parameter): name for name, parameter in named_parameters(model)}
    for entry in given:
        for parameter in entry["params"] if isinstance(entry, dict) else (entry,):
            other = _owner.get(parameter)
            if other is not None and other() is not None and other() is not engine:
                raise UnsupportedError(
                    f'LENA: "{names.get(id(parameter))}" is already trained by another DeepSpeed engine with LENA. Two '
                    "engines cannot share a parameter: call destroy() on the first engine (HF Trainer: "
                    "trainer.model_wrapped.destroy()), or give each engine its own parameters."
                )


def take(engine: Any, parameters: Iterable[Tensor]) -> None:
    """Note that the engine trains these parameters from now on."""
    _owner.update({parameter: weakref.ref(engine) for parameter in parameters})


def release(engine: Any, parameters: Iterable[Tensor]) -> None:
    """Note that the engine no longer trains these parameters."""
    for parameter in parameters:
        owner = _owner.get(parameter)
        if owner is not None and owner() is engine:
            del _owner[parameter]
