"""`ds_lena.watch`: the noise scale of any training."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from .errors import ConfigError
from .optimizer import LENA, controller_of
from .plain_updates import optimizers_in, watch_plain
from .watch_config import WatchConfig
from .watching import Watch, open_watch


def watch(
    source: Any, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None, **keys: Any
) -> Watch:
    """Measure the gradient noise scale of a training, per layer and of the model, live. The training does not change.

    Args:
        source: a DeepSpeed engine with any optimizer; in plain PyTorch the model, in one process or in
            DistributedDataParallel. All ranks call it, before a window of micro-batches begins.
        optimizer: in plain PyTorch, what moves the model's weights; or several, each of which has one `step()` in an
            update, as Muon for the matrices and AdamW for the rest.
        keys: see docs/noise_scale.md. In DeepSpeed's JSON they are the entry `"noise_scale"`.

    Returns:
        A `Watch`. `watch.report()` and `ds_lena.report(engine)` have the numbers.

    Raises:
        ConfigError: a key or value is not allowed, or it is watched already, with other keys.
        UnsupportedError: it would not be exact, see docs/support.md.
    """
    engines = sys.modules.get("deepspeed.runtime.engine")
    if engines is not None and isinstance(source, engines.DeepSpeedEngine):
        from .integrations.deepspeed.watch import watch_engine

        return watch_engine(source, keys)
    config = WatchConfig.from_keys(keys)
    optimizers = optimizers_in(optimizer)
    if not isinstance(source, torch.nn.Module) or not optimizers:
        raise ConfigError(
            f"ds_lena.watch: got {type(source).__name__} and {type(optimizer).__name__}; allowed is a DeepSpeed "
            "engine, or a model with its torch optimizer, or a list of those that step together: watch(engine), "
            "watch(model, optimizer) or watch(model, [muon, adamw]). For HF Trainer use NoiseScaleCallback of "
            "ds_lena.integrations.transformers, and for Megatron-core's own optimizer "
            "ds_lena.integrations.megatron.watch(optimizer, model_chunks)."
        )
    found = open_watch(optimizers, config)
    if found is not None:
        return found
    first = optimizers[0]
    if isinstance(first, LENA) and len(optimizers) == 1:
        controller_of(first).require_own_keys(config)
        return controller_of(first).shown(config).stays_with(optimizers)
    return watch_plain(source, optimizers, config).stays_with(optimizers)
