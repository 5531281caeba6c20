"""The keys of `"optimizer": {"type": "LENA", "params": {…}}`: defaults, allowed values, and errors for all others.

`LenaConfig.from_keys` checks all keys. A `LenaConfig` never changes afterwards. `KEYS` is the one table of what is
allowed; docs/keys.md is made from it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from torch import Tensor

from .errors import ConfigError

SCALINGS = ("gain", "linear", "sqrt", "none")
WARMUPS = ("layer", "fixed", "none")
LAYERS = ("tensor", "module", "block", "model")
VARIANTS = ("default", "authors-code")


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


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _number_in(value: Any) -> Any:
    """What a tensor of one element holds, as torch's optimizers take it for a learning rate; else the value itself."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _not_negative(value: Any) -> bool:
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
    pair = isinstance(value, (list, tuple)) and len(value) == 2 and all(_not_negative(v) for v in value)
    return pair and value[0] <= value[1]


def _words(choices: Iterable[str]) -> str:
    return "one of " + ", ".join(f'"{choice}"' for choice in choices)


KEYS: dict[str, Key] = {
    "lr": Key(
        1e-3,
        "a number > 0",
        lambda v: _positive(_number_in(v)),
        "The learning rate, tuned for the base batch. In Python also a tensor of one element.",
    ),
    "base": Key("adamw", _words(BASES), _one_of(BASES), "The update rule that LENA scales."),
    "weight_decay": Key(
        None,
        "null or a number >= 0",
        _null_or(_not_negative),
        "Decoupled for adamw and lamb. A layer's factor scales it as it scales the update. "
        "null is 0.01 for adamw and lamb, 0 for sgd and lars.",
    ),
    "betas": Key((0.9, 0.999), "two numbers in [0, 1)", _betas, "adamw and lamb: as in `torch.optim.AdamW`."),
    "eps": Key(1e-8, "a number >= 0", _not_negative, "adamw and lamb: as in `torch.optim.AdamW`."),
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
        "The batch, in samples, that `lr` was tuned for. null is one micro-batch.",
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
    "variant": Key(
        "default",
        _words(VARIANTS),
        _one_of(VARIANTS),
        "`authors-code` computes what the authors' published code computes.",
    ),
}


@dataclass(frozen=True)
class LenaConfig:
    """The checked keys. A null `weight_decay` or `gain_power` is replaced by the base rule's default.

    Units: `lr` per update of the base batch; `base_batch_size`, `micro_batch_size` in samples; `total_steps` in
    updates; `warmup_fraction`, `warmup_cap` as shares of the run.
    """

    lr: float | Tensor
    base: str
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    momentum: float
    nesterov: bool
    trust_coefficient: float | None
    trust_clip: tuple[float, float] | None
    layer: str
    scaling: str
    gain_power: float
    max_relative_gain: float | None
    max_factor: float | None
    smoothing: float | None
    base_batch_size: float | None
    micro_batch_size: int | None
    warmup: str
    warmup_fraction: float
    warmup_cap: float | None
    total_steps: int | None
    exclude: tuple[str, ...]
    no_decay: tuple[str, ...]
    variant: str
    given: frozenset[str] = field(default=frozenset(), compare=False)

    @classmethod
    def from_keys(cls, keys: Mapping[str, Any]) -> LenaConfig:
        """Check the keys as a user wrote them. Raise `ConfigError` for the first that is wrong."""
        for key, value in keys.items():
            _check_value(key, value)
        base = keys.get("base", KEYS["base"].default)
        given = _given(keys)
        _check_belongs(given, base)
        values = {name: keys[name] if name in given else key.default for name, key in KEYS.items()}
        if values["weight_decay"] is None:
            values["weight_decay"] = BASES[base].weight_decay
        if values["gain_power"] is None:
            values["gain_power"] = BASES[base].gain_power if keys.get("variant") != "authors-code" else 1.0
        if "warmup_cap" not in given:
            values["warmup_cap"] = max(values["warmup_cap"], values["warmup_fraction"])
        for name in ("betas", "trust_clip", "exclude", "no_decay"):
            values[name] = tuple(values[name]) if values[name] is not None else None
        for name in ("total_steps", "micro_batch_size"):
            values[name] = int(values[name]) if values[name] is not None else None
        config = cls(**values, given=frozenset(given))
        config._check_combinations()
        return config

    def _check_combinations(self) -> None:
        if self.warmup_cap is not None and self.warmup_cap < self.warmup_fraction:
            raise ConfigError(
                f'LENA: "warmup_cap": {self.warmup_cap} is below "warmup_fraction": {self.warmup_fraction}; '
                f"allowed is {KEYS['warmup_cap'].allowed}. Raise warmup_cap, or leave it out."
            )
        if self.nesterov and self.momentum == 0:
            raise ConfigError('LENA: "nesterov": true needs "momentum" > 0, got 0.')
        if self.variant == "authors-code":
            self._check_authors_code()

    def _check_authors_code(self) -> None:
        fixed = {"scaling": "gain", "gain_power": 1.0, "max_factor": None, "base_batch_size": None, "smoothing": None}
        for name, value in fixed.items():
            if getattr(self, name) != value:
                raise ConfigError(
                    f'LENA: "variant": "authors-code" has no "{name}": got {getattr(self, name)!r}, allowed is '
                    f"{value!r}. Leave the key out, or use the default variant."
                )
        for name in ("max_relative_gain", "warmup_cap"):
            if name in self.given and getattr(self, name) is not None:
                raise ConfigError(
                    f'LENA: "variant": "authors-code" has no "{name}": got {getattr(self, name)!r}, allowed is null.'
                )
        if self.warmup == "fixed":
            raise ConfigError(
                'LENA: "variant": "authors-code" has "warmup": "layer" or "none", got "fixed". Use the default variant.'
            )


