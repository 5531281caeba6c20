"""Update rules: how a layer moves once its learning rate is known. One file per rule, one line in `RULES`."""

from __future__ import annotations

from . import adamw, sgd
from .common import Rule

RULES: dict[str, Rule] = {
    "adamw": adamw.RULE,
    "sgd": sgd.RULE,
}

__all__ = ["RULES", "Rule"]
