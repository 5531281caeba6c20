"""LENA in plain PyTorch, one process or DDP: the gradient is `p.grad`, the same on every rank after backward.

A user may clip or unscale `p.grad` between backward and step, so the squared norm of the averaged gradient is taken at
the end of every backward pass, after DDP's reduction; the one that counts is the last before the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .norms import squared_norms
from .probe import Probe
from .reduce import Group, default_group, rank_in, world_size
from .shards import Segment

# DDP finishes its reduction in a callback at the end of backward, or, with static_graph, in a callback of a callback.
_CALLBACKS_TO_WAIT = 2


class PlainHost:
    """See `shards.Host`.

    `before_window`: called before the first pass of a window.
    """

    def __init__(
        self,
        probe: Probe,
        before_window: Callable[[], None],
        group: Group | None,
        given: bool,
    ) -> None:
        self._probe = probe
        self._before_window = before_window
        self._given_group = group
        self._group_is_given = given
        self._measured: Tensor | None = None

    def watch_passes(self, probe: Probe) -> None:
        self._norms, self._measured = probe.new_norms(), None
        probe.before_pass = self._before_pass
        probe.after_pass = self._after_pass

    @property
    def group(self) -> Group | None:
        """The group given to LENA, else all ranks, as DDP's default."""
        return self._given_group if self._group_is_given else default_group()

    def segments(self) -> list[tuple[Tensor, list[Segment]]]:
        return [(p, [Segment(i, start=0, length=p.numel(), offset=0)]) for i, p in enumerate(self._probe.parameters)]

    def squares_of_mean(self) -> Tensor:
        return torch.zeros_like(self._probe.sums) if self._measured is None else self._measured

    def gradients(self) -> Iterator[tuple[int, Tensor]]:
        # All ranks hold the same gradient: each measures its share of the parameters. torch does not step one of None.
        rank, ranks = rank_in(self.group), world_size(self.group)
        for i, parameter in enumerate(self._probe.parameters):
            if parameter.grad is not None and i % ranks == rank:
                yield i, parameter.grad

    def clip_coefficient(self, norm: Tensor) -> None:
        return None

    def shape(self, parameter: int) -> torch.Size:
        return self._probe.parameters[parameter].shape

    def micro_batch_size(self) -> int | None:
        return None

    def planned_n(self) -> int | None:
        return None

    def total_steps(self) -> int | None:
        return None

    def _before_pass(self) -> None:
        # Gradients that were set to None without this optimizer's zero_grad(), by model.zero_grad() say.
        reached = zip(self._probe.parameters, self._probe.last_pass, strict=True)
        if any(last and parameter.grad is None for parameter, last in reached):
            self._probe.clear()
        if self._probe.passes == 0:
            self._before_window()

    def _after_pass(self) -> None:
        self._measure_later(_CALLBACKS_TO_WAIT)

    def _measure_later(self, turns: int) -> None:
        if turns:
            queue = torch.autograd.Variable._execution_engine.queue_callback
            queue(lambda: self._measure_later(turns - 1))
            return
        with torch.no_grad():
            self._measured = squared_norms(self.gradients(), self._norms)
