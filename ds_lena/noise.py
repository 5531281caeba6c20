"""`ds_lena.watch`: the noise scale of any training."""

from __future__ import annotations

import sys
from typing import Any

import torch

from .errors import ConfigError
from .optimizer import LENA, controller_of
from .watch_config import WatchConfig
from .watching import Watch, watch_plain


def watch(source: Any, optimizer: torch.optim.Optimizer | None = None, **keys: Any) -> Watch:
    """Measure the gradient noise scale of a training, per layer and of the model, live. The training does not change.

    Args:
        source: a DeepSpeed engine with any optimizer; in plain PyTorch the model, in one process or in
            DistributedDataParallel. All ranks call it, before a window of micro-batches begins.
        optimizer: in plain PyTorch, what moves the model's weights.
        keys: see docs/noise_scale.md. In DeepSpeed's JSON they are the entry `"noise_scale"`.

    Returns:
        A `Watch`. `watch.report()` and `ds_lena.report(engine)` have the numbers.

    Raises:
        ConfigError: a key or value is not allowed.
        UnsupportedError: it would not be exact, see docs/support.md.
    """
    config = WatchConfig.from_keys(keys)
    engines = sys.modules.get("deepspeed.runtime.engine")
    if engines is not None and isinstance(source, engines.DeepSpeedEngine):
        from .integrations.deepspeed.watch import watch_engine

        return watch_engine(source, config)
    if not isinstance(source, torch.nn.Module) or not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"ds_lena.watch: got {type(source).__name__} and {type(optimizer).__name__}; allowed is a DeepSpeed "
            "engine, or a model with its torch optimizer: watch(engine) or watch(model, optimizer). For HF Trainer use "
            "NoiseScaleCallback of ds_lena.integrations.transformers."
        )
    if isinstance(optimizer, LENA):
        controller = controller_of(optimizer)
        found = Watch(config, lambda: controller.schedule)
        controller.after_update.append(found.updated)
        return found
    return watch_plain(source, optimizer, config)
