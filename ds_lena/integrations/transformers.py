"""What is measured, in HF Trainer's logs, and so in all that `report_to` names.

from ds_lena.integrations.transformers import LenaCallback, NoiseScaleCallback
LenaCallback.add_to(trainer)  # of a LENA
NoiseScaleCallback.add_to(trainer)  # of any optimizer
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import DeepSpeedOptimizerWrapper
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from ..noise import watch
from ..optimizer import LENA, controller_of
from ..reporting import events, find_lena, find_watch, layer_events, noise_events, report_of
from ..watch_config import WatchConfig
from ..watching import Watch
from .deepspeed.ownership import engine_of


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
        add(events(report) | (layer_events(report) if self.layers else {}), logs, state)


class NoiseScaleCallback(TrainerCallback, ExportableState):
    """Watches the Trainer's optimizer, whatever it is, under DeepSpeed, in DDP and in one process.

    It adds the scalars of docs/noise_scale.md to every log of training. A run that is resumed goes on with the averages
    of its checkpoint. After `train()` has begun, `watch` is the
    `Watch`, and `ds_lena.report(trainer)` has its report.

    Args:
        layers: add `lena/layers/NAME/noise_scale` for every layer too.
        keys: those of `ds_lena.watch`. `micro_batch_size` is the Trainer's.
    """

    def __init__(self, layers: bool = False, **keys: Any) -> None:
        config = WatchConfig.from_keys(keys)
        self.layers, self._keys = layers, {key: getattr(config, key) for key in keys}
        self.watch: Watch | None = None
        self.remembered: dict[str, Any] | None = None

    @classmethod
    def add_to(cls, trainer: Trainer, layers: bool = False, **keys: Any) -> NoiseScaleCallback:
        """Put a new callback before all others of the Trainer, so that TensorBoard and others get what it adds."""
        callback = cls(layers, **keys)
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def state(self) -> dict[str, Any]:
        """What the Trainer saves in a checkpoint."""
        remembered = None if self.watch is None else self.watch.to_save()
        return {"args": {"layers": self.layers, **self._keys}, "attributes": {"remembered": remembered}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer on every rank, when all is made and nothing is trained."""
        if self.watch is not None:
            self.watch.close()
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        engine = engine_of(model) if isinstance(optimizer, DeepSpeedOptimizerWrapper) else None
        if engine is not None:
            self.watch = watch(engine, **self._keys)
        else:
            while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
                optimizer = optimizer.optimizer  # accelerate's is an Optimizer, too
            # A LENA has its own size, and a watch that is there has one or none.
            known = find_watch(optimizer)
            has_size = isinstance(optimizer, LENA) or (known is not None and not known.is_closed)
            size = {} if has_size else {"micro_batch_size": args.per_device_train_batch_size}
            self.watch = watch(model, optimizer, **size | self._keys)
        if state.global_step:
            self.watch.go_on_from(stored(state, self).get("remembered"))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Called by the Trainer on every rank. Only here do the numbers come from the device."""
        if self.watch is None or logs is None or "loss" not in logs:
            return
        report = self.watch.report()
        beside_lena = self.watch.watcher is None
        add(noise_events(report, beside_lena) | (layer_events(report) if self.layers else {}), logs, state)


def stored(state: Any, callback: ExportableState) -> dict[str, Any]:
    """The attributes of a callback in the checkpoint that the Trainer goes on from. None are there without one."""
    found = state.stateful_callbacks.get(type(callback).__name__)
    found = found[0] if isinstance(found, list) else found
    return found["attributes"] if found else {}


def add(measured: dict[str, float], logs: dict[str, Any], state: Any) -> None:
    """Add what was measured to the logs that the Trainer hands on (modified in place), and to those that it keeps."""
    logs |= measured
    if state.log_history:
        state.log_history[-1] |= measured  # the Trainer has made its copy already
