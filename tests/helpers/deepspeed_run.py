"""One case under DeepSpeed, as one rank sees it. Every rank calls `run` with the same case."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

import ds_lena
from tests.helpers.case import SCHEDULES, Case, Window
from tests.helpers.grids import one_autocast, one_grid
from tests.helpers.groups import parameter_groups, stock_optimizer
from tests.helpers.model import TinyTransformer, build, initial_weights
from tests.helpers.nvme import placed
from tests.helpers.split_run import join_parts, of_all_experts, of_all_stages, split_model, whole_model

Result = dict[str, Any]
LINEAR = torch.nn.functional.linear
type(get_accelerator()).is_fp16_supported = lambda self: True  # this CPU's says no, and computes in fp16 all the same
EVERY_MICRO_BATCH = ("engine", "torch backward", "offload states")  # loops that call engine.step() after each one


def run(case: Case) -> Result:
    """The reports after every update and the fp32 weights at the end."""
    for _ in range(case.repeat):
        with _engine(case) as engine:
            reports = [_update(case, engine, update, window) for update, window in enumerate(case.plan)]
            params = {name: master.cpu() for name, master in _masters(case, engine).items()}
    return {"reports": reports, "params": params}


@contextmanager
def _engine(case: Case) -> Iterator[Any]:
    if case.is_on_nvme:
        with one_autocast(), placed(case) as on_nvme:
            yield from _engine_of(on_nvme, _model(on_nvme), None)
        return
    if not case.split and "zero_hpz_partition_size" not in case.zero:  # a grid of its own costs new groups of ranks
        with one_autocast():
            yield from _engine_of(case, _model(case), None)
        return
    with one_grid(), split_model(case) if case.split else nullcontext((_model(case), None)) as (model, mpu):
        yield from _engine_of(case, model, mpu)


def _engine_of(case: Case, model: nn.Module, mpu: Any) -> Iterator[Any]:
    groups = parameter_groups(case, model)
    optimizer = None
    if case.optimizer == "client":
        optimizer = ds_lena.LENA(groups, **case.keys)
    elif case.optimizer in ("stock", "watched"):
        optimizer = stock_optimizer(case, groups)
    scheduler = None
    if case.schedule != "constant":
        scheduler = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=SCHEDULES[case.schedule])
    engine, *_ = deepspeed.initialize(
        model=torch.compile(model, backend="aot_eager") if case.compiled == "model" else model,
        model_parameters=groups if optimizer is None else None,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        mpu=mpu,
        config=case.deepspeed_config(),
    )
    if case.compiled == "engine":
        engine.compile(backend="aot_eager")
    if case.optimizer == "watched":
        ds_lena.watch(engine, layer=case.layer, smoothing=case.keys.get("smoothing"))
    try:
        yield engine
    finally:
        engine.destroy()
        torch.nn.functional.linear = LINEAR  # ZeRO-3 leaves its own behind, which rounds differently in bf16
        del engine
        gc.collect()


def _model(case: Case) -> nn.Module:
    if not case.zero_init:
        return build(case.model, torch.float32).to(case.device)
    with deepspeed.zero.Init(config_dict_or_path=case.deepspeed_config()):
        model = TinyTransformer(case.model)
    for name, weight in initial_weights(case.model).items():
        p = model.get_parameter(name)
        with deepspeed.zero.GatheredParameters(p, modifier_rank=0):
            if dist.get_rank() == 0:
                p.data.copy_(weight)
    return model


def _update(case: Case, engine: Any, update: int, window: Window) -> Any:
    """One window, driven as `case.loop` says; the report after it."""
    if case.pipe > 1:
        batches = (case.batch(update, case.data_rank(dist.get_rank()), micro) for micro in range(window.micros))
        engine.train_batch(iter([(tokens[:, :-1], tokens[:, 1:]) for tokens, _ in batches]))
        return None if case.optimizer == "stock" else ds_lena.report(engine)
    _resize(case, engine, update)
    if case.loop == "offload states":
        engine.offload_states()
        engine.reload_states()
    if case.evaluate == "between updates":
        _evaluate(case, engine, update)
    with engine.coalesce_grad_reduction() if case.loop == "coalesce" else nullcontext():
        for micro in range(window.micros):
            if case.evaluate == "between micro-batches":
                _evaluate(case, engine, update)
            last = micro == window.micros - 1
            if case.loop == "boundary":
                engine.set_gradient_accumulation_boundary(last)
            with engine.no_sync() if case.loop == "no_sync" and not last else nullcontext():
                _micro_batch(case, engine, update, micro)
            if case.loop in EVERY_MICRO_BATCH or (last and case.loop != "coalesce"):
                engine.step()
    if case.loop == "coalesce":
        engine.step()
    return None if case.optimizer == "stock" else ds_lena.report(engine)


def _micro_batch(case: Case, engine: Any, update: int, micro: int) -> None:
    window = case.plan[update]
    tokens, sometimes = case.batch(update, case.data_rank(dist.get_rank()), micro)
    loss = engine(tokens.to(case.device), sometimes)
    if window.poisoned:
        loss = loss * float("inf")
    if micro in window.idle:
        return
    if case.loop == "torch backward":
        loss.backward()
    elif case.loop in EVERY_MICRO_BATCH:
        engine.backward(loss)
    else:
        engine.backward(loss / window.micros, scale_wrt_gas=False)


def _resize(case: Case, engine: Any, update: int) -> None:
    """Tell DeepSpeed of another batch size before the first window that has it."""
    now, before = case.plan[update], case.plan[max(update - 1, 0)]
    if now.size != before.size:
        engine.set_train_micro_batch_size(now.size)
    if now.micros != before.micros and case.loop == "engine":
        engine.set_train_batch_size(now.size * now.micros * case.world)


def _evaluate(case: Case, engine: Any, update: int) -> None:
    engine.eval()
    with torch.no_grad():
        engine(*case.batch(update, case.data_rank(dist.get_rank()), 50))
    engine.train()


def _masters(case: Case, engine: Any) -> dict[str, Tensor]:
    """The whole fp32 weight of every trained parameter."""
    masters = _own_masters(case, engine)
    if case.has_deepspeed_moe:
        return of_all_experts(case, masters)
    if case.tensor > 1:
        apart = case.tensor * case.sequence  # ranks that hold parts or copies of one replica
        shapes = {name: parameter.shape for name, parameter in whole_model(case).named_parameters()}
        group = [dist.new_group(list(range(r, r + apart))) for r in range(0, case.world, apart)]
        ours = group[dist.get_rank() // apart]
        masters = {name: join_parts(part, shapes[name], ours) for name, part in masters.items()}
    return of_all_stages(masters) if case.pipe > 1 else masters


def _own_masters(case: Case, engine: Any) -> dict[str, Tensor]:
    """Of this rank's parts, read where the layout keeps them."""
    module = getattr(engine.module, "_orig_mod", engine.module)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if hasattr(engine.optimizer, "fp32_groups"):
        pairs = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
        copies = {id(p): master for low, high in pairs for p, master in zip(low, high, strict=True)}
        return {name: copies[id(p)].detach().clone() for name, p in trained.items()}
    is_bare = engine.optimizer is engine.basic_optimizer
    if is_bare or case.zero.get("round_robin_gradients"):  # DeepSpeed's map of fragments is wrong there
        return {name: p.detach().float().clone() for name, p in trained.items()}
    return {name: safe_get_full_fp32_param(p).detach().clone() for name, p in trained.items()}
