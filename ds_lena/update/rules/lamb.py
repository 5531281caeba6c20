"""LAMB (You et al., https://arxiv.org/abs/1904.00962, Algorithm 2), bias-corrected.

u = m^ / (sqrt(v^) + eps) + weight_decay w, w -= lr ratio u, ratio = coefficient ||w|| / ||u||.
With the ratio inside lr, this is AdamW's update.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...grad_stats.norms import squared_norm
from . import adamw
from .common import Group, Kernel, Rule, Trust


def _add_square_of_update(
    total: Tensor,
    weight: Tensor,
    gradient: Tensor,
    buffers: Sequence[Tensor],
    step: Tensor,
    weight_decay: float,
    group: Group,
) -> None:
    exp_avg, exp_avg_sq = buffers
    beta1, beta2 = group["betas"]
    count = step.double()  # in float32, 1 - beta2 has four digits
    root_correction = (1 - beta2**count).sqrt()
    # u is `scale` times `direction`. Scaling the norm instead of both moments saves two passes over the piece.
    scale = root_correction / (1 - beta1**count)
    root = (exp_avg_sq * beta2).addcmul_(gradient, gradient, value=1 - beta2).sqrt_()
    direction = torch.lerp(exp_avg, gradient, 1 - beta1).div_(root.add_(group["eps"] * root_correction))
    if weight_decay:
        direction.addcmul_(weight, (weight_decay / scale).to(weight.dtype))
    total.add_(squared_norm(direction) * scale.square())


def _ratio(weight_norm: Tensor, update_norm: Tensor, weight_decay: Tensor, coefficient: float) -> Tensor:
    return coefficient * weight_norm / update_norm


RULE = Rule(
    buffers=adamw.buffers,
    move=adamw.move,
    kernel=adamw.RULE.kernel,
    trust=Trust(
        add_square=_add_square_of_update,
        ratio=_ratio,
        coefficient=1.0,
        kernel=Kernel("lamb_norms", adamw.numbers),
    ),
)
