"""ZeRO 3: each parameter is cut into equal parts, one per rank. Sub-groups of parts lie in flat fp32 tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ....layouts.layout import GradientPieces, Layout, Segment


class Zero3Layout(Layout):
    """`DeepSpeedZeroOptimizer_Stage3`: each parameter has one part of averaged gradient, in a buffer that stays."""

    def __init__(self, zero: Any, index: Mapping[int, int]) -> None:
        self._zero, self._index = zero, index
        self._segments: list[list[Segment]] = []
        for parameters in zero.fp16_groups:
            segments, position = [], 0
            for parameter in parameters:
                part = parameter.partition_numel()
                offset = part * torch.distributed.get_rank(parameter.ds_process_group)
                i, length = index[id(parameter)], max(0, min(part, parameter.ds_numel - offset))
                segments.append(Segment(i, position, length, offset))
                position += part
            self._segments.append(segments)

    def segments(self) -> Iterable[tuple[Tensor, list[Segment]]]:
        flats = self._zero.fp32_partitioned_groups_flat
        return [(flat, [s for s in cut if s.length]) for flat, cut in zip(flats, self._segments, strict=True)]

    def gradients(self) -> GradientPieces:
        for group, segments in enumerate(self._segments):
            parts = self._zero.averaged_gradients.get(group) or [None] * len(segments)
            for segment, part in zip(segments, parts, strict=True):
                if segment.length:
                    yield segment.parameter, None if part is None else part.narrow(0, 0, segment.length)

    def model_values(self, parameter: Tensor, segment: Segment) -> Tensor:
        part: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        return part.data.reshape(-1).narrow(0, 0, segment.length)

    def loss_scale(self) -> float:
        return float(self._zero.loss_scale)

    def unchanged_up_to(self) -> int:
        """Gradients are copied into the buffer of a bucket, and reduced there, unless they are larger than a bucket."""
        return int(self._zero.reduce_bucket_size) if self._zero.contiguous_gradients else 0

    def thrown_away(self, reached: Sequence[int]) -> list[int]:
        """`engine.zero_grad()` does not reach what is reduced. After the wrapper's `zero_grad()` DeepSpeed starts over.
        But it keeps what the next micro-batch does not reach: `discard` has to follow.
        """
        zero = self._zero
        if zero._coalesce_grad_reduction:
            held = {self._index.get(id(p)) for group in zero.fp16_groups for p in group if p.grad is not None}
            return [i for i in reached if i not in held]
        return list(reached) if zero.micro_step_id == 0 and not zero._epilogue_ran_this_backward else []

    def next_pass(self) -> Literal["adds", "replaces all", "replaces some"]:
        """DeepSpeed takes a pass for the first one until the engine's next forward pass."""
        is_first = self._zero.micro_step_id == 0 and not self._zero._coalesce_grad_reduction
        return "replaces some" if is_first else "adds"

    def divisor(self, replicas: int, ranks: int) -> int:
        """DeepSpeed divides by all ranks here, and by the number of micro-batches at the other stages."""
        return ranks

    def broken_pass(self) -> Literal["kept", "dropped", "fatal"]:
        return "fatal"  # gradients wait in a bucket, parameters are gathered

    def discard(self) -> None:
        self._zero.zero_grad()
        self.clear_gradients()

    def clear_gradients(self) -> None:
        """Zero the gradient buffers, which DeepSpeed never does.

        Otherwise a parameter that a window does not use would move by the gradient of the window before. A parameter
        first used in a later micro-batch would add to that gradient. Within a window it would be too late: a buffer may
        hold the gradient of other ranks already, for a parameter that this rank has not reached.
        """
        self._zero.grad_partitions_flat_buffer.zero_()
