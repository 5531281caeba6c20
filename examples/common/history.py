"""What watches a run: its history, one JSON line per logged update with the report of LENA; and when it is over."""

import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

import ds_lena

from .errors import InputError

_LOGGED = ("eval_loss", "loss", "grad_norm", "learning_rate")


class History(TrainerCallback):
    """Write ``history.jsonl``, on the first rank: losses of the Trainer's logs, and all layers of LENA.

    A record is ``{"update": int, "loss" or "eval_loss": nats per token, …, "lena": report}``. ``lena`` is the dict of
    ``ds_lena.report`` with null for what is not finite; evaluations and runs of other optimizers have none. A resumed
    run drops the records that are younger than its checkpoint.
    """

    def __init__(self, trainer: Trainer, path: Path, lena: bool) -> None:
        self._trainer, self._path, self._lena = trainer, path, lena
        self.seconds: list[float] = []  # of every update of this run
        self.records: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            begun = read(self._path) if state.global_step else []
            self.records = [record for record in begun if record["update"] <= state.global_step]
            write(self._path, self.records)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._update_began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.monotonic() - self._update_began)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs.keys() & {"loss", "eval_loss"}:
            return
        record: dict[str, Any] = {"update": state.global_step} | {key: logs[key] for key in _LOGGED if key in logs}
        if self._lena and "loss" in logs:
            record["lena"] = ds_lena.report(self._trainer)
        self.records.append(finite(record))
        with self._path.open("a") as stream:
            stream.write(json.dumps(self.records[-1]) + "\n")


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


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a history file, if it exists, but for a killed run's torn last line. InputError: no records."""
    lines = path.read_text().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif number < len(lines):
            raise InputError(f"{path}: line {number} is no record: {line[:40]!r}; mend it, or delete the line")
    return records


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """The records as a file that ``read`` reads, whole or not at all."""
    write_whole(path, "".join(json.dumps(record) + "\n" for record in records))


def finite(value: Any) -> Any:
    """``value`` with None for every number that is not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_whole(path: Path, text: str) -> None:
    """Write a file that other readers see whole or not at all."""
    draft = path.with_name(path.name + ".draft")
    draft.write_text(text)
    draft.replace(path)
