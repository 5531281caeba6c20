"""The table of keys of `"optimizer": {"type": "LENA", "params": {…}}`: defaults, what is allowed, what each means.

docs/keys.md is made from it, and the arguments of `LENA` are tested against it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor

SCALINGS = ("gain", "linear", "sqrt", "none")
WARMUPS = ("layer", "fixed", "none")
LAYERS = ("tensor", "module", "block", "model")
VARIANTS = ("default", "authors-code")
NONFINITE = ("skip", "warn")


@dataclass(frozen=True)
class Base:
    """The keys of one base rule, and its defaults of two keys.

    `group_keys`: keys that a parameter group may set for itself. `other_keys`: keys that it may not set.

    The theory of the gain assumes steps that are proportional to the gradient. There the default gain power is 1. Adam
    divides by the gradient's size, which takes back a part of the gain; docs/comparison.md has the evidence.
    """

    group_keys: tuple[str, ...]
    other_keys: tuple[str, ...] = ()
    weight_decay: float = 0.0
    gain_power: float = 1.0

    @property
    def keys(self) -> tuple[str, ...]:
        return self.group_keys + self.other_keys


_TRUST = ("trust_coefficient", "trust_clip")
BASES = {
    "adamw": Base(("betas", "eps"), weight_decay=0.01, gain_power=0.85),
    "sgd": Base(("momentum", "nesterov")),
    "lars": Base(("momentum",), _TRUST),
    "lamb": Base(("betas", "eps"), _TRUST, weight_decay=0.01, gain_power=0.85),
}
"""The base rules. `update/rules/NAME.py` has what each does."""


@dataclass(frozen=True)
class Key:
    """One key of the optimizer entry.

    `allowed`: what `accepts` tests, in words. `meaning`: one cell of docs/keys.md, in Markdown.
    For a key of some base rules only, `None` means "not given".
    """

    default: Any
    allowed: str
    accepts: Callable[[Any], bool]
    meaning: str


def is_number(value: Any) -> bool:
    """Whether it is a number that a float can be, and is finite. Python's integers go further."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_count(value: Any) -> bool:
    """Whether it is a whole number >= 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _number(value: Any) -> bool:
    is_real = isinstance(value, Real) and not isinstance(value, bool)
    return is_real and bool(abs(value) <= sys.float_info.max)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def number_in(value: Any) -> Any:
    """What a tensor of one element holds, as torch's optimizers take it for a learning rate; else the value itself."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def not_negative(value: Any) -> bool:
    return _number(value) and value >= 0


def _whole_positive(value: Any) -> bool:
    return _positive(value) and value == int(value)


