"""ZeRO 1 and 2 with the optimizer on the CPU: one flat fp32 partition per group, with a gradient that stays."""

from __future__ import annotations

from torch import Tensor

from ....layouts.layout import GradientPieces
from .zero12 import Zero12Layout


class Zero12OffloadLayout(Zero12Layout):
    """`DeepSpeedZeroOptimizer` with `offload_optimizer`. The averaged gradient is the partition's `.grad`."""

    _has_averaged = False

    def gradients(self) -> GradientPieces:
        self._complete()
        for flat, segments in self.segments():
            gradient: Tensor = flat.grad  # type: ignore[assignment]
            for segment in segments:
                yield segment.parameter, gradient.narrow(0, segment.start, segment.length)

    def _complete(self) -> None:
        """Write the gradients that DeepSpeed 0.19.8 leaves out: of parameters that the last micro-batch does not use.

        DeepSpeed has a function for it, which it calls where the user says when an update ends. It would write all
        gradients once more.
        """
        zero = self._zero
        missed = zero._offload_accumulated_param_ids - zero.norm_for_param_grads.keys()
        if missed:
            accumulated, zero._offload_accumulated_param_ids = zero._offload_accumulated_param_ids, missed
            zero._finalize_cpu_offload_gradient_accumulation()
            zero._offload_accumulated_param_ids = accumulated
        zero._wait_for_offload_copies()
        self._has_averaged = True

    def discard(self) -> None:
        super().discard()
        self._zero._offload_accumulated_param_ids = set()
        self._zero.reset_cpu_buffers()
        self.clear_gradients()

    def clear_gradients(self) -> None:
        """Zero all gradients on the CPU, which DeepSpeed never does.

        Otherwise a parameter that a window does not use would move by the gradient of the window before, and one that
        is first used in a later micro-batch would add to it. After an overflow, the sums in fp32 would stay infinite.
        """
        for flat in self._zero.single_partition_of_fp32_groups:
            flat.grad.zero_()
        for accumulated in self._zero.accumulated_grads_in_cpu.values():
            accumulated.zero_()
        self._forget_averaged()
        self._has_averaged = False

    def _is_reduced(self) -> bool:
        zero = self._zero
        is_new = zero._epilogue_ran_this_backward and zero.is_gradient_accumulation_boundary()
        return self._has_averaged or bool(is_new)
