"""AdamW (Loshchilov and Hutter, https://arxiv.org/abs/1711.05101), as torch.optim.AdamW."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .common import Group, Kernel, Rule, has_fused_kernel


def buffers(group: Group) -> tuple[str, ...]:
    """The two moments."""
    return ("exp_avg", "exp_avg_sq")


def move(
    parameters: list[Tensor],
    gradients: list[Tensor],
    buffers: Sequence[list[Tensor]],
    step: Tensor,
    lr: float | Tensor,
    weight_decay: float,
    group: Group,
) -> None:
    """See `common.Rule`. w -= lr (m^ / (sqrt(v^) + eps) + weight_decay w), with bias-corrected moments m^ and v^."""
    exp_avgs, exp_avg_sqs = buffers
    beta1, beta2 = group["betas"]
    if has_fused_kernel(parameters[0]):
        # This is the kernel itself. torch.optim's function around it takes six times as long for a small tensor.
        torch._fused_adamw_(
            parameters,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            [],
            [step] * len(parameters),
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        return
    adamw(
        parameters,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        [],
        [step - 1 for _ in parameters],  # torch adds one to each
        foreach=False,
        fused=False,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=group["eps"],
        maximize=False,
    )


def numbers(group: Group) -> Mapping[str, float]:
    """What the kernels get of a group. Differences from 1 and logarithms keep their digits in float32."""
    found = {"eps": group["eps"]}
    for i, beta in enumerate(group["betas"], start=1):
        found |= {f"beta{i}": beta, f"rest{i}": 1 - beta, f"log_beta{i}": math.log(beta) if beta else -math.inf}
    return found


RULE = Rule(buffers=buffers, move=move, kernel=Kernel("adamw", numbers))
