"""Attaches LENA to Megatron's own optimizer: refuse what is not exact, read the layout, run around its step.

LENA takes the place of the optimizer inside Megatron's, with the same groups and the same state. So Megatron's
schedulers and checkpoints find what they expect.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...binding import Binding
from ...config import unknown_total_steps
from ...controller import Controller
from ...errors import ConfigError, StateError
from ...grad_stats.placement import Join, Placement, data_parallel
from ...layers import canonical_names
from ...optimizer import LENA, controller_of, dormant
from ...schedule import carrier
from ...schedule.clock import RunPlan
from ..deepspeed._internals.grid import Grid
from ..deepspeed.axes import pipeline, tensor
from ..deepspeed.exchange import members_of_all, require_same_keys, together
from . import _internals
from .refused import refuse_unsupported
from .steps import StepInGroups
from .window import Window

BASES = {"adam": ("adamw", "lamb"), "sgd": ("sgd", "lars")}
"""The base rules whose state is that of Megatron's optimizer; the first is the default."""

FINALIZE = "Call finalize_model_grads(model_chunks) of megatron.core.distributed before optimizer.step()."


def attach(optimizer: Any, chunks: Sequence[Any], keys: Mapping[str, Any]) -> None:
    """Bind a LENA to Megatron's optimizer, and have it run around its step. See `wrap`."""
    everything = torch.distributed.group.WORLD
    assert everything is not None, "Megatron has initialized torch.distributed"
    _internals.warn_of_version()
    wrapper, lena = together(everything, functools.partial(_make, optimizer, chunks, keys))
    chunk, controller = chunks[0], controller_of(lena)
    together(everything, functools.partial(require_same_keys, everything, controller.config.compared()))
    binding = together(everything, functools.partial(_bind, wrapper, chunk, controller))
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
    wrapper = _internals.inside(optimizer)
    if isinstance(wrapper.optimizer, LENA):
        raise StateError("LENA: wrap() was called before with this optimizer. Call it once.")
    refuse_unsupported(wrapper, chunks)
    all_keys = _keys(wrapper, keys)
    group_of = {id(parameter): number for number, parameter, _, _ in _internals.pieces_of(wrapper)}
    groups: list[dict[str, Any]] = [
        {"params": [], "lr": group.get("max_lr") or group["lr"]} for group in wrapper.optimizer.param_groups
    ]
    trained = [(name, p) for name, p in _internals.names_in_whole_model(chunks[0]) if p.requires_grad]
    _internals.require_same_parameters(wrapper, trained)
    names = canonical_names([name for name, _ in trained])
    for name, (_, parameter) in zip(names, trained, strict=True):
        groups[group_of.get(id(parameter), 0)]["params"].append((name, parameter))
    with dormant():  # parameters in fp16 are welcome: Megatron scales the loss
        lena = LENA(groups, **all_keys)
    config = controller_of(lena).config
    if config.warmup != "none" and config.total_steps is None:
        raise unknown_total_steps()
    _check_micro_batch_size(config.micro_batch_size)
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


def _check_micro_batch_size(given: int | None) -> None:
    actual = _internals.planned_micro_batches()[1]
    if given is not None and actual is not None and given != actual:
        raise ConfigError(
            f'LENA: "micro_batch_size": {given}, but Megatron\'s calculator of micro-batches has {actual}. Leave '
            "micro_batch_size out."
        )


def _bind(wrapper: Any, chunk: Any, controller: Controller) -> Binding:
    """What Megatron knows of the parameters, the ranks and the run. All ranks call it together."""
    grid, parameters = _internals.read_grid(chunk), controller.parameters
    placements = _placements(grid, chunk, parameters, controller.meter.names)
    layout = _internals.layout_of(wrapper, parameters, grid)
    _check_layout(layout, parameters, controller.meter.names)
    index = {id(parameter): i for i, parameter in enumerate(parameters)}

    def run() -> RunPlan:
        micro_batches, size = _internals.planned_micro_batches()
        return RunPlan(
            planned_n=None if micro_batches is None else micro_batches * grid.data_ranks, micro_batch_size=size
        )

    return Binding(
        layout=layout,
        placements=placements,
        order=[index[id(parameter)] for parameter in chunk.parameters() if id(parameter) in index],
        group=grid.everything,
        members_of_all=functools.partial(members_of_all, grid.everything, grid.is_split),
        check=tensor.copies_check(grid, parameters, placements, FINALIZE),
        run=run,
        clip=functools.partial(_internals.clip_coefficient, wrapper),
    )


def _placements(grid: Grid, chunk: Any, parameters: Sequence[Tensor], names: Sequence[str]) -> list[Placement]:
    """Where the parameters stand. Megatron divides by the data-parallel ranks, or by the tokens of the update."""
    placements = data_parallel(names, [parameter.shape for parameter in parameters], grid.data_ranks)
    if chunk.config.calculate_per_token_loss:
        placements = [replace(placement, divisor=1) for placement in placements]
    placements = tensor.parts_and_copies(grid, parameters, placements)
    placements = pipeline.join_ties(_internals.tied_embedding(chunk), parameters, placements)
    if grid.tensor_ranks == 1:
        return placements
    join = _add_up_over(grid)
    return [
        replace(placement, join=join) if _is_partial(chunk.config, placement.name, parameter) else placement
        for placement, parameter in zip(placements, parameters, strict=True)
    ]


def _is_partial(config: Any, name: str, parameter: Tensor) -> bool:
    """Whether finalize_model_grads() adds up this gradient over the tensor-parallel ranks, by Megatron's own test."""
    of_heads = config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name)
    return of_heads or (config.sequence_parallel and getattr(parameter, "sequence_parallel", False))


def _add_up_over(grid: Grid) -> Join:
    """Megatron adds up the averaged gradient. The squares need each micro-gradient whole."""

    def join(gradient: Tensor) -> Tensor:
        total = gradient.detach().clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=grid.tensor)
        return total

    return join


def _check_layout(layout: _internals.MegatronLayout, parameters: Sequence[Tensor], names: Sequence[str]) -> None:
    """Compare every piece of the weights that `step()` moves with the model's own values."""
    for flat, segments in layout.segments():
        for segment in segments:
            values = layout.model_values(parameters[segment.parameter], segment)
            if not torch.equal(flat.detach().reshape(-1).to(values), values):
                raise StateError(
                    f'LENA: the weights of "{names[segment.parameter]}" do not lie where this version of ds_lena '
                    f"expects them in Megatron's optimizer. If the model's weights were changed after "
                    "get_megatron_optimizer(), call optimizer.reload_model_params() before wrap(). Otherwise install "
                    f"megatron-core {_internals.SEEN_WITH}, or report this configuration."
                )
