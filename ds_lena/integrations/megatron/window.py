"""The backward passes of one update in Megatron's own loop: whether they end in the gradient that moves the weights."""

from __future__ import annotations

from typing import Any

from ...errors import StateError
from ...grad_stats.hooks import GradientHooks
from ._internals import after_call, holds_gradients


class Window:
    """One window after the other. `begin`, `end`: called around an update."""

    def __init__(self, chunk: Any, hooks: GradientHooks) -> None:
        self._hooks = hooks
        self._ranks = chunk.dp_cp_group.size()
        self._is_zeroed, self._is_reduced = not holds_gradients(chunk), False
        after_call(chunk, "finish_grad_sync", self._after_sync)
        after_call(chunk, "scale_gradients", self._after_scaling)
        after_call(chunk, "zero_grad_buffer", self._after_zero)

    def begin(self) -> None:
        """Right before an update.

        Raises:
            StateError: the gradient is not that of this window's passes alone, averaged.
        """
        self._hooks.require_passes()
        if not self._is_zeroed:
            raise StateError(
                "LENA: gradients of earlier passes were in Megatron's buffers, and this update's were added to them. "
                "Call zero_grad_buffer() of each model chunk, and optimizer.zero_grad(), before each update. Call "
                "wrap() or watch() between two updates."
            )
        if self._ranks > 1 and not self._is_reduced:
            raise StateError(
                "LENA: the gradients were not averaged over the data-parallel ranks since the last backward pass. Call "
                "finalize_model_grads(model_chunks) of megatron.core.distributed before optimizer.step()."
            )

    def end(self) -> None:
        """After an update, applied or not."""
        self._is_zeroed = self._is_reduced = False

    def _after_sync(self, *_: Any, **__: Any) -> None:
        self._is_reduced = True

    def _after_scaling(self, scaling_factor: Any) -> None:
        """Of a loss per token: Megatron multiplies the sum of all gradients by one over the tokens of the update."""
        self._hooks.sums.mul_(scaling_factor**2)

    def _after_zero(self) -> None:
        self._is_zeroed, self._is_reduced = True, False
        self._hooks.clear()
