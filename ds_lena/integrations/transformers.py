"""HF Trainer knows the number of updates of a run before it makes the DeepSpeed engine; we remember it from there."""

from __future__ import annotations

import functools
import weakref
from types import ModuleType
from typing import Any

from ..errors import UnsupportedError
from ..optimizer import train_in_plain_pytorch

_planned: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
"""HF's DeepSpeed configuration object -> updates that its Trainer plans."""


def install(module: ModuleType) -> None:
    """Called once, when `transformers.integrations.deepspeed` is imported."""
    config_class = module.HfTrainerDeepSpeedConfig
    original = config_class.trainer_config_finalize

    @functools.wraps(original)
    def finalize(self: Any, args: Any, model: Any, num_training_steps: int) -> Any:
        if "optimizer" not in self.config and train_in_plain_pytorch(model.parameters()):
            raise UnsupportedError(
                "LENA: under DeepSpeed, HF Trainer throws away an optimizer that was handed to it, and trains with "
                'AdamW. Choose LENA in the DeepSpeed configuration: "optimizer": {"type": "LENA", "params": {…}}.'
            )
        result = original(self, args, model, num_training_steps)
        _planned[self] = int(num_training_steps)
        return result

    config_class.trainer_config_finalize = finalize


def planned_updates(deepspeed_config: Any) -> int | None:
    """The updates planned by the HF Trainer whose DeepSpeed configuration dict this very object is."""
    for config, updates in _planned.items():
        if config.config is deepspeed_config and updates > 0:
            return updates
    return None
