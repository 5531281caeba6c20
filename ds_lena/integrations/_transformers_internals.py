"""Takes the number of updates from HF Trainer, which knows it before it makes the DeepSpeed engine."""

from __future__ import annotations

import functools
import weakref
from types import ModuleType
from typing import Any

from ..errors import ConfigError, UnsupportedError
from ..optimizer import LENA, train_in_plain_pytorch

_planned: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
"""HF's DeepSpeed configuration object -> the updates that its Trainer plans."""


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
        _refuse_another_length(self.config.get("optimizer", {}), int(num_training_steps))
        result = original(self, args, model, num_training_steps)
        _planned[self] = int(num_training_steps)
        return result

    config_class.trainer_config_finalize = finalize


def _refuse_another_length(optimizer: dict[str, Any], planned: int) -> None:
    """Raise `ConfigError` if the entry's `total_steps` is not `planned`, which is 0 if nothing is trained."""
    params = optimizer.get("params") if optimizer.get("type") == LENA.__name__ else None
    given = (params or {}).get("total_steps")
    if planned > 0 and isinstance(given, (int, float)) and given != planned:
        raise ConfigError(
            f'LENA: "total_steps": {given} in the DeepSpeed configuration, but HF Trainer plans {planned} updates '
            "(max_steps, or those of num_train_epochs). Leave total_steps out, so that the Trainer's number is taken, "
            "or give the same number."
        )


def planned_updates(deepspeed_config: Any) -> int | None:
    """The updates that an HF Trainer plans, found by its DeepSpeed configuration: this very dict, not an equal one."""
    for config, updates in _planned.items():
        if config.config is deepspeed_config and updates > 0:
            return updates
    return None
