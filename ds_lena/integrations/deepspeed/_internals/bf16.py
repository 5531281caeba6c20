"""`BF16_Optimizer` (ZeRO 1, bf16, fp32 accumulation): as ZeRO 1, but gradients have a flat buffer of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ....layouts.layout import GradientPieces, Layout, Segment
from .flat import consecutive, segments_in


class Bf16Layout(Layout):
    """One flat fp32 partition per group."""

    def __init__(self, wrapper: Any, index: Mapping[int, int]) -> None:
        self._wrapper = wrapper
        self._segments: list[list[Segment]] = []
        for group, parameters in enumerate(wrapper.bf16_groups):
            size = wrapper.fp32_groups_flat_partition[group].numel()
            start = torch.distributed.get_rank(wrapper.real_dp_process_group[group]) * size
            self._segments.append(segments_in(consecutive(parameters), start, size, index))

    def segments(self) -> list[tuple[Tensor, list[Segment]]]:
        return list(zip(self._wrapper.fp32_groups_flat_partition, self._segments, strict=True))

    def gradients(self) -> GradientPieces:
        flats = self._wrapper.fp32_groups_gradient_flat_partition
        for flat, segments in zip(flats, self._segments, strict=True):
            for segment in segments:
                yield segment.parameter, flat.narrow(0, segment.start, segment.length)
