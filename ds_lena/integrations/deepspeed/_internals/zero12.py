"""ZeRO 1 and 2: one flat fp32 partition per group.

The parameters have the optimizer's own order. DeepSpeed's `_hp_mapping` can be wrong about it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ....errors import StateError
from ....layouts.layout import GradientPieces, Layout, Segment
from . import SEEN_WITH
from .flat import segments_in


class Zero12Layout(Layout):
    """`DeepSpeedZeroOptimizer`: each group has a list of averaged pieces of gradients, which contains padding."""

    def __init__(self, zero: Any, index: Mapping[int, int]) -> None:
        self._zero = zero
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
