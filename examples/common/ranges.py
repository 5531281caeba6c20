"""Numbers of the command line that nothing could be made of, said before anything is."""

import math
from argparse import Namespace
from collections.abc import Callable
from typing import NamedTuple

from .errors import InputError


class Range(NamedTuple):
    allowed: str
    holds: Callable[[float], bool]


_WHOLE = Range("at least 1", lambda value: value >= 1)
_POSITIVE = Range("a finite number above 0", lambda value: 0 < value < math.inf)
_NOT_NEGATIVE = Range("a finite number, at least 0", lambda value: 0 <= value < math.inf)
_SHARE = Range("at least 0 and below 1", lambda value: 0 <= value < 1)

RANGES = {
    "dropout": _SHARE,
    "held_out_fraction": Range("between 0 and 1", lambda value: 0 < value < 1),
    "max_held_out_blocks": _WHOLE,
    "sequence_length": Range("at least 2 tokens", lambda value: value >= 2),
    "held_out_texts": _WHOLE,
    "sample_texts": _WHOLE,
    "shuffle_texts": _WHOLE,
    "target_loss": Range("a finite number", math.isfinite),
    "per_device_train_batch_size": _WHOLE,
    "per_device_eval_batch_size": _WHOLE,
    "gradient_accumulation_steps": _WHOLE,
    "learning_rate": _POSITIVE,
    "weight_decay": _NOT_NEGATIVE,
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": _NOT_NEGATIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "num_train_epochs": _POSITIVE,
    "max_steps": Range("at least 1, or -1 to count by --num_train_epochs", lambda value: value == -1 or value >= 1),
}
"""Option -> what it may be, if it is given."""


def refuse_out_of_range(options: Namespace) -> None:
    for name, (allowed, holds) in RANGES.items():
        value = getattr(options, name)
        if value is not None and not holds(value):
            raise InputError(f"--{name} is {value}; it must be {allowed}")
