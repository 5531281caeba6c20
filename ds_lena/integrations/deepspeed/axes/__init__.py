"""The axes of the parallel grid: each amends the placements of data parallelism. One file per axis."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from torch import Tensor

from ....grad_stats.hooks import GradientHooks, Parts
from ....grad_stats.placement import Placement, data_parallel
from ....layouts.layout import Layout
from .._internals.engine import EngineView, logical_shapes
from ..exchange import together
from . import expert, pipeline, sequence, tensor


def placements_of(
    view: EngineView, layout: Layout, names: Sequence[str], parameters: Sequence[Tensor]
) -> list[Placement]:
    """Where each parameter stands in the engine's grid. All ranks of the model call it together.

    Raises:
        UnsupportedError: for a parameter whose gradient a hook would see wrongly.
    """
    placements = data_parallel(names, logical_shapes(parameters), view.grid.data_ranks)
    placements = sequence.amend(view.grid, layout, placements)
    placements = tensor.amend(view.grid, parameters, placements)
    placements = pipeline.amend(view.grid, view.module, parameters, placements)
    return expert.amend(view.grid, view.module, parameters, placements)


def parts_of(view: EngineView, placements: Sequence[Placement], order: Sequence[int]) -> Parts | None:
    """What makes gradients whole of which several ranks see a part. `order`: parameter numbers in the model's order."""
    dtype, stage = view.communication_type(), view.facts.stage
    return sequence.parts_of(view.grid, stage, placements, order, dtype, view.device)


def first_update_check(
    view: EngineView, hooks: GradientHooks, parameters: Sequence[Tensor], placements: Sequence[Placement]
) -> Callable[[Tensor], None] | None:
    """What the ranks of a split model make sure of at their first update, given the squares of the averaged gradient.

    Any error is the same on every rank.
    """
    checks = [
        tensor.copies_check(view.grid, parameters, placements),
        pipeline.passes_check(view.grid, hooks, view.accumulation_steps),
    ]
    asked = [check for check in checks if check is not None]

    def check(squares: Tensor) -> None:
        for each in asked:
            together(view.grid.everything, functools.partial(each, squares))

    return check if asked else None
