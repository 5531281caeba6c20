"""What autograd does not say in public: which backward pass runs, and what becomes of its gradients.

The only file with private names of autograd. `tests/unit/test_hooks.py` and `test_checkpointing.py` hold it to its
word.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

NO_TASK = -2
"""No graph task at all. Autograd's own answer outside of backward is -1."""


def current_task() -> int:
    """The number of the graph task that runs now: one for each call of backward, nested ones apart."""
    return torch._C._current_graph_task_id()


def when_task_ends(action: Callable[[], None]) -> None:
    """Run `action` at the end of the present graph task, after the callbacks that are queued already."""
    torch.autograd.Variable._execution_engine.queue_callback(action)


def accumulates(parameter: Tensor) -> bool:
    """Whether the running graph task will add to `parameter.grad` (and is not a torch.autograd.grad call)."""
    node = torch.autograd.graph.get_gradient_edge(parameter).node
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch's answer for a leaf whose gradient torch.autograd.grad returns
        return False


def inside_function_backward() -> bool:
    """Whether the caller runs within the backward of a Python autograd function, as reentrant checkpointing does."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is BackwardCFunction.apply.__code__:
            return True
        frame = frame.f_back
    return False
