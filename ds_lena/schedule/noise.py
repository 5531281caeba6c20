"""What is remembered of noise and signal: of the model as a whole for every run, and of layers where only measured.

LENA's own averages of the layers are in its `LayerState`, since its decision is made from them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import require_entries
from ..grad_stats.measurement import Measurement
from ..layers import LayerTable
from . import algorithm
from .clock import scalar


@dataclass(frozen=True)
class Tally:
    """The model as one layer, over the averaging window; and what the backward passes of a run have seen.

    `moments` (3, 3): moving average, not debiased, of the outer product of (1, s, m) with itself. s and m are the noise
    and the signal of one update, summed over the layers whose noise was measured in it. So its first entry is W.
    `squares` (): the sum of the squares of the weights that W sums.
    `micro_batches` (): of all applied updates. `samples` (): in those of known size.
    """

    moments: Tensor
    squares: Tensor
    micro_batches: Tensor
    samples: Tensor

    @classmethod
    def start(cls, device: torch.device) -> Tally:
        """The tally before the first update."""
        nothing = scalar(0.0, device)
        return cls(torch.zeros(3, 3, dtype=torch.float64, device=device), nothing, nothing, nothing)

    def after(self, measured: Measurement, smoothing: float | None, size: int | None, size_before: int | None) -> Tally:
        """The tally after an update of micro-batches of `size` samples. Noise falls as 1 / size."""
        return self.averaged(measured, smoothing, size, size_before).counted(measured.n, size)

    def averaged(
        self, measured: Measurement, smoothing: float | None, size: int | None, size_before: int | None
    ) -> Tally:
        """The same with what an update says of noise and signal. It changes nothing if no layer shows its noise."""
        has_noise, n = measured.has_noise, measured.n
        of_layers = torch.stack(algorithm.noise_and_signal(measured.mean_square, measured.square_of_mean, n))
        values = torch.cat((torch.ones_like(n).unsqueeze(0), torch.where(has_noise, of_layers, 0.0).sum(dim=1)))
        w = algorithm.new_value_weight(n, smoothing) * has_noise.any()
        moments = self.moments
        if size and size_before and size != size_before:
            units = torch.ones_like(values)
            units[1] = size_before / size
            moments = moments * torch.outer(units, units)
        return replace(
            self,
            moments=torch.lerp(moments, torch.outer(values, values), w),
            squares=(1 - w) ** 2 * self.squares + w * w,
        )

    def counted(self, n: Tensor, size: int | None) -> Tally:
        """The same with n () more micro-batches."""
        return replace(self, micro_batches=self.micro_batches + n, samples=self.samples + n * (size or 0))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {entry.name: getattr(self, entry.name).tolist() for entry in fields(self)}

    @classmethod
    def from_dict(cls, saved: dict[str, Any], device: torch.device) -> Tally:
        """From `to_dict`."""
        names = [entry.name for entry in fields(cls)]
        return cls(**{name: torch.tensor(saved[name], dtype=torch.float64, device=device) for name in names})


@dataclass(frozen=True)
class NoiseState:
    """What a watch remembers, O(L).

    `averages` (2, L): moving averages of noise and signal, not debiased. `weight` (L,) W.
    `silent` (L,): updates in which the averaged gradient of a layer was exactly 0 and its micro-gradients were not.
    `nonfinite` (): how often a layer was left out of an update because its statistics were not finite.
    `differences` (): updates whose noise was told from the gradient of the update before.
    """

    averages: Tensor
    weight: Tensor
    silent: Tensor
    nonfinite: Tensor
    differences: Tensor
    tally: Tally

    @classmethod
    def start(cls, layers: int, device: torch.device) -> NoiseState:
        """Nothing is known."""
        zeros = torch.zeros(layers, dtype=torch.float64, device=device)
        nothing = scalar(0.0, device)
        return cls(zeros.repeat(2, 1), zeros, zeros.clone(), nothing, nothing, Tally.start(device))

    def after(
        self,
        measured: Measurement,
        n: Tensor,
        smoothing: float | None,
        sizes: tuple[int | None, int | None],
        of_differences: bool,
    ) -> NoiseState:
        """The state after an update of n () micro-batches. `sizes`: of a micro-batch, now and in the update before.

        `measured` has another n if noise is told from the gradients of two updates.
        """
        size, before = sizes
        state = algorithm.rescale_noise(self, before / size) if size and before and size != before else self
        averages, weight = algorithm.averaged(state, measured, smoothing)
        is_silent = measured.seen & (measured.square_of_mean == 0)
        return NoiseState(
            averages=averages,
            weight=weight,
            silent=self.silent + is_silent,
            nonfinite=self.nonfinite + (~measured.finite).sum(),
            differences=self.differences + of_differences,
            tally=self.tally.averaged(measured, smoothing, size, before).counted(n, size),
        )


class Remembered(Protocol):
    """What a report of noise reads. LENA's `Schedule` and a `NoiseMemory` have it."""

    table: LayerTable
    n: Tensor
    skipped: int

    @property
    def updates(self) -> int:
        """Applied updates."""
        ...

    @property
    def weight(self) -> Tensor:
        """(L,): W of each layer."""
        ...

    @property
    def tally(self) -> Tally:
        """The model as a whole."""
        ...

    @property
    def micro_batch_size(self) -> int | None:
        """Samples in a micro-batch, None if nobody says."""
        ...

    @property
    def nonfinite(self) -> Tensor:
        """See `NoiseState`."""
        ...

    def noise_and_signal(self) -> Tensor:
        """(2, L): debiased noise and signal."""
        ...


