"""Attaches LENA to Megatron's own optimizer: refuse what is not exact, read the layout, run around its step.

LENA takes the place of the optimizer inside Megatron's, with the same groups and the same state. So Megatron's
schedulers and checkpoints find what they expect.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...config import unknown_total_steps
from ...errors import ConfigError, StateError
from ...optimizer import LENA, controller_of, dormant
from ...schedule import carrier
from ..deepspeed.exchange import require_same_keys, together
from . import _internals
from .bind import check_micro_batch_size, megatron_binding, trained_parameters
from .refused import refuse_other_rules, refuse_unsupported
from .steps import StepInGroups
from .window import Window

BASES = {"adam": ("adamw", "lamb"), "sgd": ("sgd", "lars")}
"""The base rules whose state is that of Megatron's optimizer; the first is the default."""

WHO = "LENA"


def attach(optimizer: Any, chunks: Sequence[Any], keys: Mapping[str, Any]) -> None:
    """Bind a LENA to Megatron's optimizer, and have it run around its step. See `wrap`."""
    everything = _internals.all_ranks()
    _internals.warn_of_version()
    wrapper, lena = together(everything, functools.partial(_make, optimizer, chunks, keys))
    chunk, controller = chunks[0], controller_of(lena)
    together(everything, functools.partial(require_same_keys, everything, controller.config.compared()))
    binding = together(everything, functools.partial(megatron_binding, wrapper, chunk, controller.meter))
    controller.manage(binding, drops_empty_groups=False)

    inner = wrapper.optimizer
    lena.param_groups, lena.state, lena.defaults = inner.param_groups, inner.state, inner.defaults
    lena.register_state_dict_post_hook(lambda _, packed: carrier.fill(packed["param_groups"], packed["lena"]))
    wrapper.optimizer = lena
    window = Window(chunk, controller.hooks)
    is_torchs = isinstance(inner, (torch.optim.AdamW, torch.optim.SGD))  # otherwise FusedAdam or FusedSGD
    steps = StepInGroups(lena, is_torchs) if _internals.is_sharded(wrapper) or not is_torchs else None

    def before() -> None:
        window.begin()
        if steps is not None:
            steps.lend()
        controller.begin_update(lena.param_groups, lena.state)

    def after(applied: bool) -> None:
        if steps is not None:
            steps.take_back(applied)
        controller.end_update(applied)
        window.end()
        if applied:
            controller.updated()

    _internals.around_step(wrapper, before, after)


def _make(optimizer: Any, chunks: Sequence[Any], keys: Mapping[str, Any]) -> tuple[Any, LENA]:
    """The optimizer inside Megatron's, and a LENA for the model's parameters in the same groups."""
    wrapper = _internals.inside(optimizer, WHO)
    if isinstance(wrapper.optimizer, LENA):
        raise StateError("LENA: wrap() was called before with this optimizer. Call it once.")
    refuse_unsupported(wrapper, chunks, WHO)
    refuse_other_rules(wrapper, WHO)
    all_keys = _keys(wrapper, keys)
    group_of = {id(parameter): number for number, parameter, _, _ in _internals.pieces_of(wrapper)}
    groups: list[dict[str, Any]] = [
        {"params": [], "lr": group.get("max_lr") or group["lr"]} for group in wrapper.optimizer.param_groups
    ]
    for name, parameter in zip(*trained_parameters(wrapper, chunks[0]), strict=True):
        groups[group_of.get(id(parameter), 0)]["params"].append((name, parameter))
    with dormant():  # parameters in fp16 are welcome: Megatron scales the loss
        lena = LENA(groups, **all_keys)
    config = controller_of(lena).config
    if config.warmup != "none" and config.total_steps is None:
        raise unknown_total_steps()
    check_micro_batch_size(config.micro_batch_size, WHO)
    return wrapper, lena


def _keys(wrapper: Any, keys: Mapping[str, Any]) -> dict[str, Any]:
    """All keys: the user's, and those that are Megatron's."""
    kind = wrapper.config.optimizer
    base = keys.get("base", BASES[kind][0])
    if base not in BASES[kind]:
        raise ConfigError(
            f'LENA: "base": {base!r}, but Megatron\'s OptimizerConfig has optimizer="{kind}", whose state fits '
            f'{" and ".join(BASES[kind])}. Change "base", or Megatron\'s optimizer.'
        )
    own = _internals.own_keys(wrapper)
    for key, (value, field) in own.items():
        given = keys.get(key)
        if given is not None and (tuple(given) if key == "betas" else given) != value:
            raise ConfigError(
                f'LENA: "{key}": {given!r}, but Megatron\'s OptimizerConfig has {field} = {value!r}. Set it there, and '
                f'leave "{key}" out of wrap().'
            )
    if keys.get("nesterov"):
        raise ConfigError('LENA: "nesterov": true, and Megatron\'s SGD has none. Leave the key out.')
    return {**keys, "base": base, **{key: value for key, (value, _) in own.items()}}
