"""Muon (torch's) on the matrices between embeddings and head; and an experiment, LENA's factors on top of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Muon, Optimizer

import ds_lena

Named = dict[str, nn.Parameter]


def split(model: nn.Module) -> tuple[Named, Named]:
    """Muon's parameters and the others, by name: matrices which belong neither to an embedding nor to the head."""
    ends = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    outside = {id(parameter) for module in (*ends, model.get_output_embeddings()) for parameter in module.parameters()}
    named = dict(model.named_parameters())
    hidden = {name: p for name, p in sorted(named.items()) if p.ndim == 2 and id(p) not in outside}
    return hidden, {name: p for name, p in named.items() if name not in hidden}


def build(hidden: Named, settings: Mapping[str, Any]) -> Muon:
    """A group for each matrix, with its `name`; steps as large as AdamW's, so that one decay does for both."""
    groups = [{"params": [parameter], "name": name} for name, parameter in hidden.items()]
    return Muon(groups, lr=settings["muon_lr"], weight_decay=settings["weight_decay"], adjust_lr_fn="match_rms_adamw")


def scale(muon: Muon, lena: ds_lena.LENA) -> None:
    """Multiply Muon's learning rates by LENA's factors, tensor by tensor, whenever it steps; LENA has to step first.

    An experiment: in one process, and with one transfer to the host in every update.
    """

    def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layers = ds_lena.report(lena)["layers"]
        for group in optimizer.param_groups:
            group["lr"] *= layers[group["name"]]["factor"]

    muon.register_step_pre_hook(hook)