def _null_or(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or test(value)


def _one_of(choices: Collection[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in choices


def _patterns(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) and item for item in value)


def _betas(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(_number(b) and 0 <= b < 1 for b in value)


def _clip_range(value: Any) -> bool:
    pair = isinstance(value, (list, tuple)) and len(value) == 2 and all(not_negative(v) for v in value)
    return pair and value[0] <= value[1]


def _words(choices: Iterable[str]) -> str:
    return "one of " + ", ".join(f'"{choice}"' for choice in choices)


KEYS: dict[str, Key] = {
    "lr": Key(
        1e-3,
        "a number > 0",
        lambda v: _positive(number_in(v)),
        "The learning rate, tuned for the base batch. In Python also a tensor of one element.",
    ),
    "base": Key("adamw", _words(BASES), _one_of(BASES), "The update rule that LENA scales."),
    "weight_decay": Key(
        None,
        "null or a number >= 0",
        _null_or(not_negative),
        "Decoupled for adamw and lamb. A layer's factor scales it as it scales the update. "
        "null is 0.01 for adamw and lamb, 0 for sgd and lars.",
    ),
    "betas": Key((0.9, 0.999), "two numbers in [0, 1)", _betas, "adamw and lamb: as in `torch.optim.AdamW`."),
    "eps": Key(1e-8, "a number >= 0", not_negative, "adamw and lamb: as in `torch.optim.AdamW`."),
    "momentum": Key(
        0.9,
        "a number in [0, 1)",
        lambda v: _number(v) and 0 <= v < 1,
        "sgd: as in `torch.optim.SGD`. lars: the velocity contains the learning rate.",
    ),
    "nesterov": Key(False, "true or false", lambda v: isinstance(v, bool), "sgd: as in `torch.optim.SGD`."),
    "trust_coefficient": Key(
        None,
        "null or a number > 0",
        _null_or(_positive),
        "lars and lamb: c in the trust ratio. null is 1e-3 for lars, 1 for lamb.",
    ),
    "trust_clip": Key(
        None,
        "null or [min, max] with 0 <= min <= max",
        _null_or(_clip_range),
        "lars and lamb: bounds of the trust ratio. null sets no bounds.",
    ),
    "layer": Key(
        "tensor",
        _words(LAYERS),
        _one_of(LAYERS),
        "What shares one gain: a parameter tensor, the parameters of one `nn.Module`, a numbered block such as "
        "`transformer.h.3`, or the whole model.",
    ),
    "scaling": Key(
        "gain",
        _words(SCALINGS),
        _one_of(SCALINGS),
        "`gain` is LENA. `linear` (R), `sqrt` (√R) and `none` (1) are fixed rules. They still measure and report.",
    ),
    "gain_power": Key(
        None,
        "null or a number > 0",
        _null_or(_positive),
        "The exponent p, used with `gain` only. null is 0.85 for adamw and lamb, and the paper's 1 for sgd and lars.",
    ),
    "max_relative_gain": Key(
        4.0,
        "null or a number >= 1",
        _null_or(lambda v: _number(v) and v >= 1),
        "Upper bound of a layer's gain, as a multiple of the whole model's gain. null sets no bound.",
    ),
    "max_factor": Key(
        None,
        "null or a number >= 1",
        _null_or(lambda v: _number(v) and v >= 1),
        "Upper bound of r^p. null sets no bound.",
    ),
    "smoothing": Key(
        None,
        "null or a number in [0, 1)",
        _null_or(lambda v: _number(v) and 0 <= v < 1),
        "Weight of the past in the moving averages. null is the paper's max(1 - n/1000, 0).",
    ),
    "base_batch_size": Key(
        None,
        "null or a number of samples > 0",
        _null_or(_positive),
        "The batch, in samples, that `lr` was tuned for. null is one micro-batch of the first update.",
    ),
    "micro_batch_size": Key(
        None,
        "null or a whole number of samples > 0",
        _null_or(_whole_positive),
        "Samples in one micro-batch. DeepSpeed knows it. Plain PyTorch needs it with `base_batch_size`.",
    ),
    "warmup": Key(
        "layer",
        _words(WARMUPS),
        _one_of(WARMUPS),
        "`layer`: each layer ends its warm-up by its own training state. `fixed`: linear over `warmup_fraction` of the "
        "run. `none`: no warm-up.",
    ),
    "warmup_fraction": Key(
        0.05,
        "a number in (0, 1]",
        lambda v: _positive(v) and v <= 1,
        "Length of the warm-up, as a share of the run in updates of the base batch.",
    ),
    "warmup_cap": Key(
        0.25,
        "null or a number in [warmup_fraction, 1]",
        _null_or(lambda v: _positive(v) and v <= 1),
        "Share of the run after which every warm-up has ended. null is the paper's: no cap. If it is not given, a "
        "larger `warmup_fraction` raises it.",
    ),
    "total_steps": Key(
        None,
        "null or a whole number of updates > 0",
        _null_or(_whole_positive),
        "Planned updates of the run. null takes `total_num_steps` of DeepSpeed's scheduler, or the HF Trainer's count. "
        "A run needs one of them unless `warmup` is `none`.",
    ),
    "exclude": Key(
        (),
        "a list of fnmatch patterns of parameter names",
        _patterns,
        "Parameters with factor 1 and no statistics.",
    ),
    "no_decay": Key(
        (),
        "a list of fnmatch patterns of parameter names",
        _patterns,
        "Parameters without weight decay.",
    ),
    "nonfinite": Key(
        "skip",
        _words(NONFINITE),
        _one_of(NONFINITE),
        "An update whose gradient is infinite or NaN, at ZeRO 0 in fp32, where DeepSpeed does not look. `skip`: it is "
        "thrown away and counted, as at ZeRO 1-3, so that the run is not lost. `warn`: it is applied, as torch does.",
    ),
    "variant": Key(
        "default",
        _words(VARIANTS),
        _one_of(VARIANTS),
        "`authors-code` computes what the authors' published code computes.",
    ),
}


def bases_of(key: str) -> tuple[str, ...]:
    """The base rules that a key belongs to. Empty for a key of all rules."""
    return tuple(name for name, base in BASES.items() if key in base.keys)


def group_keys(base: str) -> tuple[str, ...]:
    """The keys that a parameter group may set for itself."""
    return ("lr", "weight_decay", *BASES[base].group_keys)
