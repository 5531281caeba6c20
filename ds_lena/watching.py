"""Measures the updates that another optimizer makes: what `ds_lena.watch` runs, and what it returns."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from . import advice
from .binding import Binding
from .errors import ConfigError, StateError
from .grad_stats.hooks import Parts
from .grad_stats.reduce import Group, is_first_rank, world_size
from .layers import warn_of_patterns
from .meter import Meter, weakly
from .recorded import Number, Recorded
from .schedule.noise import NoiseMemory, NoiseState, Remembered
from .watch_config import WatchConfig

logger = logging.getLogger("ds_lena")

_UPDATES_TO_SILENCE = 3


class Window(Protocol):
    """The micro-batches of an update, in an engine."""

    def begin(self) -> None:
        """The update's step begins."""

    def end(self) -> None:
        """It has ended."""


class Watch:
    """Noise, signal and noise scale of a training, as `ds_lena.watch` returns it.

    `after_update`: what is called after each applied update, on every rank. `meter`: what measures. `watcher`: whose
    that is. None where it is a LENA's, which measures for itself. `when_closed()`: called by `close()`. `is_closed`:
    whether that was called.
    """

    def __init__(
        self, config: WatchConfig, meter: Meter, memory: Callable[[], Remembered], watcher: Watcher | None = None
    ) -> None:
        self.config, self.meter, self.watcher, self._memory = config, meter, watcher, memory
        self.after_update: list[Callable[[], None]] = []
        self.when_closed: Callable[[], None] = lambda: None
        self.optimizers: tuple[Any, ...] = ()
        self.is_closed = self._has_written = self._has_warned = False

    def stays_with(self, optimizers: Sequence[Any]) -> Watch:
        """Be found again, by `ds_lena.report` and by who watches these optimizers a second time."""
        self.optimizers = tuple(optimizers)
        for one in optimizers:
            one.ds_lena_watch = self
        return self

    def report(self) -> dict[str, Any]:
        """What was measured by the last applied update. The same on every rank, and no rank waits for another.

        Returns:
            A plain dictionary; docs/noise_scale.md has its keys.
        """
        differences = 0.0
        if self.watcher is not None:
            self.watcher.warn_of_silence()
            differences = float(self.watcher.memory.state.differences)
        return advice.report_of(self._memory(), self.config.tokens_per_sample, differences)

    def around_step(self, window: Window) -> tuple[Callable[[], None], Callable[[bool], None]]:
        """What an engine calls around the step of each update. `window`: what it does with the gradients."""
        watcher = self._own()

        def before() -> None:
            if not self.is_closed:
                window.begin()
                watcher.begin_update()

        def after(applied: bool) -> None:
            if not self.is_closed:
                watcher.end_update(applied)
                window.end()
                if applied:
                    self.updated()

        return before, after

    def updated(self) -> None:
        """Called after each applied update, on every rank."""
        if self.is_closed:
            return
        for action in self.after_update:
            action()
        config, updates = self.config, self._memory().updates
        if config.log is not None and updates % config.log_every == 0 and is_first_rank():
            self._write(Path(config.log))

    def _write(self, path: Path) -> None:
        report = self.report()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+b") as stream:
                if not self._has_written and stream.tell():
                    stream.seek(-1, os.SEEK_END)
                    stream.write(b"" if stream.read() == b"\n" else b"\n")  # a run was killed while it wrote
                stream.write(json.dumps(_finite(report)).encode() + b"\n")
            self._has_written = True
        except OSError as error:  # training is worth more than its log
            if not self._has_warned:
                logger.warning('ds_lena.watch: cannot write to "log": %s: %s. Training goes on.', path, error)
            self._has_warned = True
        logger.info("ds_lena.watch: update %d: %s.", report["update"], report["advice"])

    def state_dict(self) -> dict[str, Any]:
        """All that a watch remembers, as plain numbers by layer name. A LENA has it in its own checkpoint.

        Raises:
            StateError: it is a LENA that measures.
        """
        return self._own().memory.to_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._own().memory.load(state_dict)

    def to_save(self) -> dict[str, Any] | None:
        """`state_dict()`, for a checkpoint of something else. None where a LENA measures."""
        return None if self.watcher is None else self.state_dict()

    def go_on_from(self, saved: dict[str, Any] | None) -> None:
        """Go on from `to_save()`. None changes nothing, nor does anything where a LENA measures."""
        if saved is not None and self.watcher is not None:
            self.load_state_dict(saved)

    def _own(self) -> Watcher:
        if self.watcher is None:
            raise StateError("ds_lena.watch: LENA measures here, and its own state_dict() holds what it remembers.")
        return self.watcher

    def close(self) -> None:
        """Stop measuring, and writing. The report stays what it is, but a LENA goes on, and so does its report."""
        if self.is_closed:
            return
        self.is_closed = True
        self.when_closed()
        if self.watcher is not None:
            self.watcher.close()


