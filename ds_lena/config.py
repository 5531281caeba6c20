"""The keys as one run has them: checked when they are given, and never changed afterwards.

`keys.py` has the table of what is allowed. Everything else is refused here, with the key, the value and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from .errors import ConfigError
from .keys import BASES, KEYS, bases_of, group_keys, not_negative, number_in

_CHOOSES = "LENA takes torch's fused kernels by itself, where there are any. Leave the key out."
_OF_OTHERS = {
    "foreach": _CHOOSES,
    "fused": _CHOOSES,
    "amsgrad": "LENA has no AMSGrad. Leave the key out.",
    "maximize": "LENA minimizes; negate the loss to maximize it. Leave the key out.",
    "capturable": "An update of LENA cannot be captured in a CUDA graph. Leave the key out.",
    "differentiable": "An update of LENA cannot be differentiated. Leave the key out.",
    "dampening": "LENA has no dampening. Leave the key out.",
    "max_grad_norm": 'LENA does not clip. Set "gradient_clipping" of DeepSpeed, or clip in the training loop.',
}
"""Arguments of other optimizers that LENA does not have, and what is so."""


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
    nonfinite: str
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

    def compared(self) -> dict[str, Any]:
        """All keys with their values, which have to be the same on all ranks. They may lie on any device."""
        return {entry.name: number_in(getattr(self, entry.name)) for entry in fields(self) if entry.compare}

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
        hint = f"{_OF_OTHERS[name]} " if name in _OF_OTHERS else hint
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
    fault = group_fault(group, config.base)
    if fault:
        raise ConfigError(f"LENA: a parameter group has {fault}.")


def group_fault(group: Mapping[str, Any], base: str) -> str | None:
    """What is not allowed of the values that a parameter group has for the keys of its own, in words; None if all is.

    A key that it does not have is no fault: the optimizer's own value counts.
    """
    for name in group_keys(base):
        # A scheduler may set a group's lr to 0, so only config.lr has to be positive.
        at_least_zero = name in ("lr", "weight_decay")
        accepts = not_negative if at_least_zero else KEYS[name].accepts
        if name in group and not accepts(number_in(group[name]) if name == "lr" else group[name]):
            allowed = "a number >= 0" if at_least_zero else KEYS[name].allowed
            return f'"{name}": {group[name]!r}; allowed is {allowed}'
    if not isinstance(group.get("lena", True), bool):
        return f'"lena": {group["lena"]!r}; allowed is true or false'
    return None


def unknown_total_steps() -> ConfigError:
    """The error for a run of unknown length."""
    return ConfigError(
        'LENA: "total_steps" is not known: it is null, there is no scheduler with total_num_steps, and no HF Trainer. '
        'The warm-up is a share of the run, so it is needed. Give "total_steps" (planned updates), or "warmup": "none".'
    )
