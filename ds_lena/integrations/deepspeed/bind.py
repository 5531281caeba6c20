"""From an engine to a binding: what the engine knows of the parameters, the ranks and the run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ...binding import Binding
from ...errors import StateError, UnsupportedError
from ...layers import named_parameters
from ...meter import Meter
from ...schedule.clock import RunPlan
from .. import _transformers_internals as hf
from ._internals import SEEN_WITH
from ._internals.engine import EngineView
from ._internals.select import layout_of
from .axes import first_update_check, placements_of
from .exchange import members_of_all


def engine_binding(
    view: EngineView, meter: Meter, moves: Mapping[str, Callable[..., None]], mends: bool = True
) -> Binding:
    """The binding of a meter's parameters. All ranks of the model call it together, within `together`.

    `moves`: see `Binding`. `mends`: see `Layout`.

    Raises:
        UnsupportedError: the optimizer wrapper is not known, or a hook would see a gradient wrongly.
    """
    parameters = meter.parameters
    layout = layout_of(view, {id(parameter): i for i, parameter in enumerate(parameters)}, mends)
    if layout is None:
        raise UnsupportedError(
            f"LENA does not support the optimizer wrapper {type(view.wrapper).__name__}. "
            "Nearest supported choice: ZeRO 0-3 in fp32 or bf16."
        )
    grid = view.grid
    names, order = _names(view.module, meter)
    placements = placements_of(view, layout, names, parameters)

    def run() -> RunPlan:
        window = view.configured_window()
        return RunPlan(
            total_steps=view.scheduler_total_steps() or hf.planned_updates(view.config),
            planned_n=None if window is None else window * grid.replicas,
            micro_batch_size=view.micro_batch_size(),
        )

    return Binding(
        layout=layout,
        placements=placements,
        order=order,
        group=grid.everything,
        members_of_all=functools.partial(members_of_all, grid.everything, grid.is_split),
        check=first_update_check(view, meter.hooks, parameters, placements),
        run=run,
        largest_norm=view.largest_norm,
        moves=moves,
    )


def _names(model: torch.nn.Module, meter: Meter) -> tuple[list[str], list[int]]:
    """The parameters' names in the model, and their numbers in the model's order. Unknown parameters come last."""
    index = {id(parameter): i for i, parameter in enumerate(meter.parameters)}
    names = list(meter.names)
    order = []
    for name, parameter in named_parameters(model):
        if id(parameter) in index:
            names[index[id(parameter)]] = name
            order.append(index[id(parameter)])
    known = set(order)
    return names, order + [i for i in range(len(names)) if i not in known]


def check_layout(view: EngineView, binding: Binding, parameters: Sequence[Tensor]) -> None:
    """Compare every piece of the weights that `step()` moves with the model's own values, in the model's type.

    Raises:
        StateError: they differ.
    """
    layout = binding.layout
    for flat, segments in layout.segments():
        for segment in segments:
            piece = flat.data.reshape(-1).narrow(0, segment.start, segment.length)
            values = layout.model_values(parameters[segment.parameter], segment)
            if not torch.equal(piece.to(values), values):
                raise StateError(
                    f'LENA: the weights of "{binding.placements[segment.parameter].name}" do not lie where this '
                    f"version of ds_lena expects them in DeepSpeed's {type(view.wrapper).__name__}. Install DeepSpeed "
                    f"{SEEN_WITH}, or report this configuration."
                )
