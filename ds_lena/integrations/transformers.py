"""LENA's gain, noise scale and warm-up in HF Trainer's logs, and so in all that `report_to` names.

from ds_lena.integrations.transformers import LenaCallback
LenaCallback.add_to(trainer)
"""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback

from ..optimizer import controller_of
from ..reporting import events, find_lena, layer_events, report_of


class LenaCallback(TrainerCallback):
    """Adds `lena/gain`, `lena/noise_scale` and `lena/warmup` to every log of training. Adds nothing without a LENA.

    Args:
        layers: add `lena/layers/NAME/…` for every layer too.
    """

    def __init__(self, layers: bool = False) -> None:
        self.layers = layers

    @classmethod
    def add_to(cls, trainer: Trainer, layers: bool = False) -> LenaCallback:
        """Put a new callback before all others of the Trainer, so that TensorBoard and others get what it adds."""
        callback = cls(layers)
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Called by the Trainer on every rank. Only here do the numbers come from the device."""
        lena = find_lena(kwargs.get("optimizer"))
        if lena is None or logs is None or "loss" not in logs:
            return
        report = report_of(controller_of(lena).schedule)
        measured = events(report) | (layer_events(report) if self.layers else {})
        logs |= measured
        if state.log_history:
            state.log_history[-1] |= measured  # the Trainer has made its copy already
