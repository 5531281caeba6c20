"""The probe sees every micro-gradient on this rank, before any reduction, and adds up squared norms.

A tensor hook on each parameter is called by autograd with the full gradient of one backward pass, whatever DDP or ZeRO
does with it afterwards. The probe also counts the backward passes, since n is counted and not read from a config.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from types import FrameType

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from .errors import StateError, UnsupportedError
from .norms import SquaredNorms

_NO_TASK = -2  # autograd's own answer outside of backward is -1


class Probe:
    """Squared norms of the micro-gradients of `parameters`, summed over the backward passes of a window.

    `sums` (P,) float64: sum over this window's backward passes of the squared norms, by parameter; 0 for parameters
    that are watched for their presence only.
    `passes`: backward passes of this window. `last_pass[i]`: the last pass that reached parameter i, 0 for none.
    `before_pass()`, `after_pass()`: called, where set, around every pass.
    """

    def __init__(self, parameters: Sequence[Tensor], names: Sequence[str]) -> None:
        self.parameters = list(parameters)
        self.names = list(names)
        self.passes = 0
        self.last_pass = [0] * len(self.parameters)
        self.before_pass: Callable[[], None] | None = None
        self.after_pass: Callable[[], None] | None = None
        self._in_pass = False
        self._pass_task = self._nested_task = self._ignored_task = _NO_TASK
        self.measure([True] * len(self.parameters))
        self._handles = [_watch(self, i) for i, parameter in enumerate(self.parameters)]
        self._finalizer = weakref.finalize(self, _remove, self._handles)

    def measure(self, wanted: Sequence[bool]) -> None:
        """Say for which parameters norms are wanted. Starts a new window, on the device where the parameters are."""
        self._wanted = list(wanted)
        self._norms = self.new_norms()
        self.sums = self._norms.read()
        self.clear()

    def new_norms(self) -> SquaredNorms:
        """Room for one squared norm of each parameter, on their device."""
        first = self.parameters[0].device if self.parameters else torch.device("cpu")
        double = any(parameter.dtype == torch.float64 for parameter in self.parameters)
        return SquaredNorms(len(self.parameters), torch.float64 if double else torch.float32, first)

    def clear(self) -> None:
        """Forget the window: its sums, its passes, and who was reached."""
        self.sums.zero_()
        self.passes = 0
        self.last_pass = [0] * len(self.parameters)
        self._in_pass = False

    def close(self) -> None:
        """Take the hooks off. The probe sees nothing afterwards."""
        self._finalizer()

    def _see(self, index: int, gradient: Tensor) -> None:
        task = torch._C._current_graph_task_id()
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
            self._norms.write(index, gradient.detach() if gradient.requires_grad else gradient)

    def _enter(self, task: int, index: int) -> None:
        """A graph task that was not seen before: a new backward pass, a part of the present one, or none at all."""
        if _inside_function_backward(sys._getframe(1)):
            if self._in_pass:
                self._nested_task = task
                return
            raise UnsupportedError(
                f'LENA: the first gradient of a backward pass, of "{self.names[index]}", came from within reentrant '
                "activation checkpointing, so passes cannot be counted. Use checkpointing with use_reentrant=False, "
                "or keep the last layer outside the checkpointed segment."
            )
        # torch.autograd.grad also runs tensor hooks, but accumulates nothing: it is no micro-gradient.
        if not _accumulates(self.parameters[index]):
            self._ignored_task = task
            return
        self._pass_task = task
        if self.before_pass is not None:
            self.before_pass()
        self.passes += 1
        self._in_pass = True
        self._norms.clear()
        torch.autograd.Variable._execution_engine.queue_callback(self._leave)

    def _leave(self) -> None:
        self._in_pass = False
        self.sums.add_(self._norms.read())
        if self.after_pass is not None:
            self.after_pass()

    def unreached(self) -> list[int]:
        """Indices of the parameters that no pass of this window has reached so far."""
        return [i for i, last in enumerate(self.last_pass) if last == 0]

    def require_passes(self) -> None:
        """Raise `StateError` if no backward pass was seen in this window."""
        if self.passes == 0:
            raise StateError(
                "LENA: step() was called with gradients, but no backward pass was seen since the last step, so the "
                "gradients were not made by backward() on this optimizer's parameters. LENA has to see each "
                "micro-gradient: construct it before backward(), and do not fill in .grad by hand."
            )


def _watch(probe: Probe, index: int) -> torch.utils.hooks.RemovableHandle:
    """Hook one parameter; the hook holds the probe weakly, so that a dropped optimizer is really gone."""
    reference = weakref.ref(probe)

    def hook(gradient: Tensor) -> None:
        alive = reference()
        if alive is not None:
            alive._see(index, gradient)

    return probe.parameters[index].register_hook(hook)


def _remove(handles: list[torch.utils.hooks.RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _accumulates(parameter: Tensor) -> bool:
    """Whether the running graph task will add to `parameter.grad` (and is not a torch.autograd.grad call)."""
    node = torch.autograd.graph.get_gradient_edge(parameter).node
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch's answer for a leaf whose gradient torch.autograd.grad returns
        return False


def _inside_function_backward(frame: FrameType | None) -> bool:
    """Whether we are called from within the backward of a Python autograd function, as reentrant checkpointing does."""
    while frame is not None:
        if frame.f_code is BackwardCFunction.apply.__code__:
            return True
        frame = frame.f_back
    return False
