"""When ZeRO changes its loss scale in fp16."""

from __future__ import annotations

from typing import Any


def change_after_step(wrapper: Any) -> None:
    """Have the wrapper raise its loss scale at the end of `step()`.

    DeepSpeed 0.19.8 raises it before it divides the gradients by it. In that update they would be half of what they
    are.
    """
    step, update_scale = wrapper.step, wrapper._update_scale
    waiting: list[bool] = []

    def update_later(has_overflow: bool = False) -> None:
        if has_overflow:
            update_scale(True)  # that update moves nothing
        else:
            waiting.append(has_overflow)

    def step_first(*args: Any, **kwargs: Any) -> Any:
        waiting.clear()
        result = step(*args, **kwargs)
        for has_overflow in waiting:
            update_scale(has_overflow)
        return result

    wrapper._update_scale, wrapper.step = update_later, step_first
