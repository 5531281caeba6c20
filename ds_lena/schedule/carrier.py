"""Carries LENA's part of a checkpoint through torch.distributed.checkpoint, as text in the parameter groups.

`get_optimizer_state_dict` and `set_optimizer_state_dict` keep "state" and "param_groups" of a `state_dict()` and drop
every other entry. Flattened, they keep those entries of a group that a live group has, too.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable
from typing import Any

ENTRY = "lena_state"
"""The entry of a parameter group. In a live group it is None, and of no use."""


def fill(groups: Iterable[dict[str, Any]], state: dict[str, Any]) -> None:
    """Put LENA's state into saved groups (modified in place)."""
    text = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    for group in groups:
        group[ENTRY] = text


def empty(groups: Iterable[dict[str, Any]], is_managed: bool) -> None:
    """Make live groups ready to be saved, or clear what was loaded (modified in place). An engine needs no entry."""
    for group in groups:
        group.pop(ENTRY, None)
        if not is_managed:
            group[ENTRY] = None


def own_state(state_dict: dict[str, Any]) -> dict[str, Any] | None:
    """LENA's part of a `state_dict()`, or of what torch.distributed.checkpoint left of one; None if there is none."""
    if state_dict.get("lena") is not None:
        return state_dict["lena"]
    groups = state_dict.get("param_groups")
    texts = (group.get(ENTRY) for group in (groups if isinstance(groups, list) else ()) if isinstance(group, dict))
    return next((json.loads(zlib.decompress(base64.b64decode(text))) for text in texts if text), None)
