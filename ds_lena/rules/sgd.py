"""SGD with momentum, as torch.optim.SGD: d = g + weight_decay w, v = momentum v + d, w -= lr v.

With nesterov, w -= lr (d + momentum v).
The learning rate, with the layer's factor in it, stays outside of the momentum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from .common import Rule, has_fused_kernel


def _buffers(group: Mapping[str, Any]) -> tuple[str, ...]:
    return ("momentum_buffer",) if group["momentum"] else ()


def _update(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    buffers: Sequence[Sequence[Tensor]],
    step: Tensor,
    lr: float | Tensor,
    weight_decay: float,
    group: Mapping[str, Any],
) -> None:
    momenta: list[Tensor | None] = [*buffers[0]] if buffers else [None] * len(parameters)
    sgd(
        list(parameters),
        list(gradients),
        momenta,
        has_sparse_grad=False,
        foreach=False,
        fused=has_fused_kernel(parameters[0]) and not _kernel_is_wrong(parameters[0]),
        weight_decay=weight_decay,
        momentum=group["momentum"],
        lr=lr,  # type: ignore[arg-type]  # a tensor works as well
        dampening=0.0,
        nesterov=group["nesterov"],
        maximize=False,
    )


def _kernel_is_wrong(parameter: Tensor) -> bool:
    """torch's fused SGD on the CPU gives wrong results for bfloat16 (seen with 2.13.0; `test_rules.py` watches it)."""
    return parameter.device.type == "cpu" and parameter.dtype == torch.bfloat16


RULE = Rule(group_keys=("momentum", "nesterov"), buffers=_buffers, update=_update)
