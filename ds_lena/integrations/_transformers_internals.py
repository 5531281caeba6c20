"""Takes the number of updates from HF Trainer, which knows it before it makes the DeepSpeed engine."""

from __future__ import annotations

import functools
import weakref
from types import ModuleType
from typing import Any, NamedTuple, Protocol

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


# -- a batch that grows -----------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What `set_initial_training_values` of a Trainer returns. `steps_in_epoch` are micro-batches of one rank."""

    num_train_epochs: int
    num_update_steps_per_epoch: int
    num_examples: int
    num_train_samples: int
    total_train_batch_size: int
    steps_in_epoch: int
    max_steps: int

    def changed(self, **values: int) -> Plan:
        """The same plan with other values."""
        return self._replace(**values)


class Follower(Protocol):
    """What follows a Trainer's run where it has no callback."""

    def plan(self, args: Any, planned: Plan) -> Plan:
        """What the Trainer plans, changed."""
        ...

    def position(self, state: Any, begin: tuple[int, int], is_resumed: bool) -> tuple[int, int]:
        """Where it begins: epochs, and micro-batches of one rank in the next. `begin`: by its own count."""
        ...

    def samples_of_call(self) -> int:
        """What it has trained at the end of this `train()`."""
        ...


def follow(trainer: Any, follower: Follower) -> None:
    """Let `follower` change three things of a Trainer's runs: the plan, the place to resume at, the samples counted."""
    plan, begin, end = trainer.set_initial_training_values, trainer._init_training_state, trainer._finalize_training
    first = trainer.args.gradient_accumulation_steps

    def set_initial_training_values(args: Any, dataloader: Any) -> Plan:
        args.gradient_accumulation_steps = first  # a run that was broken off has left another
        return follower.plan(args, Plan(*plan(args, dataloader)))

    def init_training_state(
        max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, resume: str | None, trial: Any
    ) -> tuple[int, int]:
        position = begin(max_steps, num_update_steps_per_epoch, num_train_epochs, resume, trial)
        return follower.position(trainer.state, position, resume is not None)

    def finalize_training(trial: Any, num_train_samples: int, start_time: float) -> Any:
        # The Trainer takes the share of the updates in this call, and those of before may have been smaller.
        updates = max(trainer.state.global_step - trainer._initial_global_step, 1)
        return end(trial, follower.samples_of_call() * trainer.state.max_steps / updates, start_time)

    trainer.set_initial_training_values = set_initial_training_values
    trainer._init_training_state = init_training_state
    trainer._finalize_training = finalize_training


def has_length(trainer: Any) -> bool:
    """Whether the Trainer's training data has a length."""
    from transformers.trainer_utils import has_length as is_sized

    return is_sized(trainer.train_dataset)


def is_constant(scheduler: Any) -> bool:
    """Whether a `LambdaLR` is that of "constant"."""
    from transformers.optimization import _get_constant_lambda as constant

    return all(each is constant for each in scheduler.lr_lambdas)


def set_progress(trainer: Any, updates: int) -> None:
    """Set the length of the Trainer's progress bar, if it has one."""
    for callback in trainer.callback_handler.callbacks:
        bar = getattr(callback, "training_bar", None)
        if bar is not None:
            bar.total = updates
