"""The decision of a batch that grows: from a noise scale to the micro-batches of the next updates. Pure functions.

The noise scale estimates the critical batch (McCandlish et al. 2018, https://arxiv.org/abs/1812.06162). It grows while
a model trains, so a batch that follows it does the same work in fewer updates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from .errors import ConfigError
from .keys import is_count, is_number

BY = ("noise_scale", "noise_scale_low")
MOST_AT_ONCE = 2
"""How many times as large one decision can make a batch. An early noise scale can be too large by any factor."""


@dataclass(frozen=True)
class BatchGrowth:
    """A batch of `factor` x noise scale ** `power`. A batch is in micro-batches, over all ranks and accumulation.

    With a noise scale B, an update of n is worth 1 / (1 + B / n) of one without noise. So as much progress costs B + n
    micro-batches, and 1 + B / n updates. If an update costs as much as r micro-batches beside its own, as in time or in
    money, the whole is least at n = sqrt(r B): `power` 0.5 and `factor` sqrt(r).

    Args:
        factor: > 0. 1 costs few samples more than small batches; a larger one makes fewer updates and costs more.
        smallest: micro-batches of the first updates, >= 1. It is rounded up to a multiple of the data-parallel ranks.
        largest: >= smallest. It is rounded down to such a multiple.
        by: the number of the watch's report that is followed: "noise_scale", or "noise_scale_low", the lower end of its
            interval, which grows later.
        every: updates between two decisions, >= 1. On a GPU a decision waits for the device.
        shrink: let the batch become smaller, too.
        power: in (0, 1]. 1 follows the noise scale itself, 0.5 its square root.
        lr_power: in [0, 1]. The learning rate is multiplied by (batch / first batch) ** lr_power. 0 leaves it. LENA's
            gain does this for each layer, so LENA allows 0 only.

    Raises:
        ConfigError: a value is not allowed.
    """

    factor: float
    smallest: int
    largest: int
    by: str = "noise_scale"
    every: int = 10
    shrink: bool = False
    power: float = 1.0
    lr_power: float = 0.0

    def __post_init__(self) -> None:
        """Check the values."""
        _require(
            "BatchGrowth",
            [
                ("factor", self.factor, is_number(self.factor) and self.factor > 0, "a finite number > 0"),
                ("smallest", self.smallest, is_count(self.smallest), "a whole number of micro-batches >= 1"),
                ("largest", self.largest, is_count(self.largest), "a whole number of micro-batches >= 1"),
                ("by", self.by, self.by in BY, " or ".join(f'"{name}"' for name in BY)),
                ("every", self.every, is_count(self.every), "a whole number of updates >= 1"),
                ("shrink", self.shrink, isinstance(self.shrink, bool), "true or false"),
                ("power", self.power, is_number(self.power) and 0 < self.power <= 1, "a number in (0, 1]"),
                ("lr_power", self.lr_power, is_number(self.lr_power) and 0 <= self.lr_power <= 1, "a number in [0, 1]"),
            ],
        )
        if self.largest < self.smallest:
            raise ConfigError(
                f'BatchGrowth: "largest": {self.largest} is below "smallest": {self.smallest}. Equal ones keep the '
                "batch as it is."
            )

    @classmethod
    def from_keys(cls, keys: Any) -> BatchGrowth:
        """From an entry of a JSON."""
        return from_keys(cls, keys)

    def bounds(self, replicas: int) -> tuple[int, int]:
        """The smallest and largest accumulation on each of so many data-parallel ranks.

        Raises:
            ConfigError: no multiple of the ranks lies between `smallest` and `largest`.
        """
        lowest, highest = -(-self.smallest // replicas), self.largest // replicas
        if highest < lowest:
            raise ConfigError(
                f'BatchGrowth: "smallest": {self.smallest} and "largest": {self.largest} with {replicas} data-parallel '
                f"ranks: an update has a multiple of {replicas} micro-batches, and none lies between them. Set "
                f'"largest" to {lowest * replicas} or more, or use fewer ranks.'
            )
        return lowest, highest

    def within_bounds(self, accumulation: int, replicas: int, lowest: int) -> int:
        """The nearest accumulation that is allowed. `lowest`: see `next`. Raises as `bounds`."""
        least, most = self.bounds(replicas)
        return min(max(accumulation, least, lowest), most)

    def next(self, now: int, noise_scale: float, replicas: int, done: int = 0, lowest: int = 1) -> int:
        """The accumulation of the next updates, on each of `replicas` data-parallel ranks.

        It is the largest that is not above factor x noise scale ** power, within the bounds, and at most twice as large
        as now.
        A noise scale that is infinite, not positive or not a number says that there is no signal: nothing changes.

        Args:
            now: the accumulation at present.
            noise_scale: in micro-batches.
            done: micro-batches of a rank since the count that the trainer's windows start from. A window of `a` can
                begin where `done` is a multiple of `a`. 0 if any can begin.
            lowest: the trainer cannot do with less.
        """
        least, most = self.bounds(replicas)
        least = max(least, lowest)
        if not math.isfinite(noise_scale) or noise_scale <= 0:
            return now
        wanted = min(self.factor * noise_scale**self.power / replicas, most, MOST_AT_ONCE * now)
        target = max(math.floor(wanted), least)
        upwards: Iterable[int] = range(target, now, -1)
        downwards: Iterable[int] = range(target, now) if self.shrink else ()
        return next((a for a in (*upwards, *downwards) if done % a == 0), now)


def _require(what: str, values: Iterable[tuple[str, Any, bool, str]]) -> None:
    for name, value, is_allowed, allowed in values:
        if not is_allowed:
            raise ConfigError(f'{what}: "{name}": {value!r} is not allowed; allowed is {allowed}.')


def from_keys(cls: Any, keys: Any) -> Any:
    """A dataclass from a mapping of its fields, or from one that is made already.

    Raises:
        ConfigError: a key is missing or not known.
    """
    if isinstance(keys, cls):
        return keys
    known = [entry.name for entry in fields(cls)]
    if not isinstance(keys, Mapping) or set(keys) - set(known):
        raise ConfigError(f"{cls.__name__}: got {keys!r}; allowed is a {cls.__name__}, or its keys {', '.join(known)}.")
    missing = [entry.name for entry in fields(cls) if entry.default is MISSING and entry.name not in keys]
    if missing:
        raise ConfigError(
            f"{cls.__name__}: got {dict(keys)!r}; {', '.join(missing)} must be given, too. Its keys are "
            f"{', '.join(known)}."
        )
    return cls(**keys)
