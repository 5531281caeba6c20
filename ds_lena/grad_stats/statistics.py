"""From local squared norms to the statistics of each layer in one update, by one all-reduce.

This file knows tensors and placements. It knows no optimizer wrapper and no engine.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ..recorded import Number, Recorded
from .measurement import Measurement
from .placement import Placement
from .reduce import Group, sum_over, world_size


class GradientStatistics:
    """A and B of every layer. The ranks of `group` hold all replicas and all parts of the model.

    `layer_of[i]`: the layer of parameter i, or `layers` for a parameter that takes no part.

    The parameters of one layer may differ in `spread`, the number of micro-batches in a micro-gradient. They are summed
    in separate cells (layer, spread), which are folded into the layer after the reduction. Without experts a cell is a
    layer. `cells`: those of all ranks, the same on each of them; each layer has one at least.
    """

    def __init__(
        self,
        placements: Sequence[Placement],
        layer_of: Sequence[int],
        layers: int,
        cells: Collection[tuple[int, int]],
        group: Group | None,
        device: torch.device,
    ) -> None:
        self._group, self._layers = group, layers
        at_once = {placement.micro_batches_at_once for placement in placements} or {world_size(group)}
        if len(at_once) > 1:
            raise ValueError(f"placements of one model disagree on the micro-batches of a pass: {sorted(at_once)}")
        self._ranks_of_micro_batch = world_size(group) / at_once.pop()
        cells = sorted(cells)
        index = {cell: i for i, cell in enumerate(cells)}
        cell_of = [index.get((layer, p.spread), len(cells)) for layer, p in zip(layer_of, placements, strict=True)]

        def vector(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device)

        self._own, self._passes = Recorded(keeps=4), Number(device)
        self._cells = len(cells)
        self._cell_of = torch.tensor(cell_of, dtype=torch.long, device=device)
        self._counted = vector([float(p.counted) for p in placements])
        self._weights = self._counted / vector([float(p.divisor) for p in placements]) ** 2
        self._layer_of_cell = torch.tensor([layer for layer, _ in cells], dtype=torch.long, device=device)
        self._spread_of_cell = vector([float(spread) for _, spread in cells])
        self._most_spread = vector([float(max(e for at, e in cells if at == layer)) for layer in range(layers)])
        self._is_spread = any(spread > 1 for _, spread in cells)

    def reduced(self, passes: int, sums: Tensor, squares_of_mean: Tensor, squares_now: Tensor) -> Tensor:
        """What `of` reads, summed over all ranks by one all-reduce.

        `passes`, `sums` (P,): what this rank's hooks have seen, see `GradientHooks`.
        `squares_of_mean`, `squares_now` (P,): this rank's share of the squared norms of the averaged gradient, as it
        was averaged, and as it may have been changed since.
        """
        own = self._own(self._own_share, None, self._passes.set(passes), sums, squares_of_mean, squares_now)
        return sum_over(own, self._group)

    def _own_share(self, _: None, passes: Tensor, sums: Tensor, squares_of_mean: Tensor, squares_now: Tensor) -> Tensor:
        cells = self._cells
        squares = self._by_cell(sums * self._weights)[:cells]
        mean = self._by_cell(squares_of_mean * self._counted)[:cells]
        now = (squares_now * self._counted).sum()
        return torch.cat((passes.unsqueeze(0), squares, mean, now.unsqueeze(0)))

    def of(self, reduced: Tensor, loss_scale: Tensor | float = 1.0) -> tuple[Measurement, Tensor]:
        """The statistics of each layer, and the squared norm () now of the averaged gradient of all parameters,
        excluded ones too.

        `loss_scale`, a number or (): the factor that is still in all gradients of this window.
        """
        cells = self._cells
        n = reduced[0] / self._ranks_of_micro_batch
        reduced = reduced / loss_scale**2
        mean_square = reduced[1 : cells + 1] * (n / self._spread_of_cell)
        square_of_mean = reduced[cells + 1 : -1]
        return self._fold(n, mean_square, square_of_mean), reduced[-1]

    def _by_cell(self, of_parameters: Tensor) -> Tensor:
        """(cells + 1,): the sum over the parameters of each cell. The last entry sums the parameters of no layer."""
        return of_parameters.new_zeros(self._cells + 1).index_add_(0, self._cell_of, of_parameters)

    def _fold(self, n: Tensor, mean_square: Tensor, square_of_mean: Tensor) -> Measurement:
        """From cells to layers. A of a cell becomes the A of a dense layer that has the same noise and signal."""
        if not self._is_spread:
            return Measurement(n, mean_square, square_of_mean)
        of_cell = n / self._spread_of_cell
        noise = (mean_square - square_of_mean) / torch.where(of_cell > 1, of_cell - 1, 1.0)
        dense = square_of_mean + (n - 1) * noise
        zeros = n.new_zeros(self._layers)
        return Measurement(
            n=n,
            mean_square=zeros.index_add(0, self._layer_of_cell, dense),
            square_of_mean=zeros.index_add(0, self._layer_of_cell, square_of_mean),
            micro_gradients=n / self._most_spread,
        )
