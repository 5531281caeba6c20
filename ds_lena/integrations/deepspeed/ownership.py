"""Two engines cannot train one parameter: who trains which."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ...errors import UnsupportedError
from ...layers import named_parameters

_owner: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Parameter -> weak reference to the engine whose LENA trains it."""


def require_free(engine: Any, model: nn.Module, given: Iterable[Any]) -> None:
    """Raise `UnsupportedError` where another engine trains one of the given parameters (or groups of them).

    To be called before DeepSpeed wraps them, since it would move them from under the other engine.
    """
    names = {id(parameter): name for name, parameter in named_parameters(model)}
    for entry in given:
        for parameter in entry["params"] if isinstance(entry, dict) else (entry,):
            other = _owner.get(parameter)
            if other is not None and other() is not None and other() is not engine:
                raise UnsupportedError(
                    f'LENA: "{names.get(id(parameter))}" is already trained by another DeepSpeed engine with LENA. Two '
                    "engines cannot share a parameter: call destroy() on the first engine, or give each engine its own "
                    "parameters."
                )


def take(engine: Any, parameters: Iterable[Tensor]) -> None:
    """The engine trains these from now on."""
    _owner.update({parameter: weakref.ref(engine) for parameter in parameters})


def release(engine: Any, parameters: Iterable[Tensor]) -> None:
    """The engine trains them no more."""
    for parameter in parameters:
        owner = _owner.get(parameter)
        if owner is not None and owner() is engine:
            del _owner[parameter]
