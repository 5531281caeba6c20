"""One case in plain PyTorch, as one rank sees it; DistributedDataParallel where there are several ranks."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ds_lena
from tests.helpers.case import SCHEDULES, Case
from tests.helpers.groups import case_groups, stock_optimizer
from tests.helpers.model import build


def run(case: Case) -> dict[str, Any]:
    """The reports after every update and the weights at the end."""
    model = build(case.model, torch.float32).to(case.device)
    wrapped: nn.Module = model
    if case.world > 1:
        unused = case.model.spare or case.usage != "always"
        wrapped = DistributedDataParallel(model, find_unused_parameters=unused, **case.config)
    if case.optimizer == "watched":
        optimizer = stock_optimizer(case, [p for p in model.parameters() if p.requires_grad])
        ds_lena.watch(wrapped, optimizer, layer=case.layer, smoothing=case.keys.get("smoothing"))
    else:
        optimizer = ds_lena.LENA(_parameters(case, model, wrapped), **case.keys)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, SCHEDULES[case.schedule])
    reports = []
    for update in range(len(case.plan)):
        _accumulate(case, wrapped, update)
        if case.clipping:
            nn.utils.clip_grad_norm_(model.parameters(), case.clipping)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        report = ds_lena.report(optimizer)
        reports.append(_with_names(report, model) if case.groups == "unnamed" else report)
    params = {name: p.detach().clone().cpu() for name, p in model.named_parameters() if p.requires_grad}
    return {"reports": reports, "params": params}


def _parameters(case: Case, model: nn.Module, wrapped: nn.Module) -> Any:
    if case.groups == "unnamed":
        return [p for p in model.parameters() if p.requires_grad]
    if case.groups == "flat":
        return wrapped.named_parameters()  # as a user would write it: prefixes and frozen parameters included
    return case_groups(case, model)


def _with_names(report: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The report of an optimizer that knows no names: `param_0` is the first parameter it was given."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    layers = {name: report["layers"][f"param_{index}"] for index, name in enumerate(names)}
    return report | {"layers": layers}


def _accumulate(case: Case, wrapped: nn.Module, update: int) -> None:
    window = case.plan[update]
    for micro in range(window.micros):
        wait = case.loop == "no_sync" and micro < window.micros - 1
        with wrapped.no_sync() if wait else nullcontext():
            tokens, sometimes = case.batch(update, dist.get_rank(), micro)
            loss = wrapped(tokens.to(case.device), sometimes)
            if micro not in window.idle:
                (loss / window.micros).backward()
