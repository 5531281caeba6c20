"""AdamW (Loshchilov and Hutter, https://arxiv.org/abs/1711.05101), by torch.optim's functional form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim.adamw import adamw

from .common import Rule, has_fused_kernel


def _buffers(group: Mapping[str, Any]) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq")


def _update(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    buffers: Sequence[Sequence[Tensor]],
    step: Tensor,
    lr: float | Tensor,
    weight_decay: float,
    group: Mapping[str, Any],
) -> None:
    exp_avgs, exp_avg_sqs = buffers
    beta1, beta2 = group["betas"]
    fused = has_fused_kernel(parameters[0])
    adamw(
        list(parameters),
        list(gradients),
        list(exp_avgs),
        list(exp_avg_sqs),
        [],
        [step.clone() for _ in parameters],  # torch advances each of them by one
        foreach=False,
        fused=fused,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=group["eps"],
        maximize=False,
    )


RULE = Rule(group_keys=("betas", "eps"), buffers=_buffers, update=_update)
