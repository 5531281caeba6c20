"""The only patch of DeepSpeed's classes: where the engine makes its optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any


def wrap_configure_optimizer(engine_module: ModuleType, wrapper: Callable[..., None]) -> None:
    """Run `wrapper(engine, original, client_optimizer, model_parameters)` where an engine makes its optimizer."""
    engine_class = engine_module.DeepSpeedEngine
    original = engine_class._configure_optimizer

    @functools.wraps(original)
    def configure(self: Any, client_optimizer: Any, model_parameters: Any) -> None:
        wrapper(self, functools.partial(original, self), client_optimizer, model_parameters)

    engine_class._configure_optimizer = configure


def allow_under_zero(optimizer_class: type) -> None:
    """Make ZeRO accept the class without `zero_allow_untested_optimizer`."""
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    if optimizer_class not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(optimizer_class)