def _given(keys: Mapping[str, Any]) -> set[str]:
    """The keys that count as given. A null for a key of some base rules only does not count."""
    return {name for name, value in keys.items() if not (value is None and bases_of(name))}


def _check_value(name: str, value: Any) -> None:
    if name not in KEYS:
        close = difflib.get_close_matches(name.lower(), KEYS, n=1)
        hint = f'Did you mean "{close[0]}"? ' if close else ""
        raise ConfigError(f'LENA: unknown key "{name}" (value {value!r}). {hint}Known keys: {", ".join(sorted(KEYS))}.')
    key = KEYS[name]
    if key.accepts(value) or (value is None and bases_of(name)):
        return
    message = f'LENA: "{name}": {value!r} is not allowed; allowed is {key.allowed}.'
    if isinstance(value, str) and value == "auto":
        message += ' HF Trainer fills "auto" for lr, betas, eps and weight_decay only; for other keys write null.'
    elif isinstance(value, str) and _is_number_text(value):
        message += f" It is text here: write {name}: {value} without quotes."
    raise ConfigError(message)


def _is_number_text(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _check_belongs(given: set[str], base: str) -> None:
    for name in sorted(given):
        bases = bases_of(name)
        if bases and base not in bases:
            known = BASES[base].keys
            raise ConfigError(
                f'LENA: "{name}" belongs to "base" {" and ".join(bases)}, but "base" is "{base}". '
                f'Keys of "{base}": {", ".join(known) or "none of its own"}. Remove "{name}" or change "base".'
            )


def bases_of(key: str) -> tuple[str, ...]:
    """The base rules that a key belongs to. Empty for a key of all rules."""
    return tuple(name for name, base in BASES.items() if key in base.keys)


def group_keys(base: str) -> tuple[str, ...]:
    """The keys that a parameter group may set for itself."""
    return ("lr", "weight_decay", *BASES[base].group_keys)


def check_group(group: Mapping[str, Any], config: LenaConfig) -> None:
    """Check what a parameter group sets for itself: `lr`, `weight_decay`, the base rule's keys, `lena`.

    Other entries (a name, DeepSpeed's marks) are the user's and are left alone.
    """
    mine = group_keys(config.base)
    for name in KEYS.keys() & group.keys():
        if name not in mine:
            raise ConfigError(
                f'LENA: a parameter group has "{name}": {group[name]!r}, which is not a key of a group with "base": '
                f'"{config.base}". A group may have {", ".join(mine)} and "lena".'
            )
        if name == "lr" and hasattr(group[name], "item"):
            continue  # a tensor learning rate, as torch's optimizers take
        # A scheduler may set a group's lr to 0, so only config.lr has to be positive.
        at_least_zero = name in ("lr", "weight_decay")
        accepts = _not_negative if at_least_zero else KEYS[name].accepts
        if not accepts(_number_in(group[name]) if name == "lr" else group[name]):
            allowed = "a number >= 0" if at_least_zero else KEYS[name].allowed
            raise ConfigError(f'LENA: a parameter group has "{name}": {group[name]!r}; allowed is {allowed}.')
    if not isinstance(group.get("lena", True), bool):
        raise ConfigError(f'LENA: a parameter group has "lena": {group["lena"]!r}; allowed is true or false.')


def unknown_total_steps() -> ConfigError:
    """The error for a run of unknown length."""
    return ConfigError(
        'LENA: "total_steps" is not known: it is null, there is no scheduler with total_num_steps, and no HF Trainer. '
        'The warm-up is a share of the run, so it is needed. Give "total_steps" (planned updates), or "warmup": "none".'
    )