class NoiseMemory:
    """The memory of a watch. `n` (): micro-batches of the last update. `updates`, `skipped`: over the run."""

    def __init__(self, table: LayerTable, device: torch.device) -> None:
        self.table, self.device = table, device
        self.state = NoiseState.start(table.count, device)
        self.n = scalar(0.0, device)
        self.updates = self.skipped = 0
        self.micro_batch_size: int | None = None

    def commit(self, state: NoiseState, n: Tensor, size: int | None) -> None:
        """The update was applied."""
        self.state, self.n, self.micro_batch_size = state, n, size
        self.updates += 1

    def skip(self) -> None:
        """The update was thrown away."""
        self.skipped += 1

    @property
    def weight(self) -> Tensor:
        """See `Remembered`."""
        return self.state.weight

    @property
    def tally(self) -> Tally:
        """See `Remembered`."""
        return self.state.tally

    @property
    def nonfinite(self) -> Tensor:
        """See `Remembered`."""
        return self.state.nonfinite

    def noise_and_signal(self) -> Tensor:
        """See `Remembered`."""
        return algorithm.debiased(self.state.averages, self.state.weight)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, by layer name."""
        state = self.state
        columns = zip(state.averages.T.tolist(), state.weight.tolist(), state.silent.tolist(), strict=True)
        return {
            "version": 1,
            "update": self.updates,
            "skipped": self.skipped,
            "n": float(self.n),
            "micro_batch_size": self.micro_batch_size,
            "nonfinite": float(state.nonfinite),
            "differences": float(state.differences),
            "tally": state.tally.to_dict(),
            "layers": {
                name: {"averages": averages, "weight": weight, "silent": silent}
                for name, (averages, weight, silent) in zip(self.table.names, columns, strict=True)
            },
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Go on from `to_dict()`. Layers are matched by name; one that is not in it starts fresh.

        Raises:
            StateError: it is no such state.
        """
        require_entries(saved, self.to_dict(), "ds_lena.watch", "a watch")
        device, layers = self.device, saved["layers"]
        fresh = {"averages": [0.0, 0.0], "weight": 0.0, "silent": 0.0}
        rows = [layers.get(name, fresh) for name in self.table.names]

        def vector(values: Any) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device)

        self.state = NoiseState(
            averages=vector([row["averages"] for row in rows]).reshape(-1, 2).T.contiguous(),
            weight=vector([row["weight"] for row in rows]),
            silent=vector([row["silent"] for row in rows]),
            nonfinite=vector(saved["nonfinite"]),
            differences=vector(saved["differences"]),
            tally=Tally.from_dict(saved["tally"], device),
        )
        self.n, self.updates, self.skipped = vector(saved["n"]), saved["update"], saved["skipped"]
        self.micro_batch_size = saved["micro_batch_size"]
