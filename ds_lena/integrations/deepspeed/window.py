"""The backward passes of one update under an engine: which gradients DeepSpeed adds up, drops or keeps.

LENA's statistics have to speak of the gradient that `step()` moves with. Where a loop makes DeepSpeed lose a gradient,
or keep one that was thrown away, LENA follows, says so, or refuses.
"""

from __future__ import annotations

import logging

import torch

from ...errors import StateError, UnsupportedError
from ...meter import Meter
from ._internals.engine import EngineView, has_more_parts

logger = logging.getLogger("ds_lena")


class Window:
    """One window after the other of one engine. `begin`, `end`: called around an update."""

    def __init__(self, view: EngineView, meter: Meter) -> None:
        self._view, self._meter = view, meter
        self._hooks, self._layout = meter.hooks, meter.binding.layout
        self._has_told = self._is_stuck = self._is_loaded = False
        self.end()
        self._hooks.before_pass = self._before_pass
        self._hooks.before_part = self._before_part
        self._hooks.has_more_parts = has_more_parts
        view.before_forward(self._before_forward)
        view.after_backward(self._after_backward)
        view.after_zero_grad(self._after_zero_grad)
        view.after_load(self._after_load)
        view.before_save(self._before_save)

    def begin(self) -> None:
        """Right before an update."""
        if self._is_loaded:
            raise StateError(
                "LENA: engine.step() came right after load_checkpoint(), which has thrown away the gradients of this "
                "update. Call forward and backward before it."
            )
        self._forget_thrown_away()

    def _forget_thrown_away(self) -> None:
        thrown_away = self._layout.thrown_away(self._hooks.reached())
        if thrown_away:
            self._hooks.forget(thrown_away)
            self._meter.forget_mean()

    def _discard(self) -> None:
        if self._layout.mends:
            self._layout.discard()

    def end(self) -> None:
        """After an update, applied or not."""
        self._forwards = 0
        self._is_reduced = self._is_zeroed = False

    def _before_forward(self) -> None:
        self._forwards += torch.is_grad_enabled()

    def _after_backward(self) -> None:
        if self._view.reduces_now() and not self._hooks.is_closed:
            self._meter.read_mean()

    def _before_pass(self) -> None:
        hooks, layout = self._hooks, self._layout
        self._meter.forget_mean()
        self._is_loaded = False
        self._look_at_broken_pass()
        if hooks.passes:
            self._forget_thrown_away()
        if hooks.passes:
            change = layout.next_pass()
            if change == "replaces all" and self._is_zeroed:
                self._discard()
                hooks.clear()
            elif change != "adds" or (self._is_reduced and not self._is_zeroed) or 0 < self._forwards <= hooks.passes:
                raise UnsupportedError(
                    "LENA: a second backward pass for one micro-batch. Its gradient would count as that of another "
                    "micro-batch, and at some ZeRO stages DeepSpeed drops the first one. For several losses, call "
                    "engine.backward(loss_1 + loss_2) once. For several micro-batches, call engine(…) for each, with "
                    '"gradient_accumulation_steps", engine.no_sync() or engine.coalesce_grad_reduction(). To throw '
                    "the first gradient away, call engine.zero_grad() before."
                )
        if not hooks.passes:
            self._is_zeroed = False
        self._is_reduced = self._view.reduces_now()

    def _before_part(self) -> None:
        if self._layout.loses_parts():
            raise UnsupportedError(
                "LENA: a loss has called backward in its own forward, as TiledFusedLogitsLoss does. At ZeRO 1 in bf16 "
                "with fp32 accumulation, DeepSpeed throws that gradient away, whatever the optimizer, and its weights "
                'would not be trained. Use ZeRO 2 or 3, or "bf16": {"enabled": true, "immediate_grad_update": true}.'
            )

    def _look_at_broken_pass(self) -> None:
        fate = self._layout.broken_pass() if self._hooks.is_broken_off else "kept"
        self._is_stuck = self._is_stuck or fate == "fatal"
        if self._is_stuck:
            raise StateError(
                "LENA: an exception has ended an earlier backward pass, and DeepSpeed holds a part of its gradients. "
                "It cannot go on from there in this configuration. Call destroy(), make a new engine and load a "
                "checkpoint; or use ZeRO 0 or 1 without overlap_comm, where engine.zero_grad() throws them away."
            )
        if not self._hooks.is_broken_off or not self._hooks.passes:
            return
        if fate == "dropped":
            self._hooks.forget_broken_pass()
        elif not self._layout.thrown_away(self._hooks.reached()):
            logger.warning(
                "LENA: an exception has ended a backward pass, and the gradients that it made before stay in this "
                "update. They count as a micro-batch. Call engine.zero_grad() after such an exception to throw away "
                "the gradients of the update so far."
            )

    def _after_zero_grad(self) -> None:
        hooks, layout = self._hooks, self._layout
        if hooks.passes == 0 or self._meter.is_in_update:
            return
        self._forget_thrown_away()
        if hooks.passes == 0:
            self._discard()
            return
        self._is_zeroed = True
        if layout.next_pass() != "replaces all" and not self._has_told:
            self._has_told = True
            logger.warning(
                "LENA: zero_grad() in the middle of an update throws away nothing here: DeepSpeed has reduced the "
                "gradients of %d backward passes already, and moves the weights by them. LENA counts them too. Use "
                "ZeRO 0 or 1 to throw away the gradient of a micro-batch.",
                hooks.passes,
            )

    def _before_save(self) -> None:
        if self._hooks.passes:
            logger.warning(
                "LENA: save_checkpoint() in the middle of an update: the gradients of its %d backward pass(es) so far "
                "are not in the checkpoint, nor is what LENA has measured of them. A run that loads it begins that "
                "update anew. Save right after engine.step() at a gradient accumulation boundary.",
                self._hooks.passes,
            )

    def _after_load(self) -> None:
        if self._hooks.passes:
            logger.warning(
                "LENA: load_checkpoint() in the middle of an update: the gradients of the %d backward passes before "
                "it are thrown away.",
                self._hooks.passes,
            )
            self._hooks.clear()
            self._meter.forget_mean()
            self._discard()
            if self._layout.mends:
                self._view.begin_window()  # DeepSpeed would end the next update as many micro-batches too early
                self._is_loaded = True
            self.end()
