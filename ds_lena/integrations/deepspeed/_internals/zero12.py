"""ZeRO 1 and 2: one flat fp32 partition per group.

The parameters have the optimizer's own order. DeepSpeed's `_hp_mapping` can be wrong about it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ....errors import StateError
from ....layouts.layout import GradientPieces, Layout, Segment
from . import SEEN_WITH
from .flat import segments_in


class Zero12Layout(Layout):
    """`DeepSpeedZeroOptimizer`: each group has a list of averaged pieces of gradients, which contains padding."""

    def __init__(self, zero: Any, index: Mapping[int, int]) -> None:
        self._zero, self._index = zero, index
        self._segments: list[list[Segment]] = []
        for group, parameters in enumerate(zero.round_robin_bit16_groups):
            size = int(zero.partition_size[group])
            start = torch.distributed.get_rank(zero.real_dp_process_group[group]) * size
            offsets = zero.round_robin_bit16_offsets[group]
            self._segments.append(segments_in(zip(parameters, offsets, strict=True), start, size, index))

    def segments(self) -> list[tuple[Tensor, list[Segment]]]:
        return list(zip(self._zero.single_partition_of_fp32_groups, self._segments, strict=True))

    def gradients(self) -> GradientPieces:
        for group, segments in enumerate(self._segments):
            by_start = {segment.start: segment for segment in segments}
            position = 0
            for piece in self._zero.averaged_gradients.get(group) or ():
                segment = by_start.pop(position, None)
                if segment is not None:
                    if segment.length != piece.numel():
                        raise StateError(
                            f"LENA: DeepSpeed gave a piece of {piece.numel()} gradient elements where {segment.length} "
                            f"were expected. Install DeepSpeed {SEEN_WITH}, or report this configuration."
                        )
                    yield segment.parameter, piece
                position += piece.numel()
            for segment in by_start.values():
                yield segment.parameter, None

    def loss_scale(self) -> float:
        return float(self._zero.loss_scale)

    def unchanged_up_to(self) -> int:
        """Gradients are copied into the buffer of a bucket, and reduced there, unless they are larger than a bucket."""
        return int(self._zero.reduce_bucket_size) if self._zero.contiguous_gradients else 0

    def thrown_away(self, reached: Sequence[int]) -> list[int]:
        """At ZeRO 1 gradients lie in the parameters until the last micro-batch, and while reduction is coalesced."""
        zero = self._zero
        if self._is_reduced() or (zero.partition_gradients and not zero._coalesce_grad_reduction):
            return []
        parameters = [parameter for group in zero.bit16_groups for parameter in group]
        held = {self._index.get(id(p)) for p in parameters if p.grad is not None or p.grad_accum is not None}
        return [i for i in reached if i not in held]

    def next_pass(self) -> Literal["adds", "replaces all", "replaces some"]:
        """What has been reduced for the update is replaced, unless it lies in the fp32 buffer of bf16 at ZeRO 2."""
        adds = all(map(self._zero._use_compact_grad_partition_buffer, range(len(self._segments))))
        return "replaces all" if self._is_reduced() and not adds else "adds"

    def broken_pass(self) -> Literal["kept", "dropped", "fatal"]:
        """Where gradients are reduced during the pass, DeepSpeed refuses to reduce any of them a second time."""
        return "fatal" if self._zero.partition_gradients or self._zero.overlap_comm else "kept"

    def discard(self) -> None:
        self._zero.zero_grad()
        self._forget_averaged()

    def _forget_averaged(self) -> None:
        for held in (self._zero.averaged_gradients, self._zero.all_grad_tensors):
            for group in held:
                held[group] = None

    def _is_reduced(self) -> bool:
        return any(pieces is not None for pieces in self._zero.averaged_gradients.values())
