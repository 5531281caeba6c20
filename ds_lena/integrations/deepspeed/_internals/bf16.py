"""`BF16_Optimizer` (ZeRO 1, bf16, fp32 accumulation): as ZeRO 1, but gradients have a flat buffer of their own."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ....layouts.layout import GradientPieces, Layout, Segment
from .flat import consecutive, segments_in


class Bf16Layout(Layout):
    """One flat fp32 partition per group."""

    def __init__(self, wrapper: Any, index: Mapping[int, int]) -> None:
        self._wrapper, self._index = wrapper, index
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

    def unchanged_up_to(self) -> int:
        """An immediate update clears a gradient as soon as it has been added in fp32."""
        return 0 if self._wrapper.immediate_grad_update else sys.maxsize

    def thrown_away(self, reached: Sequence[int]) -> list[int]:
        """Gradients are added up in fp32, and only `zero_grad()` of the wrapper throws them away, not the engine's."""
        groups, kept = self._wrapper.bf16_groups, self._wrapper.fp32_groups_has_gradients
        pairs = [pair for group in zip(groups, kept, strict=True) for pair in zip(*group, strict=True)]
        held = {self._index.get(id(parameter)) for parameter, is_held in pairs if is_held}
        return [i for i in reached if i not in held]

    def broken_pass(self) -> Literal["kept", "dropped", "fatal"]:
        """The next pass starts by clearing what has not been added in fp32, which happens at the end of a pass."""
        return "fatal" if self._wrapper.immediate_grad_update else "dropped"

    def loses_parts(self) -> bool:
        """A pass starts by clearing what has not been added in fp32."""
        return not self._wrapper.immediate_grad_update

    def discard(self) -> None:
        self._wrapper.zero_grad()