def _finite(value: Any) -> Any:
    """With null for what is not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Watcher:
    """Measures the updates of `parameters`, and moves nothing: `begin_update`, then `end_update`.

    `memory`: what is remembered. `micro_batch_size()`: samples in a micro-batch, None if nobody says.
    """

    def __init__(
        self, config: WatchConfig, parameters: Sequence[Tensor], names: Sequence[str], group: Group | None = None
    ) -> None:
        self.config = config
        self.micro_batch_size: Callable[[], int | None] = lambda: config.micro_batch_size
        self.memory: NoiseMemory
        self._proposal: tuple[NoiseState, Tensor, int | None] | None = None
        self._told: set[str] = set()
        self._told_patterns: set[tuple[str, str]] = set()
        self._latest: dict[int, Tensor] | None = None
        self._before: tuple[dict[int, Tensor], Tensor] | None = None
        left_out = [False] * len(parameters)
        self.meter = Meter(parameters, names, left_out, config.layer, config.exclude, group, self.compared())
        self.meter.after_bind = weakly(self._after_bind)
        if config.differences:
            logger.info("ds_lena.watch: differences: true keeps a copy of the gradient.")
            self.meter.after_mean = weakly(self._keep_gradient)

    def _after_bind(self, keeps: bool) -> None:
        meter = self.meter
        before = self.memory if keeps else None
        self.memory = NoiseMemory(meter.table, meter.device)
        if before is not None:
            self.memory.load(before.to_dict())
        self._recorded, self._loss_scale = Recorded(keeps=2), Number(meter.device)
        self._half_norms = meter.hooks.new_norms()
        warn_of_patterns(meter.all_names, "exclude", self.config.exclude, self._told_patterns)

    def shown(self) -> Watch:
        """A watch that shows what this measures."""
        return Watch(self.config, self.meter, lambda: self.memory, self)

    def compared(self) -> dict[str, Any]:
        """The keys that have to be the same on all ranks."""
        return {name: value for name, value in self.config.keys().items() if name != "log"}

    def manage(self, binding: Binding, parts: Callable[[], Parts | None]) -> None:
        """Let an engine run the updates. `parts()` may make a group of ranks, which none of them may miss."""
        self.meter.manage(replace(binding, parts=parts()))

    def close(self) -> None:
        """Remove the hooks from the parameters."""
        self.meter.hooks.close()
        self._latest = self._before = None

    @torch.no_grad()
    def begin_update(self) -> None:
        """Measure, by one all-reduce. The optimizer's step comes after it."""
        meter, size = self.meter, self.micro_batch_size()
        meter.begin_update()
        scale = meter.binding.layout.loss_scale()
        pair = self._pair(scale)
        key = size, self.memory.micro_batch_size, pair is not None
        if pair is None:
            reduced = meter.reduced(meter.squares_of_mean)
        else:
            reduced, scale = pair, 1.0
        state, n = self._recorded(self._proposed, key, reduced, self._loss_scale.set(scale), self.memory.state)
        if meter.updates == 0 and pair is None:
            meter.require_average(meter.of(reduced, scale)[0])
        self._proposal = state, n, size

    def _proposed(self, key: Any, reduced: Tensor, loss_scale: Tensor, state: NoiseState) -> tuple[NoiseState, Tensor]:
        size, size_before, of_differences = key
        measured, _ = self.meter.of(reduced, loss_scale)
        n = measured.n / 2 if of_differences else measured.n  # one of the two gradients has been counted before
        return state.after(measured, n, self.config.smoothing, (size, size_before), of_differences), n

    def end_update(self, applied: bool) -> None:
        """End the update. If it was not applied, nothing of it stays but the count of skipped updates."""
        proposal, self._proposal = self._proposal, None
        self._before = None
        if applied and self._latest is not None and self.meter.hooks.passes == 1:
            self._before = self._latest, self._squares_of_latest
        self._latest = None
        self.meter.end_update(applied)
        if proposal is None:
            return
        if not applied:
            self.memory.skip()
            return
        self.memory.commit(*proposal)
        if self.memory.updates == _UPDATES_TO_SILENCE:
            self.warn_of_silence()  # this waits for the device, once in a run

    def warn_of_silence(self) -> None:
        """Warn once of each layer to which no gradient arrives."""
        silent = advice.silent_layers(self.memory.state.silent, self.memory.table.names)
        new = [name for name in silent if name not in self._told]
        if new:
            self._told.update(new)
            logger.warning(
                "ds_lena.watch: no gradient arrives at %s: the averaged gradient is exactly 0, and those of the "
                "micro-batches are not. So these weights are trained by nothing but weight decay.",
                ", ".join(f'"{name}"' for name in new[:8]) + (f" and {len(new) - 8} more" if len(new) > 8 else ""),
            )

    # -- one micro-batch in an update ---------------------------------------------------------------------------------

    def _keep_gradient(self) -> None:
        """Copy the averaged gradient, as it is before anyone clips it."""
        meter = self.meter
        self._latest = None
        if world_size(meter.binding.group) == 1 and meter.hooks.passes == 1:
            scale = meter.binding.layout.loss_scale()
            pieces = meter.binding.layout.gradients()
            self._latest = {i: piece.detach() / scale for i, piece in pieces if piece is not None}
            self._squares_of_latest = meter.squares_of_mean / scale**2

    def _pair(self, scale: float) -> Tensor | None:
        """The gradients of two updates as two micro-batches of one: what `Meter.of` reads. None if it is not so."""
        meter = self.meter
        if self._latest is None or self._before is None or meter.hooks.passes != 1:
            return None
        before, squares_before = self._before
        for i in self._latest.keys() | before.keys():
            parts = [gradients[i] for gradients in (self._latest, before) if i in gradients]
            self._half_norms.write(i, sum(parts) / 2)  # type: ignore[arg-type]
        halves = self._half_norms.read()
        return meter.reduced(halves, (squares_before + self._squares_of_latest) / 4, passes=2)


def open_watch(optimizers: Sequence[Any], config: WatchConfig) -> Watch | None:
    """The watch that these optimizers have already. None if they have none, or a closed one.

    Raises:
        ConfigError: it has other keys, or is not of just these.
    """
    known = [getattr(one, "ds_lena_watch", None) for one in optimizers]
    alive = [watch for watch in known if watch is not None and not watch.is_closed]
    if not alive:
        return None
    is_same = len(alive) == len(known) and alive[0].optimizers == tuple(optimizers)
    if not is_same or config.contradicted_by(alive[0].config.keys()):
        raise ConfigError(
            "ds_lena.watch: this optimizer is watched already, with other keys or beside other optimizers. Call "
            "optimizer.ds_lena_watch.close() first, or leave the keys out."
        )
    return alive[0]
