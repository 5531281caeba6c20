"""When a run is over: at its last update, or with `--target-loss` when the model is good enough."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Finished(Exception):
    """The checkpoint that a run went on from is that of its end: all is loaded, and nothing is left to train."""


class Stopping(TrainerCallback):
    """Ends training after the first evaluation whose held-out loss is not above ``target``, if there is one.

    A run that goes on from its end raises ``Finished`` instead of training; HF would make one more update.
    """

    def __init__(self, target: float | None) -> None:
        self._target = target

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        reached = self._target is not None and reached_at(state.log_history, self._target) is not None
        if state.global_step >= state.max_steps or (state.global_step and reached):
            raise Finished

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        if self._target is not None and metrics["eval_loss"] <= self._target:
            control.should_training_stop = True


def reached_at(logs: list[dict[str, Any]], target: float) -> int | None:
    """The update of the first evaluation in ``logs``, the Trainer's history, that reached ``target``."""
    return next((log["step"] for log in logs if "eval_loss" in log and log["eval_loss"] <= target), None)
