"""ZeRO 3 with the optimizer on the CPU: each sub-group's flat fp32 tensor has a gradient that stays."""

from __future__ import annotations

from ....layouts.layout import GradientPieces
from .flat import pieces_of_grad
from .zero3 import Zero3Layout


class Zero3OffloadLayout(Zero3Layout):
    """`DeepSpeedZeroOptimizer_Stage3` with `offload_optimizer`. The averaged gradient is the flat tensor's `.grad`."""

    _is_complete = False

    def gradients(self) -> GradientPieces:
        if not self._is_complete:
            self._complete()
        return pieces_of_grad(self.segments())

    def _complete(self) -> None:
        """Write what DeepSpeed 0.19.8 leaves out, as `Zero12OffloadLayout` does."""
        from deepspeed.accelerator import get_accelerator

        zero = self._zero
        reached = zero._offload_boundary_param_ids
        parameters = [parameter for group in zero.fp16_groups for parameter in group]
        written = [p for p in parameters if zero.get_param_id(p) in zero.norm_for_param_grads]
        missed = [p for p in parameters if p.ds_id in reached and zero.get_param_id(p) not in zero.norm_for_param_grads]
        if missed:
            zero._offload_boundary_param_ids = {p.ds_id for p in missed}
            zero._finalize_offload_gradient_accumulation()
            zero._offload_boundary_param_ids = reached
            get_accelerator().synchronize()  # it starts copies to the CPU, and waits for none
        known = {self._index[id(p)] for p in (*written, *missed)}
        for i, piece in pieces_of_grad(self.segments()):
            if i not in known:
                piece.zero_()
        self._is_complete = True

    def discard(self) -> None:
        super().discard()
        self._zero._offload_boundary_param_ids = set()
        self._zero.reset_cpu_buffers()

    def clear_gradients(self) -> None:
        super().clear_gradients()
        self._is_complete = False
