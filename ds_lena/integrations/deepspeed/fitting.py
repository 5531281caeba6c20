"""What DeepSpeed itself takes from the files of a checkpoint: whether that is there, and fits the engine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import StateError
from ...saved_files import Files
from ._internals import saved
from ._internals.engine import Asked, EngineView
from ._internals.saved import reading

_WAY_OUT = "Restore it, or load an earlier checkpoint."
COUNTS = ("global_steps", "skipped_steps", "global_samples")
"""What an engine counts, in its model file."""


def require_engine_state(path: Path, model: Mapping[str, Any], view: EngineView, asked: Asked) -> None:
    """Raise `StateError` if a model file lacks what an engine takes from it for itself: its counts, its scheduler."""
    for key in (*COUNTS, "mp_world_size"):
        value = model.get(key, 0 if key == "global_samples" else None)  # older files do not have it
        # With sequence parallelism the samples are no whole number.
        is_count = type(value) is int or (type(value) is float and key == "global_samples")
        if not is_count or not 0 <= value < 1 << 63:
            raise StateError(f'LENA: {path} is damaged: "{key}" is {value!r:.80}. {_WAY_OUT}')
    if not asked.wants_schedule or view.scheduler is None:
        return
    before = model.get("lr_scheduler")
    if not isinstance(before, Mapping):
        raise StateError(
            f"LENA: {path} was saved without a learning-rate scheduler, and this engine has one. Give load_checkpoint "
            "load_lr_scheduler_states=False: the scheduler stays where it is."
        )
    for key, now in view.scheduler.state_dict().items():
        if key not in before:
            raise StateError(
                f'LENA: the learning-rate scheduler in {path} is another one: it has no "{key}". Give load_checkpoint '
                "load_lr_scheduler_states=False: the scheduler stays where it is."
            )
        if _is_number(now) and not (_is_number(before[key]) and math.isfinite(before[key])):
            raise StateError(f'LENA: {path} is damaged: "{key}" of "lr_scheduler" is {before[key]!r:.80}. {_WAY_OUT}')


def require_wrapper_state(path: Path, shard: saved.Shard, live: saved.Shard) -> None:
    """Raise `StateError` if an optimizer file lacks what a wrapper takes from it for itself, as the loss scale."""
    entries = saved.own_entries(shard)
    for key, now in saved.own_entries(live).items():
        before = entries.get(key, now)  # of another wrapper: it keeps its own
        fits = math.isfinite(before) if _is_number(before) else not _is_number(now)
        if not fits or (before is None) != (now is None) or (key == "clip_grad" and before < 0):
            raise StateError(f'LENA: {path} is damaged: "{key}" is {before!r:.80}. {_WAY_OUT}')


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def module_misfit(
    view: EngineView, folder: Path, files: Files, rank: int, model: Mapping[str, Any], is_strict: bool
) -> str:
    """Why DeepSpeed cannot load the module from a rank's own files just as they are. "" if it can.

    `model`: the content of the rank's model file. `is_strict`: names have to be the same.

    Raises:
        StateError: a file of a layer or of an expert is missing, or cannot be read.
    """
    before = reading(folder, lambda: saved.module_in(view.engine, folder, model))
    now = saved.module_of(view.engine)
    path = files.model_of(rank)
    if is_strict and now.keys() - before.keys():
        return f'{path} lacks "{min(now.keys() - before.keys())}" of this model'
    if is_strict and before.keys() - now.keys():
        return f'{path} holds "{min(before.keys() - now.keys())}", which this model lacks'
    for name in now.keys() & before.keys():
        value = now[name]
        if isinstance(value, Tensor) and getattr(before[name], "shape", None) != value.shape:
            return f'"{name}" in {path} is not of the shape that it has in this model, {tuple(value.shape)}'
    fragments = saved.fragments_in(model)
    for name, size in saved.frozen_sizes(view.engine).items() if fragments is not None else ():
        held = fragments.get(name) if isinstance(fragments, Mapping) else None
        if not isinstance(held, Tensor) or held.numel() != size:
            return f'{path} lacks this rank\'s part of "{name}", which is not trained'
    return ""
