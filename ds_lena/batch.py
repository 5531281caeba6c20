"""`ds_lena.grow`: a batch that follows the noise scale."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from .errors import ConfigError, StateError
from .grad_stats.reduce import world_size
from .growing import Growing, require_growth
from .growth import BatchGrowth
from .noise import watch
from .optimizer import LENA, controller_of
from .plain_updates import around_updates, optimizers_in, refuse_closure
from .reporting import find_watch
from .sample_schedules import SampleSchedule


def grow(
    source: Any,
    growth: BatchGrowth,
    schedule: SampleSchedule | None = None,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    **keys: Any,
) -> Growing:
    """Let the batch of a training follow its noise scale, with any optimizer. It is the same on all ranks.

    Under DeepSpeed the engine's accumulation is set after an update, for the next one. In plain PyTorch the loop takes
    `growing.accumulation` micro-batches for each update. HF Trainer has `BatchGrowthCallback` in
    `ds_lena.integrations.transformers_growth`.

    Args:
        source: a DeepSpeed engine, or in plain PyTorch the model. All ranks call it, before the first update.
        growth: how it grows.
        schedule: sets the learning rate from the samples seen. None leaves it as it is.
        optimizer: in plain PyTorch, what moves the model's weights; see `ds_lena.watch`.
        keys: those of `ds_lena.watch`. Not needed if it is watched already.

    Returns:
        A `Growing`. `growing.samples` is the clock of the run: end it by a budget of samples.

    Raises:
        ConfigError: a key or value is not allowed, or there is a scheduler that counts updates.
        UnsupportedError: the noise scale would not be exact, see docs/support.md.
        StateError: this batch grows already.
    """
    engines = sys.modules.get("deepspeed.runtime.engine")
    if engines is not None and isinstance(source, engines.DeepSpeedEngine):
        from .integrations.deepspeed.growth import grow_engine

        return grow_engine(source, growth, schedule, keys)
    require_growth(growth, schedule)
    optimizers = optimizers_in(optimizer)
    if any(hasattr(one, "ds_lena_growing") for one in optimizers):
        raise StateError("ds_lena.grow: the batch of this optimizer grows already: optimizer.ds_lena_growing has it.")
    known = find_watch(optimizers[0]) if optimizers else None
    watching = watch(source, optimizer, **keys)
    meter, size = watching.meter, watching.config.micro_batch_size
    if watching.watcher is None:
        size = size or controller_of(optimizers[0]).config.micro_batch_size
    try:
        growing = Growing(growth, schedule, watching, world_size(meter.binding.group), size)
    except ConfigError:
        if watching is not known:
            watching.close()
        raise
    for lena in (one for one in optimizers if isinstance(one, LENA)):
        controller_of(lena).grows_from(lambda: growing.first_n)

    def set_lr() -> None:
        growing.set_lr([group for one in optimizers for group in one.param_groups])

    set_lr()
    growing.after_load = set_lr
    is_update = False

    def before() -> None:
        nonlocal is_update
        ranks = world_size(meter.binding.group)
        if ranks != growing.replicas:
            raise StateError(
                f"ds_lena.grow: there are {ranks} ranks now, and there were {growing.replicas} when grow() was called. "
                "Call grow() after torch.distributed.init_process_group()."
            )
        is_update = meter.hooks.passes > 0
        growing.saw(meter.hooks.passes)

    def after() -> None:
        if is_update:
            growing.decide()
            set_lr()

    def require_counted(_: Any, args: Sequence[Any], keys: dict[str, Any]) -> None:
        growing.require_open()
        refuse_closure("ds_lena.grow", args, keys)

    for one in optimizers:
        one.register_step_pre_hook(require_counted)
    # The hooks of the watch were registered before: they run before these, and a step that ends clears its passes.
    around_updates(optimizers, meter, before, after)
    for one in optimizers:
        one.ds_lena_growing = growing
    return growing
