"""Update rules: how a layer moves once its learning rate is known. One file per rule, one line in `RULES`."""

from __future__ import annotations

from . import adamw, lamb, lars, sgd
from .common import Rule, Trust

RULES: dict[str, Rule] = {
    "adamw": adamw.RULE,
    "sgd": sgd.RULE,
    "lars": lars.RULE,
    "lamb": lamb.RULE,
}

__all__ = ["RULES", "Rule", "Trust"]
