"""Watches the optimizer of an engine, whatever it is. Nothing of the training changes."""

from __future__ import annotations

import logging
from typing import Any

from ... import reporting
from ...binding import Binding
from ...errors import ConfigError, UnsupportedError
from ...optimizer import LENA, controller_of
from ...watch_config import WatchConfig
from ...watching import Watch, Watcher
from ._internals.engine import EngineView, write_events
from ._internals.select import gives_norms_only, is_muon, trained_parameters
from .axes import parts_of
from .bind import check_layout, engine_binding
from .exchange import require_same_keys, together
from .support import refuse_unsupported
from .window import Window

logger = logging.getLogger("ds_lena")

ENTRY = "noise_scale"
"""The entry of DeepSpeed's JSON with the keys of `ds_lena.watch`."""

_NOT_MUON = (
    "ds_lena.watch: at ZeRO 1 in bf16 with fp32 accumulation DeepSpeed's Muon gets flat pieces and does not "
    'orthogonalize them: this is plain SGD with momentum. What is measured is right. Use "data_types": '
    '{"grad_accum_dtype": "bf16"}, or ZeRO 2 or 3.'
)
_LOST = (
    "ds_lena.watch: at ZeRO 2 in bf16 with fp32 accumulation DeepSpeed loses the gradient of a parameter of Muon's "
    'Adam part that lies next to a matrix of Muon in a bucket. Use "data_types": {"grad_accum_dtype": "bf16"}, or '
    "ZeRO 1 or 3. A layer without gradient is named after a few updates."
)


def watch_by_entry(engine: Any, entry: Any) -> None:
    """Watch an engine as an entry of its JSON says."""
    if not isinstance(entry, dict):
        raise ConfigError(
            f'ds_lena.watch: the entry "{ENTRY}": {entry!r} is not allowed; allowed is an object of keys, as '
            f'"{ENTRY}": {{}} or "{ENTRY}": {{"layer": "block"}}.'
        )
    config = WatchConfig.from_keys(entry)
    if config.enabled:
        watch_engine(engine, config)


def watch_engine(engine: Any, config: WatchConfig) -> Watch:
    """Watch an engine. All its ranks call it, between two updates.

    Raises:
        UnsupportedError: a feature is in use under which it would not be exact.
        ConfigError: the ranks do not have the same keys, or the engine is watched already with others.
        StateError: this version of ds_lena does not know DeepSpeed's layout.
    """
    view = EngineView(engine)
    found: Watch | None = getattr(engine, "ds_lena_watch", None)
    if found is not None and not found.is_closed:
        if found.config != config:
            raise ConfigError(
                "ds_lena.watch: this engine is watched already, with other keys. Take that watch "
                f'(engine.ds_lena_watch), call its close(), or give the keys once; the JSON may have "{ENTRY}" too.'
            )
        return found
    _check_micro_batch_size(view, config)
    lena = controller_of(view.optimizer) if isinstance(view.optimizer, LENA) else None
    watch = _watch(view, config) if lena is None else lena.watch(config)
    of_lena = lena is not None
    watch.after_update.append(lambda: write_events(engine, lambda: reporting.noise_events(watch.report(), of_lena)))
    engine.ds_lena_watch = watch
    if found is None:
        # The watch of the day: one that was closed may have been followed by another.
        view.in_checkpoints(
            "ds_lena_watch",
            lambda: engine.ds_lena_watch.to_save(),
            lambda saved: engine.ds_lena_watch.go_on_from(saved),
        )
    return watch


def _check_micro_batch_size(view: EngineView, config: WatchConfig) -> None:
    given, actual = config.micro_batch_size, view.micro_batch_size()
    if given is not None and given != actual:
        raise ConfigError(
            f'ds_lena.watch: "micro_batch_size": {given}, but DeepSpeed has "train_micro_batch_size_per_gpu": '
            f"{actual}. Leave micro_batch_size out under DeepSpeed."
        )


def _watch(view: EngineView, config: WatchConfig) -> Watch:
    if view.optimizer is None:
        raise UnsupportedError("ds_lena.watch: this engine has no optimizer, so it makes no updates to measure.")
    refuse_unsupported(view.facts, "ds_lena.watch")
    parameters = trained_parameters(view)
    watcher = Watcher(config, parameters, [f"param_{i}" for i in range(len(parameters))])
    watcher.micro_batch_size = view.micro_batch_size

    def bind() -> Binding:
        require_same_keys(view.grid.everything, watcher.compared())
        binding = engine_binding(view, watcher.meter, {}, mends=False)
        if view.facts.stage:  # at stage 0 the gradient is read from the parameters, wherever the weights lie
            check_layout(view, binding, parameters)
        if config.differences and gives_norms_only(binding.layout):
            raise UnsupportedError(
                'ds_lena.watch: "differences": true with Muon at ZeRO 1 or 2, where DeepSpeed leaves no gradient to '
                "compare with. Use ZeRO 0 or 3, or two micro-batches an update."
            )
        return binding

    binding = together(view.grid.everything, bind)
    watcher.manage(binding, lambda: parts_of(view, binding.placements, binding.order))
    window = Window(view, watcher.meter)
    watch = watcher.watch()
    _warn_of_muon(view)

    def before() -> None:
        if not watcher.is_closed:
            window.begin()
            watcher.begin_update()

    def after(applied: bool) -> None:
        if not watcher.is_closed:
            watcher.end_update(applied)
            window.end()
            if applied:
                watch.updated()

    view.around_model_step(before, after)
    view.before_destroy(watch.close)
    return watch


def _warn_of_muon(view: EngineView) -> None:
    facts = view.facts
    in_fp32 = facts.bf16 and facts.fp32_accumulation and facts.offload_optimizer == "none"
    if is_muon(view.optimizer) and in_fp32 and facts.stage in (1, 2):
        logger.warning(_NOT_MUON if facts.stage == 1 else _LOST)
