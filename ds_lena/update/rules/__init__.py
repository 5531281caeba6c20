"""Base rules: how a piece moves once its learning rate is known. Each rule has a file, and a line in `keys.BASES`."""

from __future__ import annotations

from importlib import import_module

from ...keys import BASES
from .common import Rule, Trust

RULES: dict[str, Rule] = {name: import_module(f".{name}", __name__).RULE for name in BASES}

__all__ = ["RULES", "Rule", "Trust"]
