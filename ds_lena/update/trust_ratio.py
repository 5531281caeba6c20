"""Trust ratios of whole tensors whose pieces lie on many ranks: two squared norms per tensor, one more all-reduce.

ZeRO calls `step()` once per group or sub-group, so all ratios must be known before the first call. A pass of its own
computes the norms of the weights and of what will move them. It changes neither weights nor moments, so an update that
is thrown away leaves no trace.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import LenaConfig
from ..grad_stats.norms import squared_norm
from ..grad_stats.placement import Placement
from ..grad_stats.reduce import Group, sum_over
from ..layouts.layout import Layout, Segment
from ..recorded import Recorded
from .apply import State, lying_as, prepare
from .kernels.launch import Launcher, runs_on
from .kernels.table import Piece
from .rules import Rule, Trust
from .rules.common import blocks

Groups = Sequence[Mapping[str, Any]]


class TrustRatios:
    """The trust ratios of one base rule, from norms of whole tensors over the ranks of `group`.

    `places[i]`: the number of parameter i among the `count` parameters of all ranks.
    `groups_of[i]`: the parameter group of parameter i. `decays[i]`: whether parameter i has weight decay.
    """

    def __init__(
        self,
        rule: Rule,
        trust: Trust,
        config: LenaConfig,
        layout: Layout,
        placements: Sequence[Placement],
        places: Sequence[int],
        count: int,
        groups_of: Sequence[int],
        decays: Sequence[bool],
        group: Group | None,
        device: torch.device,
    ) -> None:
        self._rule, self._trust = rule, trust
        self._coefficient = trust.coefficient if config.trust_coefficient is None else config.trust_coefficient
        self._clip = config.trust_clip
        self._layout, self._group, self._device = layout, group, device
        self._groups_of, self._decays = groups_of, decays
        self._places, self._count = places, count
        self._own = torch.tensor(places, dtype=torch.long, device=device)
        self._where = {cut.parameter: (flat, cut) for flat, segments in layout.segments() for cut in segments}
        has_ratio = [len(placement.shape) > 1 for placement in placements]
        self._measured_here = [has and p.counted for has, p in zip(has_ratio, placements, strict=True)]
        self._measured_in: dict[int, list[int]] = {}
        for i, group_of in enumerate(groups_of):
            if self._measured_here[i] and i in self._where:
                self._measured_in.setdefault(group_of, []).append(i)
        self._has_ratio = torch.tensor(has_ratio, dtype=torch.bool, device=device)
        self._launcher = Launcher(trust.kernel)
        self._squares = torch.zeros(2, count, dtype=torch.float64, device=device)
        self._recorded_factors = Recorded(keeps=3)
        self._decay_values: list[float] = []
        self._decay_there = torch.zeros(0)

    def measure(self, clip: Tensor | None, factor: Tensor, groups: Groups, state: State) -> Tensor:
        """(P,): `factor` (P,) times the trust ratio of each parameter in this update. It multiplies the parameter's
        learning rate. On a GPU the call after the next one overwrites it.

        `clip` (): what the gradient will be multiplied by before `step()`, None for nothing.
        `state`: gets zeros for what a tensor does not have yet. Nothing else changes.
        """
        squares = self._squares.zero_()
        pieces = [(i, gradient) for i, gradient in self._layout.gradients() if self._measured_here[i]]
        if pieces and runs_on(self._where[pieces[0][0]][0].device):
            pieces = self._measure_together(pieces, clip, groups, state, squares)
        of_weights, of_others = squares[0].unbind(), squares[1].unbind()
        for index, gradient in pieces:
            totals = of_weights[self._places[index]], of_others[self._places[index]]
            self._measure_piece(index, gradient, clip, groups[self._groups_of[index]], state, totals)
        sum_over(squares, self._group)
        return self._recorded_factors(self._factors, None, squares, self._weight_decays(groups), factor)

    def _measure_together(
        self,
        pieces: Sequence[tuple[int, Tensor | None]],
        clip: Tensor | None,
        groups: Groups,
        state: State,
        squares: Tensor,
    ) -> list[tuple[int, Tensor | None]]:
        """Add the squares of both norms of all pieces to `squares` (2, count) (modified in place), by one kernel for
        each group. Returns the pieces that it cannot measure.
        """
        given, left = dict(pieces), []
        for number, group in enumerate(groups):
            own = self._measured_in.get(number, [])
            rows = [self._row(i, given[i], group, state) if i in given else [] for i in own]
            if any(rows):
                left += [(own[i], given[own[i]]) for i in self._launch(number, rows, clip, group, squares)]
        return left

    def _row(self, index: int, gradient: Tensor | None, group: Mapping[str, Any], state: State) -> list[Tensor | None]:
        """The tensors of one piece, as the kernel wants them."""
        flat, segment = self._where[index]
        names = self._rule.buffers(group)
        own = prepare(state[flat], flat, names)
        weight = _cut(lying_as(flat, flat), segment)
        if gradient is not None and not (gradient.is_contiguous() and weight.is_contiguous()):
            gradient = lying_as(weight, gradient)
        return [weight, gradient, *(_cut(own[name], segment) for name in names), own["step"]]

    def _launch(
        self,
        number: int,
        rows: Sequence[Sequence[Tensor | None]],
        clip: Tensor | None,
        group: Mapping[str, Any],
        squares: Tensor,
    ) -> list[int]:
        """Measure the pieces of one group. Returns the positions of those that are left."""

        def pieces() -> Iterator[Piece]:
            for i, index in enumerate(self._measured_in[number]):
                yield i, 0, self._where[index][1].length, 2 * self._places[index] + self._decays[index]

        device = next(tensor for row in rows for tensor in row if tensor is not None).device
        table = self._launcher.table(number, pieces, device)
        found = torch.zeros(len(table.chunks), 2, dtype=torch.float64, device=device)
        given = None if clip is None else clip.to(device)
        left = self._launcher.launch(table, rows, group, found, given, HAS_CLIP=clip is not None)
        squares.index_add_(1, table.rates.to(squares.device), found.t().to(squares))
        return left

    def _measure_piece(
        self,
        index: int,
        gradient: Tensor | None,
        clip: Tensor | None,
        group: Mapping[str, Any],
        state: State,
        totals: tuple[Tensor, Tensor],
    ) -> None:
        """Add the squares of both norms of one piece to `totals` (modified in place)."""
        flat, segment = self._where[index]
        names = self._rule.buffers(group)
        own = prepare(state[flat], flat, names)
        count, decay = own["step"] + 1, self._decay(group, index)
        wide = torch.promote_types(flat.dtype, torch.float32)
        given = [] if gradient is None else [gradient]
        for block in blocks([_cut(flat, segment), *given, *(_cut(own[name], segment) for name in names)]):
            weight, *rest = (tensor.to(wide) for tensor in block)
            clipped = _clipped(rest.pop(0), clip) if given else torch.zeros_like(weight)
            totals[0].add_(squared_norm(weight))
            self._trust.add_square(totals[1], weight, clipped, rest, count, decay, group)

    def _factors(self, _: None, squares: Tensor, weight_decay: Tensor, factor: Tensor) -> Tensor:
        """(P,): `factor` times the ratios. These are 1 for tensors of fewer than two dimensions, and where either norm
        is 0.
        """
        weight_norm, other_norm = squares[:, self._own].sqrt()
        has_ratio = self._has_ratio & (weight_norm > 0) & (other_norm > 0)
        safe = torch.where(has_ratio, other_norm, 1.0)
        ratio = self._trust.ratio(weight_norm, safe, weight_decay, self._coefficient)
        if self._clip is not None:
            ratio = ratio.clamp(*self._clip)
        return factor * torch.where(has_ratio, ratio, 1.0)

    def _decay(self, group: Mapping[str, Any], index: int) -> float:
        return group["weight_decay"] if self._decays[index] else 0.0

    def _weight_decays(self, groups: Groups) -> Tensor:
        """(P,) on the device. It is sent there only when a value has changed, since sending waits for the device."""
        values = [self._decay(groups[group], index) for index, group in enumerate(self._groups_of)]
        if values != self._decay_values:
            self._decay_values = values
            self._decay_there = torch.tensor(values, dtype=torch.float64, device=self._device)
        return self._decay_there


def clip_coefficient(norm: Tensor, largest: float) -> Tensor:
    """What clipping multiplies a gradient of this norm () by: in DeepSpeed, Megatron and torch alike. `largest`: the
    bound, 0 for no clipping.
    """
    return (largest / (norm + 1e-6)).clamp(max=1.0) if largest > 0 else torch.ones_like(norm)


def _cut(flat: Tensor, segment: Segment) -> Tensor:
    """A view of the segment's elements. If they are all elements: the tensor itself, in its own shape."""
    whole = segment.length == flat.numel()
    return flat if whole else flat.narrow(0, segment.start, segment.length)


def _clipped(gradient: Tensor, coefficient: Tensor | None) -> Tensor:
    return gradient if coefficient is None else gradient * coefficient.to(gradient)
