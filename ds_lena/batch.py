"""`ds_lena.grow`: a batch that follows the noise scale."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from .errors import ConfigError
from .grad_stats.reduce import world_size
from .growing import Growing
from .growth import BatchGrowth
from .noise import watch
from .optimizer import controller_of
from .plain_updates import around_updates, optimizers_in
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
    if not isinstance(growth, BatchGrowth) or not (schedule is None or isinstance(schedule, SampleSchedule)):
        raise ConfigError(
            f"ds_lena.grow: got {growth!r} and schedule={schedule!r}; allowed is a BatchGrowth, and a SampleSchedule "
            "as ds_lena.cosine(total=…), or None."
        )
    engines = sys.modules.get("deepspeed.runtime.engine")
    if engines is not None and isinstance(source, engines.DeepSpeedEngine):
        from .integrations.deepspeed.growth import grow_engine

        return grow_engine(source, growth, schedule, keys)
    optimizers = optimizers_in(optimizer)
    found = find_watch(optimizers[0]) if optimizers else None
    watching = found if found is not None and not found.is_closed and not keys else watch(source, optimizer, **keys)
    meter, size = watching.meter, watching.config.micro_batch_size
    if watching.watcher is None:
        size = size or controller_of(optimizers[0]).config.micro_batch_size
    growing = Growing(growth, schedule, watching, world_size(meter.binding.group), size)

    def set_lr() -> None:
        growing.set_lr([group for one in optimizers for group in one.param_groups])

    set_lr()
    is_update = False

    def before() -> None:
        nonlocal is_update
        is_update = meter.hooks.passes > 0
        growing.saw(meter.hooks.passes)

    def after() -> None:
        if is_update:
            growing.decide()
            set_lr()

    # The hooks of the watch were registered before: they run before these, and a step that ends clears its passes.
    around_updates(optimizers, meter, before, after)
    return growing
