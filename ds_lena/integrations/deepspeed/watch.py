"""Watches the optimizer of an engine, whatever it is. Nothing of the training changes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ... import reporting
from ...binding import Binding
from ...errors import ConfigError, StateError, UnsupportedError
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
    '{"grad_accum_dtype": "bf16"}, or ZeRO 3.'
)
_LOST = (
    "ds_lena.watch: at ZeRO 2 in bf16 with fp32 accumulation DeepSpeed loses the gradient of a parameter of Muon's "
    'Adam part that lies next to a matrix of Muon in a bucket. Use "data_types": {"grad_accum_dtype": "bf16"}, or '
    "ZeRO 3. A layer without gradient is named after a few updates."
)


def watch_by_entry(engine: Any, entry: Any) -> None:
    """Watch an engine as an entry of its JSON says."""
    if not isinstance(entry, dict):
        raise ConfigError(
            f'ds_lena.watch: the entry "{ENTRY}": {entry!r} is not allowed; allowed is an object of keys, as '
            f'"{ENTRY}": {{}} or "{ENTRY}": {{"layer": "block"}}.'
        )
    if WatchConfig.from_keys(entry).enabled:
        watch_engine(engine, entry)


def watch_engine(engine: Any, keys: Mapping[str, Any]) -> Watch:
    """Watch an engine. All its ranks call it, between two updates.

    Raises:
        UnsupportedError: a feature is in use under which it would not be exact.
        ConfigError: the ranks do not have the same keys, or the engine is watched already with others.
        StateError: an update has begun, or this version of ds_lena does not know DeepSpeed's layout.
    """
    view = EngineView(engine)
    before: Watch | None = getattr(engine, "ds_lena_watch", None)
    of_lena = isinstance(view.optimizer, LENA)
    if not of_lena:
        _refuse_unsupported(view)

    def begin() -> WatchConfig:
        config = WatchConfig.from_keys(keys)
        if before is not None and not before.is_closed:
            if config.contradicted_by(before.config.keys()):
                raise ConfigError(
                    "ds_lena.watch: this engine is watched already, with other keys. Call engine.ds_lena_watch.close() "
                    f'first, or give keys in one place: here or in the JSON, where they are the entry "{ENTRY}".'
                )
            return config
        _check_micro_batch_size(view, config)
        if of_lena:
            controller_of(view.optimizer).require_own_keys(config)
        else:
            require_between_updates(view, "ds_lena.watch")
        return config

    config = together(view.grid.everything, begin)
    if before is not None and not before.is_closed:
        return before
    watch = controller_of(view.optimizer).shown(config) if of_lena else _watch(view, config)
    watch.after_update.append(lambda: write_events(engine, lambda: reporting.noise_events(watch.report(), of_lena)))
    engine.ds_lena_watch = watch
    if before is None:
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


def require_between_updates(view: EngineView, who: str) -> None:
    """Raise `StateError` if the engine has the gradients of an update that has not ended. `who`: was called."""
    done, steps = view.begun()
    if done:
        raise StateError(
            f"{who}: {done} of {steps} micro-batches of an update are done already, and it would see the others only. "
            "Call it between two updates, best right after deepspeed.initialize."
        )


def _refuse_unsupported(view: EngineView) -> None:
    if view.optimizer is None:
        raise UnsupportedError("ds_lena.watch: this engine has no optimizer, so it makes no updates to measure.")
    refuse_unsupported(view.facts, "ds_lena.watch")


def _watch(view: EngineView, config: WatchConfig) -> Watch:
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
    watch = watcher.shown()
    _warn_of_muon(view)

    view.around_model_step(*watch.around_step(window))
    view.before_destroy(watch.close)
    return watch


def _warn_of_muon(view: EngineView) -> None:
    facts = view.facts
    in_fp32 = facts.bf16 and facts.fp32_accumulation and facts.offload_optimizer == "none"
    if is_muon(view.optimizer) and in_fp32 and facts.stage in (1, 2):
        logger.warning(_NOT_MUON if facts.stage == 1 else _LOST)
