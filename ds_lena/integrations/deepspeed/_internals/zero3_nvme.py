"""ZeRO 3 with the optimizer on NVMe: weights, moments and gradients are in memory for one sub-group at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ....layouts.layout import GradientPieces, Segment
from .zero3_offload import Zero3OffloadLayout


class Zero3NvmeLayout(Zero3OffloadLayout):
    """`DeepSpeedZeroOptimizer_Stage3` with `offload_optimizer` to NVMe. A small sub-group stays on the CPU.

    The averaged gradient is in the buffer where DeepSpeed adds micro-batches up. It is on the CPU too, and `step()` has
    to take it from there: DeepSpeed 0.19.8 writes large gradients to NVMe, reads them back into memory that is not
    aligned as many disks want it, and does not look whether that has failed.
    """

    def segments(self) -> Iterator[tuple[Tensor, list[Segment]]]:
        """See `Layout`. A tensor has its weights until the next one is asked for."""
        zero = self._zero
        for number, found in enumerate(super().segments()):
            if not zero._swappable_optimizer_subgroup(number):
                yield found
                continue
            zero._optimizer_states_and_gradient_swap_in(number)
            try:
                yield found
            finally:
                zero._release_swap_buffers(number)

    def gradients(self) -> GradientPieces:
        if not self.mends:
            self._wait()
        elif not self._is_complete:
            self._write_missed()
            self._is_complete = True
        zero, start, found = self._zero, 0, []
        for number, (parameters, segments) in enumerate(zip(zero.fp16_groups, self._segments, strict=True)):
            parts = {}
            for parameter, segment in zip(parameters, segments, strict=True):
                size = parameter.partition_numel()
                parts[segment.start] = zero.grad_partitions_flat_buffer.narrow(0, start, size)
                start += size
                if segment.length:
                    found.append((segment.parameter, parts[segment.start].narrow(0, 0, segment.length)))
            if self.mends and zero._swappable_optimizer_subgroup(number):
                flat = zero.fp32_partitioned_groups_flat[number]
                on_nvme = zero.optimizer_swapper.swap_params_info[zero.get_param_id(flat)]
                on_nvme.swapped_gradients, on_nvme.unswapped_gradients = {}, parts
        return iter(found)
