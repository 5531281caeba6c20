"""The history of a run: one JSON line per logged update, with the report of LENA."""

import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import OptimizerNames

import ds_lena

from .errors import InputError

_LOGGED = ("eval_loss", "loss", "grad_norm", "learning_rate")


class History(TrainerCallback):
    """Write ``history.jsonl`` and print a line per log, on the first rank.

    A record is ``{"update": int, "loss" or "eval_loss": nats per token, ..., "lena": report}``.
    ``lena`` is the dict of ``ds_lena.report`` with null for what is not finite; it is missing from
    evaluations and where another optimizer trains. A resumed run drops the records that are younger
    than its checkpoint.

    Args:
        trainer: the Trainer that this callback is added to.
        path: the file to write; its folder exists when training begins.
    """

    def __init__(self, trainer: Trainer, path: Path) -> None:
        self._trainer = trainer
        self._path = path
        self._start = (0.0, 0)  # (seconds, update) when this run began or resumed
        self._update_began = 0.0
        self.seconds: list[float] = []  # of every update of this run
        self.records: list[dict[str, Any]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start = (time.monotonic(), state.global_step)
        if not state.is_world_process_zero:
            return
        if state.global_step:
            self.records = [r for r in read(self._path) if r["update"] <= state.global_step]
        write(self._path, self.records)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._update_began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.monotonic() - self._update_began)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or not logs.keys() & {"loss", "eval_loss"}:
            return
        record: dict[str, Any] = {"update": state.global_step}
        record |= {key: logs[key] for key in _LOGGED if key in logs}
        if optimizer_name(args) == "LENA" and "loss" in logs:
            record["lena"] = ds_lena.report(self._trainer)
        record = finite(record)
        self.records.append(record)
        with self._path.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
        print(self._line(record, state), flush=True)

    def _line(self, record: dict[str, Any], state: TrainerState) -> str:
        update = f"update {record['update']:>{len(str(state.max_steps))}}/{state.max_steps}"
        if "eval_loss" in record:
            return f"{update}  held-out loss {record['eval_loss']:.3f}"
        line = f"{update}  loss {record['loss']:.3f}  lr {record['learning_rate']:.1e}"
        if lena := record.get("lena"):
            line += f"  gain {lena['gain']:.1f} of {lena['n']}"
        began, first = self._start
        left = (time.monotonic() - began) * (state.max_steps - state.global_step) / (state.global_step - first)
        return f"{line}  {left // 60:.0f} min {left % 60:02.0f} s left"


def optimizer_name(args: TrainingArguments) -> str:
    """The optimizer that the DeepSpeed config asks for, the Trainer's where it asks for none."""
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    asked = deepspeed.get_value("optimizer.type") if deepspeed else None
    return asked or OptimizerNames(args.optim).value


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a history file, if it exists, without the torn last line of a killed run.

    Raises:
        InputError: another line is no record.
    """
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
