"""Learning-rate schedules as functions of samples seen. A batch that grows makes updates a bad clock."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import ConfigError
from .keys import is_number

SHAPES = ("constant", "cosine", "linear", "warmup-stable-decay")


@dataclass(frozen=True)
class SampleSchedule:
    """What multiplies the learning rate, as a function of the samples seen before an update.

    It rises in a line from 0 to 1 over `warmup` samples, then falls to `floor` at `total`: as a half cosine, in a line,
    or, after it has stayed at 1, in a line over the last `decay` samples. Afterwards it stays at `floor`.

    Args:
        shape: "constant", "cosine", "linear" or "warmup-stable-decay".
        total: samples of the run, > 0.
        warmup, decay: samples, >= 0, together at most `total`. `decay` is for "warmup-stable-decay" alone.
        floor: in [0, 1].

    Raises:
        ConfigError: a value is not allowed.
    """

    shape: str
    total: float
    warmup: float = 0
    decay: float = 0
    floor: float = 0.0

    def __post_init__(self) -> None:
        """Check the values."""
        if self.shape not in SHAPES:
            raise ConfigError(
                f'SampleSchedule: "shape": {self.shape!r} is not allowed; allowed is one of {", ".join(SHAPES)}.'
            )
        numbers = (self.total, self.warmup, self.decay, self.floor)
        if not all(map(is_number, numbers)) or not (
            self.total > 0
            and min(self.warmup, self.decay) >= 0
            and self.warmup + self.decay <= self.total
            and 0 <= self.floor <= 1
        ):
            raise ConfigError(
                f'SampleSchedule: "total": {self.total!r}, "warmup": {self.warmup!r}, "decay": {self.decay!r}, '
                f'"floor": {self.floor!r} are not allowed. All but the floor are in samples: total > 0, warmup and '
                "decay >= 0 and together at most total. The floor is a share of the learning rate, from 0 to 1."
            )
        if (self.decay > 0) != (self.shape == "warmup-stable-decay"):
            raise ConfigError(
                f'SampleSchedule: "decay": {self.decay!r} with "shape": "{self.shape}". It is the length of the last '
                'part of "warmup-stable-decay", which needs it, and no other shape has one.'
            )

    def __call__(self, samples: float) -> float:
        """The multiplier, in [0, 1], of an update that begins after so many samples."""
        if samples < self.warmup:
            return samples / self.warmup
        if self.shape == "constant":
            return 1.0
        length = self.decay if self.shape == "warmup-stable-decay" else self.total - self.warmup
        done = 1.0 - (self.total - samples) / length if length else 1.0
        done = min(max(done, 0.0), 1.0)
        left = (1 + math.cos(math.pi * done)) / 2 if self.shape == "cosine" else 1 - done
        return self.floor + (1 - self.floor) * left


def cosine(total: float, warmup: float = 0, floor: float = 0.0) -> SampleSchedule:
    """A warm-up, then a half cosine from 1 to `floor` at `total` samples. See `SampleSchedule`."""
    return SampleSchedule("cosine", total, warmup, floor=floor)


def linear(total: float, warmup: float = 0, floor: float = 0.0) -> SampleSchedule:
    """A warm-up, then a line from 1 to `floor` at `total` samples. See `SampleSchedule`."""
    return SampleSchedule("linear", total, warmup, floor=floor)


def warmup_stable_decay(total: float, warmup: float, decay: float, floor: float = 0.0) -> SampleSchedule:
    """A warm-up, then 1, and a line from 1 to `floor` over the last `decay` of `total` samples."""
    return SampleSchedule("warmup-stable-decay", total, warmup, decay, floor)
