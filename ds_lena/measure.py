"""Measures one update: the statistics of all layers, by one all-reduce over the ranks that average the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .algorithm import Measurement
from .layers import LayerTable
from .probe import Probe
from .reduce import sum_over, world_size
from .shards import Host


class Meter:
    """Knows which layer each parameter belongs to; what was seen comes from the probe and the host."""

    def __init__(self, probe: Probe, host: Host, table: LayerTable, device: torch.device) -> None:
        self._probe = probe
        self._host = host
        self._layers = table.count
        self.of_parameter = torch.tensor(table.of_parameter, dtype=torch.long, device=device)

    def measure(self) -> tuple[Measurement, Tensor]:
        """The statistics by layer, and the squared norm () of the whole averaged gradient, excluded parameters too."""
        layers, group = self._layers, self._host.group
        squares = self._by_layer(self._probe.sums)[:layers]
        passes = squares.new_full((1,), float(self._probe.passes))
        buffer = sum_over(torch.cat((passes, squares, self._by_layer(self._host.squares_of_mean()))), group)
        n, square_of_mean = buffer[0], buffer[layers + 1 :]
        # The share of micro-gradient h in the average over R ranks is h / R, so g = n h / R and A = (1/n) sum |g|^2.
        replicas = world_size(group)
        measured = Measurement(
            n=n, mean_square=buffer[1 : layers + 1] * n / replicas**2, square_of_mean=square_of_mean[:layers]
        )
        return measured, square_of_mean.sum()

    def _by_layer(self, of_parameters: Tensor) -> Tensor:
        """(L + 1,): sums over the parameters of each layer; the last entry is for those of no layer."""
        return of_parameters.new_zeros(self._layers + 1).index_add_(0, self.of_parameter, of_parameters)
