"""The axes of the parallel grid: each amends the placements of data parallelism. One file per axis."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ....grad_stats.placement import Placement, data_parallel
from .._internals.engine import EngineView, logical_shapes
from . import tensor


def placements_of(view: EngineView, names: Sequence[str], parameters: Sequence[Tensor]) -> list[Placement]:
    """Where each parameter stands in the engine's grid. All ranks of the model call it together.

    Raises:
        UnsupportedError: for a parameter whose gradient a hook would see wrongly.
    """
    placements = data_parallel(names, logical_shapes(parameters), view.grid.data_ranks)
    return tensor.amend(view.grid, parameters, placements)
