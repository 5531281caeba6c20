"""ZeRO 3 with the optimizer on the CPU: each sub-group's flat fp32 tensor has a gradient that stays."""

from __future__ import annotations

from .flat import KeptGradients
from .zero3 import Zero3Layout


class Zero3OffloadLayout(KeptGradients, Zero3Layout):
    """`DeepSpeedZeroOptimizer_Stage3` with `offload_optimizer`. The averaged gradient is the flat tensor's `.grad`."""

    def _write_missed(self) -> set[int]:
        """DeepSpeed 0.19.8 leaves out the same as with `Zero12OffloadLayout`.

        What the window does not use is written too: it is zero in the buffer of sums, see `clear_gradients`.
        """
        zero = self._zero
        here = {segment.parameter for segments in self._segments for segment in segments if segment.length}
        parameters = [p for group in zero.fp16_groups for p in group if self._index[id(p)] in here]
        missed = {p.ds_id for p in parameters if zero.get_param_id(p) not in zero.norm_for_param_grads}
        if missed:
            reached, zero._offload_boundary_param_ids = zero._offload_boundary_param_ids, missed
            zero._finalize_offload_gradient_accumulation()
            zero._offload_boundary_param_ids = reached
            self._wait()
        return here

    def _wait(self) -> None:
        from deepspeed.accelerator import get_accelerator

        get_accelerator().synchronize()  # it starts copies to the CPU, and waits for none

    def discard(self) -> None:
        super().discard()
        self._zero._offload_boundary_param_ids = set()
        self._zero.reset_cpu_buffers()

    def clear_gradients(self) -> None:
        super().clear_gradients()
        self._is_complete = False
