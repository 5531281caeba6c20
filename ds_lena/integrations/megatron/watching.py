"""Watches Megatron's own optimizer, whatever runs inside it. Nothing of the training changes."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from ...optimizer import LENA, controller_of
from ...parameters import require_supported
from ...watch_config import WatchConfig
from ...watching import Watch, Watcher, open_watch
from ..deepspeed.exchange import require_same_keys, together
from . import _internals
from .bind import check_micro_batch_size, megatron_binding, trained_parameters
from .refused import refuse_unsupported
from .window import Window

WHO = "ds_lena.watch"


def watch_optimizer(optimizer: Any, chunks: Sequence[Any], keys: Mapping[str, Any]) -> Watch:
    """Watch Megatron's optimizer. All ranks call it, between two updates. See `watch` of this package."""
    everything = _internals.all_ranks()
    wrapper, config, found = together(everything, functools.partial(_find, optimizer, chunks, keys))
    if found is not None:
        return found
    inner = wrapper.optimizer
    is_lena = isinstance(inner, LENA)
    watch = controller_of(inner).shown(config) if is_lena else _watch(wrapper, chunks[0], config)
    return watch.stays_with([inner])


def _find(optimizer: Any, chunks: Sequence[Any], keys: Mapping[str, Any]) -> tuple[Any, WatchConfig, Watch | None]:
    """The one of Megatron's optimizers, and its watch if it has an open one. Refuse what would not be exact."""
    config = WatchConfig.from_keys(keys)
    wrapper = _internals.inside(optimizer, WHO)
    found = open_watch([wrapper.optimizer], config)
    if found is None:
        check_micro_batch_size(config.micro_batch_size, WHO)
        if isinstance(wrapper.optimizer, LENA):
            controller_of(wrapper.optimizer).require_own_keys(config)
        else:
            refuse_unsupported(wrapper, chunks, WHO)
    return wrapper, config, found


def _watch(wrapper: Any, chunk: Any, config: WatchConfig) -> Watch:
    _internals.warn_of_version()
    watcher = together(_internals.all_ranks(), functools.partial(_bound, wrapper, chunk, config))
    window = Window(chunk, watcher.meter.hooks)
    watch = watcher.shown()
    _internals.around_step(wrapper, *watch.around_step(window))
    return watch


def _bound(wrapper: Any, chunk: Any, config: WatchConfig) -> Watcher:
    names, parameters = trained_parameters(wrapper, chunk)
    require_supported(parameters, is_made_by_engine=True)
    watcher = Watcher(config, parameters, names)
    watcher.micro_batch_size = lambda: _internals.planned_micro_batches()[1] or config.micro_batch_size
    require_same_keys(_internals.all_ranks(), watcher.compared())
    binding = megatron_binding(wrapper, chunk, watcher.meter, mends=False)
    watcher.manage(binding, lambda: None)
    return watcher
