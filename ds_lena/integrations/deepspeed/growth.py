"""A batch that grows in an engine: set at the end of an update, for the next one."""

from __future__ import annotations

import logging
from typing import Any

from ...errors import ConfigError, StateError
from ...growing import Growing, require_growth
from ...growth import BatchGrowth, from_keys
from ...optimizer import LENA, controller_of
from ...reporting import find_watch
from ...sample_schedules import SampleSchedule
from .. import _transformers_internals as hf
from ._internals.engine import EngineView
from .exchange import require_same_keys, together
from .watch import require_between_updates, watch_engine

logger = logging.getLogger("ds_lena")

ENTRY = "batch_growth"
"""The entry of DeepSpeed's JSON: the keys of `BatchGrowth`, and `schedule` with those of `SampleSchedule`."""

_IN_CHECKPOINTS = "ds_lena_growth"


def grow_by_entry(engine: Any, entry: Any) -> None:
    """Let the batch of an engine grow as an entry of its JSON says."""
    if not isinstance(entry, dict):
        raise ConfigError(
            f'ds_lena.grow: the entry "{ENTRY}": {entry!r} is not allowed; allowed is an object of keys, as '
            f'"{ENTRY}": {{"factor": 1, "smallest": 2, "largest": 128}}.'
        )
    if hf.planned_updates(EngineView(engine).config) is not None:
        raise ConfigError(
            f'ds_lena.grow: the entry "{ENTRY}" in the configuration of HF Trainer, which counts its micro-batches '
            "itself. Take it out, and use BatchGrowthCallback of ds_lena.integrations.transformers_growth."
        )
    keys = dict(entry)
    schedule = keys.pop("schedule", None)
    growth = BatchGrowth.from_keys(keys)
    grow_engine(engine, growth, None if schedule is None else from_keys(SampleSchedule, schedule), {})


def grow_engine(
    engine: Any, growth: BatchGrowth, schedule: SampleSchedule | None, watch_keys: dict[str, Any]
) -> Growing:
    """Let the batch of an engine grow. All its ranks call it, between two updates.

    Raises:
        ConfigError: a key is not allowed or not the same on all ranks, or the engine has a scheduler.
        StateError: the batch of this engine grows already.
        UnsupportedError: a feature is in use under which the noise scale would not be exact.
    """
    view = EngineView(engine)
    if getattr(engine, "ds_lena_growing", None) is not None:
        raise StateError("ds_lena.grow: the batch of this engine grows already: engine.ds_lena_growing has it.")
    require_no_scheduler(view)

    def check() -> None:
        require_growth(growth, schedule)
        require_between_updates(view, "ds_lena.grow")

    together(view.grid.everything, check)
    before = find_watch(engine)
    watch = watch_engine(engine, watch_keys)

    def make() -> Growing:
        require_same_keys(view.grid.everything, vars(growth) | {"schedule": schedule})
        return Growing(growth, schedule, watch, view.grid.replicas, view.micro_batch_size())

    try:
        growing = together(view.grid.everything, make)
    except ConfigError:
        if watch is not before:
            watch.close()
        raise
    _set(view, growing)
    growing.set_lr(view.optimizer.param_groups)
    if isinstance(view.optimizer, LENA):
        controller_of(view.optimizer).grows_from(lambda: growing.first_n)
    is_due = is_told = False

    def before_step() -> None:
        nonlocal is_told
        growing.require_open()
        growing.saw(watch.meter.hooks.passes)
        if watch.meter.hooks.passes not in (0, growing.accumulation) and not is_told:
            is_told = True
            logger.warning(
                "ds_lena.grow: an update has had %d micro-batches on this rank, where %d were set, and DeepSpeed "
                "divides by %d. Something else decides where an update ends: accelerate, or "
                "set_gradient_accumulation_boundary(). Let the engine decide, or have it end at growing.accumulation.",
                watch.meter.hooks.passes,
                growing.accumulation,
                growing.accumulation,
            )

    def after(applied: bool) -> None:
        nonlocal is_due
        is_due = applied and growing.decide()
        growing.set_lr(view.optimizer.param_groups)

    def at_end() -> None:
        nonlocal is_due
        if is_due:
            is_due = False
            _set(view, growing)

    def load(state: dict[str, Any] | None) -> None:
        if state is None:
            logger.warning(
                "ds_lena.grow: this checkpoint was saved without a growing batch. The batch starts at %d "
                "micro-batches, and the count of samples at 0.",
                growing.n,
            )
            return
        growing.load_state_dict(state)

    def after_load() -> None:
        _set(view, growing)
        growing.set_lr(view.optimizer.param_groups)

    growing.after_load = after_load
    view.around_model_step(before_step, after)
    view.after_step(at_end)
    view.in_checkpoints(_IN_CHECKPOINTS, growing.state_dict, load)
    engine.ds_lena_growing = growing
    return growing


def require_no_scheduler(view: EngineView) -> None:
    """Raise `ConfigError` if the engine has a scheduler, which counts updates."""
    scheduler = view.scheduler
    if scheduler is not None:
        raise ConfigError(
            f"ds_lena.grow: this engine has a learning-rate scheduler, {type(scheduler).__name__}. It counts updates, "
            "and a batch that grows makes fewer of them, so the learning rate would fall too late. Leave the scheduler "
            'out, and give grow() a schedule in samples: schedule=ds_lena.cosine(total=…), or "schedule" in the entry '
            f'"{ENTRY}".'
        )


def _set(view: EngineView, growing: Growing) -> None:
    view.set_accumulation(growing.accumulation)
    logger.info("ds_lena.grow: %s.", growing.report()["advice"])
