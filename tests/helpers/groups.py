"""The param groups of a case, for the library under test and for torch's own rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.helpers.case import LR, Case
from tests.helpers.model import named_groups


def case_groups(case: Case, model: nn.Module) -> list[dict[str, Any]]:
    """Param groups of (name, parameter) pairs."""
    if case.groups != "named":
        return [{"params": [(name, p) for name, p in model.named_parameters() if p.requires_grad]}]
    return named_groups(model, LR[case.base])


def parameter_groups(case: Case, model: nn.Module) -> list[Any]:
    """The same groups with bare parameters; "flat" is a plain list of them."""
    groups = [group | {"params": [p for _, p in group["params"]]} for group in case_groups(case, model)]
    if case.has_deepspeed_moe:
        groups = [group | {"name": f"group {number}"} for number, group in enumerate(groups)]
        if case.optimizer != "json":  # for a JSON entry DeepSpeed does it
            from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

            return split_params_into_different_moe_groups_for_optimizer(groups)
    return groups[0]["params"] if case.groups == "flat" else groups


def stock_optimizer(case: Case, groups: list[Any]) -> torch.optim.Optimizer:
    """torch's own rule with the case's hyperparameters."""
    keys = case.keys
    if case.base == "adamw":
        return torch.optim.AdamW(groups, lr=keys["lr"], betas=keys["betas"], eps=keys["eps"])
    return torch.optim.SGD(groups, lr=keys["lr"], momentum=keys["momentum"], nesterov=keys["nesterov"])
