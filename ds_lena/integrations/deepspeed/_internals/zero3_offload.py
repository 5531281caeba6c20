"""ZeRO 3 with the optimizer on the CPU: each sub-group's flat fp32 tensor has a gradient that stays."""

from __future__ import annotations

from torch import Tensor

from ....layouts.layout import GradientPieces
from .zero3 import Zero3Layout


class Zero3OffloadLayout(Zero3Layout):
    """`DeepSpeedZeroOptimizer_Stage3` with `offload_optimizer`. The averaged gradient is the flat tensor's `.grad`."""

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
        written = zero.norm_for_param_grads.keys()
        reached = zero._offload_boundary_param_ids
        parameters = [p for group in zero.fp16_groups for p in group if p.ds_id in reached]
        missed = {p.ds_id for p in parameters if zero.get_param_id(p) not in written}
        if missed:
            zero._offload_boundary_param_ids = missed
            zero._finalize_offload_gradient_accumulation()
            zero._offload_boundary_param_ids = reached

    def discard(self) -> None:
        super().discard()
        self._zero._offload_boundary_param_ids = set()
        self._zero.reset_cpu_buffers()

    def clear_gradients(self) -> None:
        super().clear_gradients()
        for flat in self._zero.fp32_partitioned_groups_flat:
            flat.grad.zero_()
