"""LARS (You, Gitman, Ginsburg, https://arxiv.org/abs/1708.03888, Algorithm 1).

v = momentum v + lr ratio (g + weight_decay w), w -= v, ratio = coefficient ||w|| / (||g|| + weight_decay ||w||).
The learning rate, which contains the layer's factor, is inside the momentum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...grad_stats.norms import squared_norm
from . import sgd
from .common import Group, Kernel, Rule, Trust, blocks


def _move(
    parameters: list[Tensor],
    gradients: list[Tensor],
    buffers: Sequence[list[Tensor]],
    step: Tensor,
    lr: float | Tensor,
    weight_decay: float,
    group: Group,
) -> None:
    for tensors in zip(parameters, gradients, *buffers, strict=True):
        for block in blocks(tensors):
            _move_block(block, lr, weight_decay, group["momentum"])


def _move_block(block: Sequence[Tensor], lr: float | Tensor, weight_decay: float, momentum: float) -> None:
    """Move one block: weights, gradient and, with momentum, velocity (modified in place). It computes in float32 or
    wider.
    """
    wide = torch.promote_types(block[0].dtype, torch.float32)
    weight, gradient, *rest = (tensor.to(wide) for tensor in block)
    velocity = rest[0].mul_(momentum) if rest else torch.zeros_like(weight)
    _add_scaled(velocity, gradient, lr)
    if weight_decay:
        _add_scaled(velocity, weight, lr * weight_decay)
    weight.sub_(velocity)
    if block[0].dtype != wide:
        for narrow, moved in zip((block[0], *block[2:]), (weight, velocity), strict=False):
            narrow.copy_(moved)


def _add_scaled(total: Tensor, addend: Tensor, scale: float | Tensor) -> None:
    if isinstance(scale, Tensor):
        total.addcmul_(addend, scale.to(total.dtype))  # stays on the device
    else:
        total.add_(addend, alpha=scale)


def _add_square_of_gradient(
    total: Tensor,
    weight: Tensor,
    gradient: Tensor,
    buffers: Sequence[Tensor],
    step: Tensor,
    weight_decay: float,
    group: Group,
) -> None:
    total.add_(squared_norm(gradient))


def _ratio(weight_norm: Tensor, gradient_norm: Tensor, weight_decay: Tensor, coefficient: float) -> Tensor:
    return coefficient * weight_norm / (gradient_norm + weight_decay * weight_norm)


def _numbers(group: Group) -> Mapping[str, Any]:
    return {"momentum": group["momentum"], "HAS_MOMENTUM": bool(group["momentum"])}


RULE = Rule(
    buffers=sgd.buffers,
    move=_move,
    kernel=Kernel("lars", _numbers),
    trust=Trust(
        add_square=_add_square_of_gradient,
        ratio=_ratio,
        coefficient=1e-3,
        kernel=Kernel("lars_norms", _numbers),
    ),
)
