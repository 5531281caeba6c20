"""What autograd does not say in public: which backward pass runs, and whether its gradients are accumulated.

This is the only file with private names of autograd. `tests/unit/test_hooks.py` and
`tests/unit/test_hooks_checkpointing.py` test it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, Function
from torch.autograd.graph import _engine_run_backward
from torch.utils.hooks import RemovableHandle

_FORWARD = Function.apply.__func__.__code__  # type: ignore[attr-defined]
_BACKWARD = BackwardCFunction.apply.__code__
_RUN_BACKWARD = _engine_run_backward.__code__
_MARK = "_ds_lena_looks_only"
NO_TASK = -2
"""No graph task. Outside of backward, autograd itself answers -1."""


current_task: Callable[[], int] = torch._C._current_graph_task_id
"""The number of the running graph task. Each call of backward has its own, a nested call too. (No Python between.)"""


def when_task_ends(action: Callable[[], None]) -> None:
    """Run `action` at the end of the running graph task, after the callbacks that are already queued."""
    torch.autograd.Variable._execution_engine.queue_callback(action)


def accumulates(parameter: Tensor) -> bool:
    """Whether the running graph task adds to `parameter.grad`. A torch.autograd.grad call does not."""
    node = torch.autograd.graph.get_gradient_edge(parameter).node
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch raises it for a leaf whose gradient torch.autograd.grad returns
        return False


def followed(parameters: Iterable[Tensor], handles: Iterable[RemovableHandle]) -> list[int]:
    """Where a hook that may change the gradient comes after the one of `handles`. Marked hooks only look at it."""
    pairs = enumerate(zip(parameters, handles, strict=True))
    return [i for i, (p, own) in pairs if p._backward_hooks and _is_followed(p._backward_hooks, own.id)]


def _is_followed(hooks: dict[int, Any], own: int) -> bool:
    for number, hook in reversed(hooks.items()):
        if number == own:
            return False
        if not getattr(hook, _MARK, False):
            return True
    return False


def changer(parameter: Tensor) -> Callable[..., object] | None:
    """A hook that runs after the gradient was added, and may change the sum. DeepSpeed's and torch's own do not."""
    for hook in (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values():
        if _package_of(hook) not in ("deepspeed", "torch"):
            return hook
    return None


def _package_of(hook: Callable[..., object]) -> str:
    return (getattr(hook, "__module__", None) or "").partition(".")[0]


def mark(hook: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """Say of a tensor hook that it never changes the gradient. Returns it."""
    setattr(hook, _MARK, True)
    return hook


def is_compiled() -> bool:
    """Whether compiled autograd runs this backward pass. Then passes cannot be told apart."""
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")
    return compiled is not None and compiled.in_compiled_autograd_region


def before_accumulation(parameter: Tensor, action: Callable[[Tensor], None]) -> None:
    """Within a hook of `parameter`: run `action` on its gradient once, after all of its hooks, before it is added."""

    def once(gradients: tuple[Tensor, ...]) -> None:
        handle.remove()
        action(gradients[0])

    handle = torch.autograd.graph.get_gradient_edge(parameter).node.register_prehook(once)


def inside_function() -> Literal["forward", "backward"] | None:
    """Whether the running backward was called within the forward or backward of a Python autograd function.

    Reentrant checkpointing calls it in a backward, and fused losses that save memory in a forward. On a GPU hooks run
    in a thread of autograd's own: then the thread that waits for it is looked at.
    """
    place, calls = _innermost(sys._getframe(1))
    if place is None and not calls:
        for frame in sys._current_frames().values():
            place, calls = _innermost(frame)
            if place is not None and calls:
                return place
        return None
    return place


def _innermost(frame: FrameType | None) -> tuple[Literal["forward", "backward"] | None, bool]:
    """The innermost autograd function of a stack, and whether backward is called within it, or at all."""
    calls = False
    while frame is not None:
        if frame.f_code is _FORWARD:
            return "forward", calls
        if frame.f_code is _BACKWARD:
            return "backward", calls
        calls = calls or frame.f_code is _RUN_BACKWARD
        frame = frame.f_back
    return None, calls
