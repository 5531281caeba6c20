"""Hooks that see every micro-gradient of this rank, before any reduction, and add up the squared norms.

Autograd calls a tensor hook on each parameter with the full gradient of one backward pass. DDP and ZeRO reduce it only
afterwards. The hooks count the backward passes too: LENA counts n and does not read it from a configuration.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import StateError, UnsupportedError
from . import backward
from .norms import SquaredNorms
from .placement import Join


class GradientHooks:
    """Squared norms of the micro-gradients of `parameters`, summed over the backward passes of a window.

    `sums` (P,) float64: for each parameter, the sum of the squared norms over the backward passes of this window.
    It is 0 for a parameter whose norms are not wanted.
    `passes`: backward passes of this window. `last_pass[i]`: the last pass that reached parameter i, 0 for none.
    `before_pass()`, `after_pass()`: called around every pass, if set.
    """

    def __init__(self, parameters: Sequence[Tensor], names: Sequence[str]) -> None:
        self.parameters = list(parameters)
        self.names = list(names)
        self.passes = 0
        self.last_pass = [0] * len(self.parameters)
        self.before_pass: Callable[[], None] | None = None
        self.after_pass: Callable[[], None] | None = None
        self._in_pass = False
        self._pass_task = self._nested_task = self._ignored_task = backward.NO_TASK
        self.watch([True] * len(self.parameters))
        self._handles = [_hook(self, i) for i, parameter in enumerate(self.parameters)]
        self._finalizer = weakref.finalize(self, _remove, self._handles)

    def watch(self, wanted: Sequence[bool], joins: Sequence[Join | None] | None = None) -> None:
        """Set which parameters' norms are wanted, and the `join` of each placement. Starts a window, on the
        parameters' device.
        """
        self._wanted = list(wanted)
        self._joins = list(joins) if joins is not None else [None] * len(self.parameters)
        self._norms = self.new_norms()
        self.sums = self._norms.read()
        self.clear()

    def new_norms(self) -> SquaredNorms:
        """A buffer for one squared norm of each parameter."""
        first = self.parameters[0].device if self.parameters else torch.device("cpu")
        double = any(parameter.dtype == torch.float64 for parameter in self.parameters)
        return SquaredNorms(len(self.parameters), torch.float64 if double else torch.float32, first)

    def clear(self) -> None:
        """Forget the window: its sums, its passes, and which parameters they reached."""
        self.sums.zero_()
        self.passes = 0
        self.last_pass = [0] * len(self.parameters)
        self._in_pass = False

    def close(self) -> None:
        """Remove the hooks. Gradients are not seen afterwards."""
        self._finalizer()

    def unreached(self) -> list[int]:
        """Indices of the parameters that no pass of this window has reached yet."""
        return [i for i, last in enumerate(self.last_pass) if last == 0]

    def require_passes(self) -> None:
        """Raise `StateError` if no backward pass was seen in this window."""
        if self.passes == 0:
            raise StateError(
                "LENA: step() was called with gradients, but no backward pass was seen since the last step. Was step() "
                "called twice after one backward()? Call it once, and zero_grad() after it. Otherwise the gradients "
                "were not made by backward() on this optimizer's parameters. LENA has to see each micro-gradient: "
                "construct it before backward(), and do not fill in .grad by hand."
            )

    def _see(self, index: int, gradient: Tensor) -> None:
        task = backward.current_task()
        if task != self._pass_task:  # hardly ever: this runs once for every parameter in every pass
            if task not in (self._nested_task, self._ignored_task):
                self._enter(task, index)
            if task == self._ignored_task:
                return
        wanted = self._wanted[index]
        if wanted and self.last_pass[index] == self.passes:
            raise UnsupportedError(
                f'LENA: the gradient of "{self.names[index]}" came in several parts within one backward pass, so the '
                "norm of the whole cannot be measured. This happens to a weight that is shared by segments under "
                "reentrant activation checkpointing. Use checkpointing with use_reentrant=False (HF: "
                'gradient_checkpointing_kwargs={"use_reentrant": false}), or exclude this weight from LENA.'
            )
        self.last_pass[index] = self.passes
        if wanted:
            self._measure(index, gradient.detach() if gradient.requires_grad else gradient)

    def _measure(self, index: int, gradient: Tensor) -> None:
        join = self._joins[index]
        whole = gradient if join is None else join(gradient)
        if whole is not None:
            self._norms.write(index, whole)

    def _enter(self, task: int, index: int) -> None:
        """Classify a new graph task: a new backward pass, a part of the running pass, or no backward pass."""
        if backward.inside_function_backward():
            if self._in_pass:
                self._nested_task = task
                return
            raise UnsupportedError(
                f'LENA: the first gradient of a backward pass, of "{self.names[index]}", came from within reentrant '
                "activation checkpointing, so passes cannot be counted. Use checkpointing with use_reentrant=False, "
                "or keep the last layer outside the checkpointed segment."
            )
        # torch.autograd.grad runs tensor hooks too, but accumulates nothing: its gradients are no micro-gradients.
        if not backward.accumulates(self.parameters[index]):
            self._ignored_task = task
            return
        self._pass_task = task
        if self.before_pass is not None:
            self.before_pass()
        self.passes += 1
        self._in_pass = True
        self._norms.clear()
        backward.when_task_ends(self._leave)

    def _leave(self) -> None:
        self._in_pass = False
        self.sums.add_(self._norms.read())
        if self.after_pass is not None:
            self.after_pass()


def _hook(hooks: GradientHooks, index: int) -> torch.utils.hooks.RemovableHandle:
    """Hook one parameter. The hook refers to `hooks` weakly, so that Python can free a dropped optimizer."""
    reference = weakref.ref(hooks)

    def hook(gradient: Tensor) -> None:
        alive = reference()
        if alive is not None:
            alive._see(index, gradient)

    return hooks.parameters[index].register_hook(hook)


def _remove(handles: list[torch.utils.hooks.RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
