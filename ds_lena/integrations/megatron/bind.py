"""From Megatron's own optimizer to a binding: what it knows of the parameters, the ranks and the run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...binding import Binding
from ...errors import ConfigError, StateError
from ...grad_stats.placement import Join, Placement, data_parallel
from ...layers import canonical_names
from ...meter import Meter
from ...schedule.clock import RunPlan
from ..deepspeed._internals.grid import Grid
from ..deepspeed.axes import pipeline, tensor
from ..deepspeed.exchange import members_of_all
from . import _internals

FINALIZE = "Call finalize_model_grads(model_chunks) of megatron.core.distributed before optimizer.step()."


def trained_parameters(wrapper: Any, chunk: Any) -> tuple[list[str], list[Tensor]]:
    """Names and parameters that this rank's stage trains, in the order of the model, named as in the whole model.

    Raises:
        StateError: they are not what Megatron's optimizer was given.
    """
    trained = [(name, p) for name, p in _internals.names_in_whole_model(chunk) if p.requires_grad]
    _internals.require_same_parameters(wrapper, trained)
    return canonical_names([name for name, _ in trained]), [parameter for _, parameter in trained]


def check_micro_batch_size(given: int | None, who: str) -> None:
    """Raise `ConfigError` if Megatron knows another size than the user gave."""
    actual = _internals.planned_micro_batches()[1]
    if given is not None and actual is not None and given != actual:
        raise ConfigError(
            f'{who}: "micro_batch_size": {given}, but Megatron\'s calculator of micro-batches has {actual}. Leave '
            "micro_batch_size out."
        )


def megatron_binding(wrapper: Any, chunk: Any, meter: Meter, mends: bool = True) -> Binding:
    """The binding of a meter's parameters. All ranks call it, within `together`. `mends`: see `Layout`.

    Raises:
        UnsupportedError: there are ranks beside those of the model.
        ConfigError: the tensor-parallel ranks have parameters of other names.
        StateError: this version of ds_lena does not know Megatron's layout.
    """
    grid, parameters, names = _internals.read_grid(chunk), meter.parameters, meter.names
    placements = _placements(grid, chunk, parameters, names)
    layout = _internals.layout_of(wrapper, parameters, grid, mends)
    _check_layout(layout, parameters, names)
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
        largest_norm=lambda: float(wrapper.config.clip_grad),
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
                    "get_megatron_optimizer(), call optimizer.reload_model_params() first. Otherwise install "
                    f"megatron-core {_internals.SEEN_WITH}, or report this configuration."
                )
