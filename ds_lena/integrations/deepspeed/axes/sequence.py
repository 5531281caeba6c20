"""Sequence parallelism: the ranks of a group share each micro-batch, and each of them sees a part of every gradient.

DeepSpeed adds the parts up when it averages. LENA adds them up before it takes the square, once per micro-batch.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from ....grad_stats.hooks import Parts
from ....grad_stats.placement import Placement
from ....layouts.layout import Layout
from .._internals.grid import Grid
from ..exchange import from_all

ELEMENTS = 2**23
"""In one bucket, if no tensor has more."""

ON_THE_WAY = 2
"""Buckets that are being added up at once. At ZeRO 0 any number: there DeepSpeed lets ranks use other parameters."""

_own_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = weakref.WeakKeyDictionary()


def amend(grid: Grid, layout: Layout, placements: Sequence[Placement]) -> list[Placement]:
    """Count the ranks of a group as one replica. Wrappers differ in what they divide by."""
    if grid.sequence_ranks == 1:
        return list(placements)
    divisor = layout.divisor(grid.replicas, grid.data_ranks)
    return [replace(placement, replicas=grid.replicas, divisor=divisor) for placement in placements]


def parts_of(
    grid: Grid,
    stage: int,
    placements: Sequence[Placement],
    order: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Parts | None:
    """What adds up the parts of gradients, in the type `dtype`. `order`: parameter numbers in the model's order."""
    if grid.sequence_ranks == 1:
        return None
    sizes = [placement.shape.numel() for placement in placements]
    on_the_way = ON_THE_WAY if stage else None
    return Buckets(_own_group(grid), sizes, order[::-1], dtype, device, on_the_way)


def _own_group(grid: Grid) -> dist.ProcessGroup:
    """The same ranks in a group of LENA's own. The model's own collectives may come before or after LENA's.

    All ranks make all groups: torch may find the addresses of an earlier group with the same ranks if only some do.
    """
    if grid.sequence not in _own_groups:
        mine = tuple(dist.get_process_group_ranks(grid.sequence))
        made = {ranks: dist.new_group(list(ranks)) for ranks in sorted(set(from_all(grid.everything, mine)))}
        _own_groups[grid.sequence] = made[mine]
    return _own_groups[grid.sequence]


class Buckets(Parts):
    """Adds up gradients over the ranks of a group, many in one message. The ranks take turns in measuring a bucket.

    All ranks send all buckets in one order, in every pass. A bucket waits for those before it, and for its gradients.
    One that a rank does not reach is sent at the end of the pass, as zeros. So the ranks may use different parameters.

    `sizes`: the number of elements of each parameter. `order`: in which gradients are expected.
    `dtype`: in which they are added up. `on_the_way`: how many buckets may be sent and not have arrived. None for any
    number: then no rank waits for another before the end of its pass.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        sizes: Sequence[int],
        order: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        on_the_way: int | None,
    ) -> None:
        self._group, self._sizes, self._order = group, sizes, order
        self._dtype, self._device, self._on_the_way = dtype, device, on_the_way
        self._ranks, self._rank = dist.get_process_group_ranks(group), dist.get_rank(group)
        self._sent: deque[tuple[dist.Work, int, Tensor]] = deque()
        self.begin([False] * len(sizes))

    def begin(self, wanted: Sequence[bool]) -> None:
        self._buckets: list[list[int]] = []
        self._starts: dict[int, tuple[int, int]] = {}
        self._lengths: list[int] = []
        for i in self._order:
            if wanted[i] and self._sizes[i]:
                if not self._buckets or self._lengths[-1] + self._sizes[i] > ELEMENTS:
                    self._buckets.append([])
                    self._lengths.append(0)
                self._starts[i] = len(self._buckets) - 1, self._lengths[-1]
                self._buckets[-1].append(i)
                self._lengths[-1] += self._sizes[i]
        self._start_pass()

    def _start_pass(self) -> None:
        self._next = 0
        self._missing = [set(bucket) for bucket in self._buckets]
        self._flats: dict[int, Tensor] = {}

    def add(self, index: int, gradient: Tensor) -> list[tuple[int, Tensor]]:
        if index not in self._starts:  # it has no elements
            return []
        bucket, start = self._starts[index]
        self._flat(bucket).narrow(0, start, self._sizes[index]).copy_(gradient.reshape(-1))
        self._missing[bucket].discard(index)
        found = []
        while self._next < len(self._buckets) and not self._missing[self._next]:
            found += self._send()
        return found

    def complete(self) -> list[tuple[int, Tensor]]:
        found = []
        while self._next < len(self._buckets):
            found += self._send()
        self._start_pass()
        return found + self._arrived(0)

    def _flat(self, bucket: int) -> Tensor:
        if bucket not in self._flats:
            self._flats[bucket] = torch.zeros(self._lengths[bucket], dtype=self._dtype, device=self._device)
        return self._flats[bucket]

    def _send(self) -> list[tuple[int, Tensor]]:
        bucket, self._next = self._next, self._next + 1
        flat = self._flat(bucket)
        del self._flats[bucket]
        work = dist.reduce(flat, self._ranks[bucket % len(self._ranks)], group=self._group, async_op=True)
        assert work is not None
        self._sent.append((work, bucket, flat))
        return self._arrived(self._on_the_way)

    def _arrived(self, on_the_way: int | None) -> list[tuple[int, Tensor]]:
        """The whole gradients that have come for this rank. Waits until at most `on_the_way` buckets are left."""
        found = []
        while self._sent:
            work, bucket, flat = self._sent[0]
            if (on_the_way is None or len(self._sent) <= on_the_way) and not work.is_completed():
                break
            work.wait()
            self._sent.popleft()
            if bucket % len(self._ranks) == self._rank:
                found += [(i, flat.narrow(0, self._starts[i][1], self._sizes[i])) for i in self._buckets[bucket]]
        return found
