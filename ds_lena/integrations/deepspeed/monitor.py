"""What DeepSpeed's monitors get: `tensorboard`, `wandb`, `csv_monitor` and `comet` in the JSON."""

from __future__ import annotations

from typing import Any

from ...controller import Controller
from ...reporting import events, layer_events, report, report_of
from ._internals.engine import write_events


def write_model(engine: Any, controller: Controller) -> None:
    """Write gain, noise scale and warm-up of the model, after an update."""
    write_events(engine, lambda: events(report_of(controller.schedule)))


def write_layers(engine: Any) -> None:
    """Write gain, noise scale and warm-up of every layer to the engine's monitors, now. Every rank may call it.

    It does not write those of the model, which are written after every update.
    """
    write_events(engine, lambda: layer_events(report(engine)))
