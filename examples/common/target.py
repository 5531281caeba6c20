"""`--target-loss`: stop when a model is good enough."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StopAtTarget(TrainerCallback):
    """Ends training after the first evaluation whose held-out loss is not above ``target``."""

    def __init__(self, target: float) -> None:
        self._target = target

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        if metrics["eval_loss"] <= self._target:
            control.should_training_stop = True


def reached_at(logs: list[dict[str, Any]], target: float) -> int | None:
    """The update of the first evaluation in ``logs``, the Trainer's history, that reached ``target``."""
    return next((log["step"] for log in logs if "eval_loss" in log and log["eval_loss"] <= target), None)
