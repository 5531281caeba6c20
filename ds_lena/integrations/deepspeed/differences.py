"""What differs between a checkpoint and the run that loads it, and does not stop it: it is said."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...errors import StateError
from ._internals.saved import Shard

logger = logging.getLogger("ds_lena")


def require_same_groups(folder: Path, saved: Shard, live: Shard) -> None:
    """Raise `StateError` if there is another number of parameter groups: nobody knows which is which."""
    before, now = len(saved.inner["param_groups"]), len(live.inner["param_groups"])
    if before != now:
        raise StateError(
            f"LENA: {folder} was saved with {before} parameter groups, and this optimizer has {now}. Make the groups "
            "as in the saved run."
        )


def tell_of_moved(new: Mapping[str, int], old: Mapping[str, int]) -> None:
    """Say which parameters are in another group now. `new`, `old`: the number of the group by name."""
    moved = [name for name, group in new.items() if old.get(name, group) != group]
    if moved:
        logger.warning(
            'LENA: %d parameter(s) are in another parameter group than in the checkpoint, "%s" in %d instead of %d. '
            "They go on with the learning rate and the other keys of the group that they are in now.",
            len(moved),
            moved[0],
            new[moved[0]],
            old[moved[0]],
        )


def tell_of_keys(names: Iterable[str], saved: Shard, live: Shard) -> None:
    """Say which of these hyperparameters the checkpoint replaces, and how to have the run's own."""
    groups = zip(saved.inner["param_groups"], live.inner["param_groups"], strict=False)
    told = [
        f'"{key}" of group {number}: {old[key]!r} instead of {new[key]!r}'
        for number, (old, new) in enumerate(groups)
        for key in names
        if key in old and _plain(old[key]) != _plain(new[key])
    ]
    before, now = saved.outer.get("clip_grad"), live.outer.get("clip_grad")
    if None not in (before, now) and before != now:
        told.append(f'"gradient_clipping": {before} instead of {now}')
    if told:
        logger.warning(
            "LENA: the checkpoint's hyperparameters replace this run's: %s. To have this run's, set them after "
            "load_checkpoint in engine.optimizer.param_groups (gradient_clipping: engine.optimizer.clip_grad).",
            "; ".join(told),
        )


def tell_of_fresh_start(updates: int) -> None:
    """Say that the optimizer goes on as it is. `updates`: that it has had."""
    logger.warning(
        "LENA: load_optimizer_states=False: the base rule's state, LENA's statistics and its warm-up stay as they are "
        "in this engine (after update %d), while engine.global_steps is the checkpoint's.",
        updates,
    )


def _plain(value: Any) -> Any:
    """A list as a tuple, as betas may be."""
    return tuple(value) if isinstance(value, list) else value
