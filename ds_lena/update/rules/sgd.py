"""SGD with momentum, as torch.optim.SGD: d = g + weight_decay w, v = momentum v + d, w -= lr v.

With nesterov, w -= lr (d + momentum v).
The learning rate, which contains the layer's factor, is outside the momentum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from .common import Group, Kernel, Rule, has_fused_kernel


def buffers(group: Group) -> tuple[str, ...]:
    """The momentum, where there is one."""
    return ("momentum_buffer",) if group["momentum"] else ()


def _move(
    parameters: list[Tensor],
    gradients: list[Tensor],
    buffers: Sequence[list[Tensor]],
    step: Tensor,
    lr: float | Tensor,
    weight_decay: float,
    group: Group,
) -> None:
    if has_fused_kernel(parameters[0]) and not _kernel_is_wrong(parameters[0]):
        torch._fused_sgd_(
            parameters,
            gradients,
            buffers[0] if buffers else [],
            weight_decay=weight_decay,
            momentum=group["momentum"],
            lr=lr,
            dampening=0.0,
            nesterov=group["nesterov"],
            maximize=False,
            is_first_step=False,  # the momentum starts as zeros, which gives the same result
        )
        return
    sgd(
        parameters,
        gradients,
        [*buffers[0]] if buffers else [None] * len(parameters),
        has_sparse_grad=False,
        foreach=False,
        fused=False,
        weight_decay=weight_decay,
        momentum=group["momentum"],
        lr=lr,  # type: ignore[arg-type]  # a tensor works as well
        dampening=0.0,
        nesterov=group["nesterov"],
        maximize=False,
    )


def _kernel_is_wrong(parameter: Tensor) -> bool:
    """torch's fused SGD on the CPU gives wrong results for bfloat16 (seen with 2.13.0; `test_rules.py` tests it)."""
    return parameter.device.type == "cpu" and parameter.dtype == torch.bfloat16


def _numbers(group: Group) -> Mapping[str, Any]:
    return {"momentum": group["momentum"], "HAS_MOMENTUM": bool(group["momentum"]), "NESTEROV": group["nesterov"]}


RULE = Rule(buffers=buffers, move=_move, kernel=Kernel("sgd", _numbers))
