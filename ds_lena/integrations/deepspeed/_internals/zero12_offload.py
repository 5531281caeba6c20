"""ZeRO 1 and 2 with the optimizer on the CPU: one flat fp32 partition per group, with a gradient that stays."""

from __future__ import annotations

from ....errors import StateError
from .flat import KeptGradients
from .zero12 import Zero12Layout


class Zero12OffloadLayout(KeptGradients, Zero12Layout):
    """`DeepSpeedZeroOptimizer` with `offload_optimizer`. The averaged gradient is the partition's `.grad`."""

    def _write_missed(self) -> set[int]:
        """DeepSpeed 0.19.8 leaves out the gradient of a parameter that the last micro-batch does not use.

        It has a function for it, for updates whose end the user alone knows. A parameter that the whole update does
        not use has zeros instead of the gradient of an earlier update.
        """
        zero = self._zero
        parameters = [parameter for group in zero.bit16_groups for parameter in group]
        here = {segment.parameter for segments in self._segments for segment in segments}
        held = [p for p in parameters if zero.get_gradient_for_reduction(p) is not None and self._index[id(p)] in here]
        if held and not zero.partition_gradients:
            raise StateError(
                "LENA: the last micro-batch of this update had no backward pass. At ZeRO 1 DeepSpeed reduces the "
                "gradients of the update in that pass, so they are not reduced. Call engine.backward() for each "
                "micro-batch, or use ZeRO 2."
            )
        missed = zero._offload_accumulated_param_ids - zero.norm_for_param_grads.keys()
        if missed:
            accumulated, zero._offload_accumulated_param_ids = zero._offload_accumulated_param_ids, missed
            zero._finalize_cpu_offload_gradient_accumulation()
            zero._offload_accumulated_param_ids = accumulated
        self._wait()
        return {self._index[id(p)] for p in parameters if zero.get_param_id(p) in zero.norm_for_param_grads}

    def _wait(self) -> None:
        self._zero._wait_for_offload_copies()

    def discard(self) -> None:
        super().discard()
        self._zero._offload_accumulated_param_ids = set()
        self._zero.reset_cpu_buffers()
        self.clear_gradients()

    def clear_gradients(self) -> None:
        """Zero the sums of micro-batches, which DeepSpeed never does.

        Otherwise a parameter that is first used in a later micro-batch would add to the gradient of the window before.
        After an overflow, the sums in fp32 would stay infinite.
        """
        for accumulated in self._zero.accumulated_grads_in_cpu.values():
            accumulated.zero_()
        self._forget_averaged()
        self._is_complete = False

    def _is_reduced(self) -> bool:
        zero = self._zero
        return self._is_complete or (zero._epilogue_ran_this_backward and zero.is_gradient_accumulation_boundary())
