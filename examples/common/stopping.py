"""When a run is over: at its last update, or with `--target-loss` when the model is good enough."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState


class Finished(Exception):
    """The checkpoint that a run went on from is that of its end: all is loaded, and nothing is left to train."""


class Stopping(TrainerCallback):
    """Ends training after the first evaluation whose held-out loss is not above ``target``, if there is one.

    A run that goes on from its end raises ``Finished`` instead of training; HF would make one more update.
    """

    def __init__(self, target: float | None) -> None:
        self._target = target

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step and (state.global_step >= state.max_steps or self._is_reached(state)):
            raise Finished

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop |= self._is_reached(state)

    def _is_reached(self, state: TrainerState) -> bool:
        return self._target is not None and reached_at(state.log_history, self._target) is not None


def reached_at(logs: list[dict[str, Any]], target: float) -> int | None:
    """The update of the first evaluation in ``logs``, the Trainer's history, that reached ``target``."""
    return next((log["step"] for log in logs if "eval_loss" in log and log["eval_loss"] <= target), None)
