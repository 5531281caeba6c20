"""What every update rule provides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# torch.optim's fused kernels exist for these devices; elsewhere its single-tensor code is used.
_FUSED_DEVICES = ("cpu", "cuda", "xpu", "mps")


def has_fused_kernel(parameter: Tensor) -> bool:
    """Whether torch has fused optimizer kernels for this tensor's device and type."""
    return parameter.device.type in _FUSED_DEVICES and parameter.is_floating_point()


@dataclass(frozen=True)
class Rule:
    """A base update rule.

    `group_keys`: keys of a parameter group that it reads besides `lr` and `weight_decay`.
    `buffers(group)`: names of its state tensors, each shaped like the parameter and zero at the start.
    `update(parameters, gradients, buffers, step, lr, weight_decay, group)`: moves `parameters` (modified in place, with
    `buffers`, one list per name in the order of `buffers(group)`). `step` is a 0-dim tensor, the updates before this
    one (not modified); `lr` a number or 0-dim tensor that already holds the layer's factor; `weight_decay` a number.
    """

    group_keys: tuple[str, ...]
    buffers: Callable[[Mapping[str, Any]], tuple[str, ...]]
    update: Callable[
        [
            Sequence[Tensor],
            Sequence[Tensor],
            Sequence[Sequence[Tensor]],
            Tensor,
            float | Tensor,
            float,
            Mapping[str, Any],
        ],
        None,
    ]
