"""Hooks that see every micro-gradient of this rank, before any reduction, and add up the squared norms.

Autograd calls a tensor hook on each parameter with the full gradient of one backward pass. Ours comes after the user's
own hooks, so that it sees what is added. DDP and ZeRO reduce only afterwards. The hooks count the backward passes too:
LENA counts n and does not read it from a configuration.

A loss that calls backward in its own forward, on one chunk of its input after the other, makes a part of the
micro-gradient before its pass starts. Parts are kept and added, so that the norm is that of the whole.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..errors import StateError, UnsupportedError
from . import backward
from .norms import SquaredNorms
from .placement import Join


class Parts(Protocol):
    """Makes gradients whole of which several ranks see a part in each pass. They all call it in each pass."""

    def begin(self, wanted: Sequence[bool]) -> None:
        """Start over, with those parameters whose norms are wanted."""
        ...

    def add(self, index: int, gradient: Tensor) -> Iterable[tuple[int, Tensor]]:
        """Take this rank's part. Returns what has become whole meanwhile, as (parameter, whole), on one rank alone."""
        ...

    def complete(self) -> Iterable[tuple[int, Tensor]]:
        """End the pass. Returns all that is left, in the same way."""
        ...


class GradientHooks:
    """Squared norms of the micro-gradients of `parameters`, summed over the backward passes of a window.

    `sums` (P,) float64: for each parameter, the sum of the squared norms over the backward passes of this window.
    It is 0 for a parameter whose norms are not wanted.
    `passes`: backward passes of this window. `passes_of_run`: all that were seen.
    `last_pass[i]`: the last pass of the window that reached parameter i, 0 for none.
    `before_pass()`, `after_pass()`: called around every pass, if set. `before_part()`: called before a backward that a
    loss calls in its own forward.
    `has_more_parts(parameter)`: says, if set, that the gradient at hand is not the last part of this micro-gradient.
    `unchanged_up_to`: the most elements of a gradient that nobody changes in place until its pass has ended. On a GPU
    the norms of such gradients are taken in batches. `refuses_changes`: it is an error if someone changes one. Set it
    before `watch`.
    `is_broken_off`: an exception ended the pass before. What it reached is in `sums`, and it counts.
    """

    def __init__(self, parameters: Sequence[Tensor], names: Sequence[str]) -> None:
        self.parameters = list(parameters)
        self.names = list(names)
        self.passes = self.passes_of_run = 0
        self.last_pass = [0] * len(self.parameters)
        self.before_pass: Callable[[], None] | None = None
        self.after_pass: Callable[[], None] | None = None
        self.before_part: Callable[[], None] | None = None
        self.has_more_parts: Callable[[Tensor], bool] | None = None
        self.unchanged_up_to = 0
        self.refuses_changes = False
        self.is_broken_off = False
        self._end: weakref.ref[Callable[[], None]] | None = None
        self._pass_task = self._nested_task = self._part_task = self._ignored_task = backward.NO_TASK
        self.watch([True] * len(self.parameters))
        self._handles = [_hook(self, i) for i, parameter in enumerate(self.parameters)]
        self._finalizer = weakref.finalize(self, _remove, self._handles)

    def watch(
        self, wanted: Sequence[bool], joins: Sequence[Join | None] | None = None, shared: Parts | None = None
    ) -> None:
        """Set which parameters' norms are wanted, the `join` of each placement, and what makes gradients whole that
        are shared by ranks. Starts a window, on the parameters' device.
        """
        self._wanted = list(wanted)
        self._shared = shared
        if shared is not None:
            shared.begin(self._wanted)
        self._joins = list(joins) if joins is not None else [None] * len(self.parameters)
        self._norms = self.new_norms()
        self._norms.refuses_changes = self.refuses_changes
        self.sums = self._norms.read().clone()
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
        self._parts: dict[int, Tensor] = {}
        self._norms.forget_waiting()
        self._has_begun = False

    def reached(self) -> list[int]:
        """Indices of the parameters that a pass of this window has reached."""
        return [i for i, last in enumerate(self.last_pass) if last]

    def forget(self, thrown_away: Iterable[int]) -> None:
        """Forget parameters whose gradient of this window was thrown away. If it was that of all, forget the window."""
        for i in thrown_away:
            self.sums[i] = 0
            self.last_pass[i] = 0
        if not any(self.last_pass):
            self.clear()

    def forget_broken_pass(self) -> None:
        """Forget the pass that an exception has ended, at the start of the next one."""
        self._norms.add_to(self.sums, times=-1)
        self.passes -= 1
        self.last_pass = [min(last, self.passes) for last in self.last_pass]
        self.is_broken_off = False

    def close(self) -> None:
        """Remove the hooks. Gradients are not seen afterwards."""
        self._finalizer()

    @property
    def is_closed(self) -> bool:
        """Whether the hooks were removed."""
        return not self._finalizer.alive

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
        task, is_final = backward.current_task(), True
        if task != self._pass_task:  # hardly ever: this runs once for every parameter in every pass
            if task not in (self._nested_task, self._ignored_task, self._part_task):
                is_final = self._enter(task, index)
            if task == self._ignored_task:
                return
        wanted, is_part = self._wanted[index], task == self._part_task
        if self.has_more_parts is not None:
            is_part = is_part or self.has_more_parts(self.parameters[index])
        if wanted and not is_part and self.last_pass[index] == self.passes:
            raise UnsupportedError(
                f'LENA: the gradient of "{self.names[index]}" came in several parts within one backward pass, so the '
                "norm of the whole cannot be measured. This happens to a weight that is shared by segments under "
                "reentrant activation checkpointing. Use checkpointing with use_reentrant=False (HF: "
                'gradient_checkpointing_kwargs={"use_reentrant": false}), or exclude this weight from LENA.'
            )
        if not is_part:
            self.last_pass[index] = self.passes
        if not wanted:
            return
        action = self._keep if is_part else self._measure
        if is_final:
            action(index, gradient)
        else:
            backward.before_accumulation(self.parameters[index], functools.partial(action, index))

    def _keep(self, index: int, gradient: Tensor) -> None:
        """Add a part to those of the same micro-gradient, until its pass comes."""
        part = self._parts.get(index)
        self._parts[index] = gradient.detach().clone() if part is None else part.add_(gradient.detach())

    def _measure(self, index: int, gradient: Tensor) -> None:
        gradient = gradient.detach() if gradient.requires_grad else gradient
        if self._parts:
            part = self._parts.pop(index, None)
            gradient = gradient if part is None else gradient + part
        if self._shared is not None:
            self._write(self._shared.add(index, gradient))
            return
        join = self._joins[index]
        if join is None:
            self._norms.collect(index, gradient, self.unchanged_up_to)
            return
        whole = join(gradient)
        if whole is not None:
            self._norms.write(index, whole)

    def _write(self, gradients: Iterable[tuple[int, Tensor]]) -> None:
        for index, whole in gradients:
            self._norms.write(index, whole)

    def _enter(self, task: int, index: int) -> bool:
        """Classify a new graph task: a new backward pass, a part of the running pass or of the next, or no pass at all.

        Returns whether the gradient of parameter `index` is as autograd will add it. It is not if the user has hooked
        the parameter after us.
        """
        if backward.is_compiled():
            raise UnsupportedError(
                "LENA does not support compiled autograd. Leave out compiled_autograd_enabled=True of engine.compile() "
                "or torch._dynamo.config.compiled_autograd. Without it torch.compile and engine.compile() are "
                "supported, and compile the model's backward pass, too."
            )
        # torch.autograd.grad runs tensor hooks too, but accumulates nothing: its gradients are no micro-gradients.
        if not backward.accumulates(self.parameters[index]):
            self._ignored_task = task
            return True
        if self._end is not None and self._end() is not None:
            self._nested_task = task
            return True
        place = backward.inside_function()
        if place == "backward":
            raise UnsupportedError(
                f'LENA: the first gradient of a backward pass, of "{self.names[index]}", came from within reentrant '
                "activation checkpointing, so passes cannot be counted. Use checkpointing with use_reentrant=False, "
                "or keep the last layer outside the checkpointed segment."
            )
        if not self._has_begun:
            self._begin()
        if place == "forward":
            if self.before_part is not None:
                self.before_part()
            self._part_task, self._has_begun = task, True
            return index not in self._come_last()
        self._pass_task, self._has_begun = task, False
        self.passes += 1
        self.passes_of_run += 1
        self._norms.clear()
        end = functools.partial(GradientHooks._leave, self)
        backward.when_task_ends(end)
        self._end = weakref.ref(end)  # autograd holds the action as long as the pass runs
        return index not in self._come_last()

    def _begin(self) -> None:
        """Before the first gradient of a micro-batch."""
        self.is_broken_off, self._end = self._end is not None, None
        if self.is_broken_off and self._shared is not None:
            self._write(self._shared.complete())
        if self.is_broken_off and self.passes:
            self._norms.add_to(self.sums)
        if self.before_pass is not None:
            self.before_pass()
        if self.passes == 0:
            self._refuse_changers()

    def _refuse_changers(self) -> None:
        for name, parameter in zip(self.names, self.parameters, strict=True):
            hook = backward.changer(parameter)
            if hook is not None:
                raise UnsupportedError(
                    f'LENA: "{name}" has a hook by register_post_accumulate_grad_hook(): '
                    f"{getattr(hook, '__qualname__', hook)}. It may change the gradient after LENA has measured it. "
                    "Use register_hook(): LENA sees what it changes."
                )

    def _come_last(self) -> list[int]:
        """Move our hooks behind those that may change a gradient. Returns the parameters where one was behind ours."""
        followed = backward.followed(self.parameters, self._handles)
        for i in followed:
            self._handles[i].remove()
            self._handles[i] = _hook(self, i)
        return followed

    def _leave(self) -> None:
        for index in list(self._parts):  # reached by no other part of this pass
            self.last_pass[index] = self.passes
            self._measure(index, self._parts.pop(index))
        if self._shared is not None:
            self._write(self._shared.complete())
        self._end = None
        self._norms.add_to(self.sums)
        if self.after_pass is not None:
            self.after_pass()


def _hook(hooks: GradientHooks, index: int) -> torch.utils.hooks.RemovableHandle:
    """Hook one parameter. The hook refers to `hooks` weakly, so that Python can free a dropped optimizer."""
    reference = weakref.ref(hooks)

    def hook(gradient: Tensor) -> None:
        alive = reference()
        if alive is not None:
            alive._see(index, gradient)

    return hooks.parameters[index].register_hook(backward.mark(hook))


def _remove(handles: list[torch.utils.hooks.RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
