"""A batch that grows, from update to update: the clock in samples, the decisions, the learning rate, the checkpoint."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .errors import ConfigError, StateError, require_entries
from .growth import BatchGrowth
from .sample_schedules import SampleSchedule
from .watching import Watch

logger = logging.getLogger("ds_lena")

Groups = Sequence[dict[str, Any]]


def require_growth(growth: Any, schedule: Any) -> None:
    """Raise `ConfigError` if these are no growth and no schedule."""
    if not isinstance(growth, BatchGrowth) or not (schedule is None or isinstance(schedule, SampleSchedule)):
        raise ConfigError(
            f"ds_lena.grow: got {growth!r} and schedule={schedule!r}; allowed is a BatchGrowth, and a SampleSchedule "
            "as ds_lena.cosine(total=…), or None."
        )


class Growing:
    """A batch that grows, as `ds_lena.grow` returns it. It is the same on every rank.

    `accumulation`: micro-batches on each rank in the next update. `samples`: seen by the backward passes of all updates
    over all ranks, those of skipped updates too; None if nobody says how many a micro-batch has. `micro_batches`: the
    same. `replicas`: data-parallel ranks. `watch`: what measures. `first`: the accumulation that the run began with.
    `after_load()`: called when a state was loaded.
    """

    def __init__(
        self,
        growth: BatchGrowth,
        schedule: SampleSchedule | None,
        watch: Watch,
        replicas: int,
        micro_batch_size: int | None,
        lowest: int = 1,
    ) -> None:
        self.growth, self.schedule, self.watch = growth, schedule, watch
        self.replicas, self.micro_batch_size, self._lowest = replicas, micro_batch_size, lowest
        least, most = growth.bounds(replicas)
        if lowest > most:
            raise ConfigError(
                f'BatchGrowth: "largest": {growth.largest} is below the {lowest} x {replicas} micro-batches that the '
                "trainer was given to start with. Raise it, or lower gradient_accumulation_steps."
            )
        if growth.lr_power and watch.watcher is None:
            raise ConfigError(
                f'BatchGrowth: "lr_power": {growth.lr_power} with LENA, whose gain raises the learning rate of each '
                "layer already. Leave lr_power out."
            )
        self.first = self.accumulation = max(least, lowest)
        self.micro_batches = self._samples = self._updates = 0
        self._noise_scale = math.inf
        self._lr_at_start: list[float] | None = None
        self.after_load: Callable[[], None] = lambda: None
        others = "" if watch.watcher is None else ', or give the watch "differences": true'
        if self.n == 1 and not watch.config.differences and growth.largest > 1:
            raise ConfigError(
                "ds_lena.grow: one micro-batch in an update tells no noise scale, so it would never grow. Use "
                f'"smallest": 2{others}.'
            )
        if schedule is not None and micro_batch_size is None:
            raise ConfigError(
                "ds_lena.grow: a schedule in samples, and nobody says how many samples a micro-batch has. Give "
                "micro_batch_size=…"
            )

    @property
    def n(self) -> int:
        """Micro-batches of the next update over all ranks."""
        return self.accumulation * self.replicas

    @property
    def first_n(self) -> int:
        """Micro-batches of the first update over all ranks."""
        return self.first * self.replicas

    @property
    def samples(self) -> int | None:
        """See the class."""
        return None if self.micro_batch_size is None else self._samples

    # -- one update ---------------------------------------------------------------------------------------------------

    def require_open(self) -> None:
        """Raise `StateError` if the watch was closed: then nobody counts the samples."""
        if self.watch.is_closed and self.watch.watcher is not None:
            raise StateError(
                "ds_lena.grow: the watch of this growing batch was closed, so its samples are counted no more. Leave "
                "it open as long as the batch grows."
            )

    def saw(self, passes: int) -> None:
        """Count the backward passes of one rank in an update that ends."""
        self.micro_batches += passes * self.replicas
        self._samples += passes * self.replicas * (self.micro_batch_size or 0)

    def decide(self, done: int = 0) -> bool:
        """Decide the next accumulation, after an applied update. Return whether it has changed.

        A decision that is due waits until the noise scale can be followed. `done`: see `BatchGrowth.next`.
        """
        self._updates += 1
        if self._updates < self.growth.every or self.watch.is_closed:
            return False
        self._noise_scale = self.watch.report()[self.growth.by]
        after = self.growth.next(self.accumulation, self._noise_scale, self.replicas, done, self._lowest)
        changed = after != self.accumulation
        could = self.growth.next(self.accumulation, self._noise_scale, self.replicas, 0, self._lowest)
        if changed or could == self.accumulation:
            self._updates = 0
        self.accumulation = after
        return changed

    @property
    def sets_lr(self) -> bool:
        """Whether it sets the learning rate: by a schedule, or by the batch."""
        return self.schedule is not None or self.growth.lr_power > 0

    def lr_factor(self, samples: float) -> float:
        """What the next update multiplies the first learning rate by, after so many samples."""
        by_batch = (self.accumulation / self.first) ** self.growth.lr_power
        return by_batch if self.schedule is None else by_batch * self.schedule(samples)

    def set_lr(self, groups: Groups) -> None:
        """Give groups the learning rate of the next update (modified in place), if it sets that."""
        if not self.sets_lr:
            return
        if self._lr_at_start is None:
            self._lr_at_start = [float(group["lr"]) for group in groups]
        for group, start in zip(groups, self._lr_at_start, strict=True):
            value = start * self.lr_factor(self._samples)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value

    # -- what it says -------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """What was decided, as a plain dictionary. Without communication, and without waiting for the device.

        `n`, `accumulation`, `replicas`, `samples`, `micro_batches`: see the class. `noise_scale`: of the last decision.
        `most_replicas`: data-parallel ranks that could share the update, with one micro-batch each. `advice`: a
        sentence.
        """
        samples = "" if self.micro_batch_size is None else f" ({self.n * self.micro_batch_size:,} samples)"
        advice = (
            f"an update of {self.n} micro-batches{samples}: {self.accumulation} on each of {self.replicas} "
            f"data-parallel ranks; up to {self.n} ranks could share it"
        )
        return {
            "n": self.n,
            "accumulation": self.accumulation,
            "replicas": self.replicas,
            "samples": self.samples,
            "micro_batches": self.micro_batches,
            "noise_scale": self._noise_scale,
            "most_replicas": self.n,
            "advice": advice,
        }

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that it remembers, as plain numbers, with that of the watch. A LENA keeps its own."""
        return {
            "version": 1,
            "n": self.n,
            "first": self.first_n,
            "micro_batch_size": self.micro_batch_size,
            "micro_batches": self.micro_batches,
            "samples": self._samples,
            "updates": self._updates,
            "noise_scale": self._noise_scale if math.isfinite(self._noise_scale) else None,
            "lr_at_start": self._lr_at_start,
            "watch": self.watch.to_save(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict()`. With other ranks, or another micro-batch, a batch keeps its samples.

        Raises:
            StateError: it is no such state.
        """
        require_entries(state_dict, self.state_dict(), "ds_lena.grow", "a growing batch")
        self.watch.go_on_from(state_dict["watch"])
        size, before = self.micro_batch_size or 1, state_dict["micro_batch_size"] or 1
        self.accumulation = self._in_accumulation(state_dict["n"] * before, size)
        self.first = self._in_accumulation(state_dict["first"] * before, size)
        self._samples = state_dict["samples"]
        self.micro_batches = state_dict["micro_batches"] * before // size
        self._updates = state_dict["updates"]
        self._noise_scale = math.inf if state_dict["noise_scale"] is None else state_dict["noise_scale"]
        if state_dict["lr_at_start"] is not None:
            self._lr_at_start = state_dict["lr_at_start"]
        bound = self.growth.within_bounds(self.accumulation, self.replicas, self._lowest)
        if bound != self.accumulation:
            logger.warning(
                "ds_lena.grow: the checkpoint's batch of %d micro-batches is outside of BatchGrowth's bounds; it goes "
                "on with %d.",
                self.n,
                bound * self.replicas,
            )
            self.accumulation = bound
        self.after_load()

    def _in_accumulation(self, samples: int, size: int) -> int:
        found = max(samples // (size * self.replicas), self._lowest)
        if found * size * self.replicas != samples:
            logger.warning(
                "ds_lena.grow: the checkpoint's batch of %d samples is no multiple of %d ranks x %d samples; it goes "
                "on with %d samples.",
                samples,
                self.replicas,
                size,
                found * size * self.replicas,
            )
        return found
