"""One case in Megatron-core's own loop, without DeepSpeed, as one rank sees it. Every rank calls `run` with the case.

`case.config` has options of Megatron's DistributedDataParallel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import ds_lena
from ds_lena.integrations.megatron import watch, wrap
from tests.helpers.case import SCHEDULES, Case
from tests.helpers.gpt_twin import LENGTH
from tests.helpers.megatron_gpt import name_in_whole
from tests.helpers.split_run import join_parts, of_all_stages, split_model, whole_model

TOKENS = 2 * LENGTH  # of a micro-batch


class AsOnGpu(TorchFunctionMode):
    """Megatron's optimizers put small tensors on "cuda", and ask for the type of a tensor there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs = kwargs | {"device": "cpu"}
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.type and len(args) == 1 and not kwargs:
            return func(args[0]).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


def run(case: Case) -> dict[str, Any]:
    """The reports after every update and the fp32 weights at the end."""
    with AsOnGpu(), split_model(case) as (model, _):
        chunk, optimizer = made(case, model)
        keys = case.keys
        if case.loop == "two groups":
            del keys["no_decay"]  # of the reference alone: Megatron leaves out biases and norms by itself
        if case.optimizer == "watched":
            watch(optimizer, [chunk], **{key: keys[key] for key in ("layer", "smoothing", "exclude") if key in keys})
        else:
            wrap(optimizer, [chunk], **keys)
        if case.loop == "two groups":
            _let_schedule(case, optimizer)
        reports = [update_of(case, chunk, optimizer, update) for update in range(len(case.plan))]
        return {"reports": reports, "params": _masters(case, chunk, optimizer)}


@contextmanager
def megatron(split: str = "megatron", **fields: Any) -> Iterator[tuple[Case, Any, Any]]:
    """A case, Megatron's DistributedDataParallel around the model, and its optimizer."""
    case = Case("", stage=None, split=split, groups="flat", **fields)
    with AsOnGpu(), split_model(case) as (model, _):
        yield case, *made(case, model)


def made(case: Case, model: nn.Module) -> tuple[Any, Any]:
    """Megatron's DistributedDataParallel around the model, and its optimizer, before `wrap`."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    keys, narrow = case.keys, case.narrow or torch.float32
    ddp = DistributedDataParallelConfig(bucket_size=4000, **dict(case.config))
    is_adam = case.base in ("adamw", "lamb")
    options: dict[str, Any] = {"adam_beta1": keys["betas"][0], "adam_beta2": keys["betas"][1]} if is_adam else {}
    options |= {"adam_eps": keys["eps"]} if is_adam else {"sgd_momentum": keys["momentum"]}
    if case.precision == "fp16":
        options["loss_scale"] = 2.0**10
    config = OptimizerConfig(
        optimizer="adam" if is_adam else "sgd",
        lr=keys["lr"],
        weight_decay=(0.01 if is_adam else 0.0) if keys["weight_decay"] is None else keys["weight_decay"],
        clip_grad=case.clipping,
        bf16=narrow is torch.bfloat16,
        fp16=narrow is torch.float16,
        params_dtype=narrow,
        use_distributed_optimizer=ddp.use_distributed_optimizer,
        overlap_param_gather=ddp.overlap_param_gather,
        **options,
    )
    if case.loop == "recompute":
        vars(model.config).update(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    model.config.calculate_per_token_loss = case.loop == "per token"
    model.config.pipeline_dtype = narrow
    chunk = DistributedDataParallel(model.config, ddp, model.to(narrow))
    return chunk, get_megatron_optimizer(config, [chunk], None if case.loop == "two groups" else {})


def _let_schedule(case: Case, optimizer: Any) -> None:
    """Have Megatron's own scheduler set the groups' weight decay."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    decay = optimizer.config.weight_decay
    OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=case.keys["lr"],
        min_lr=0.0,
        lr_warmup_steps=0,
        lr_decay_steps=100,
        lr_decay_style="constant",
        start_wd=decay,
        end_wd=decay,
        wd_incr_steps=100,
        wd_incr_style="constant",
    )


def update_of(case: Case, chunk: Any, optimizer: Any, update: int) -> Any:
    """The report after an update."""
    make_update(case, chunk, optimizer, update)
    return ds_lena.report(optimizer)


def make_update(case: Case, chunk: Any, optimizer: Any, update: int) -> None:
    """One update of a loop as a user of Megatron-core writes it."""
    chunk.zero_grad_buffer()
    optimizer.zero_grad()
    batches = [case.batch(update, case.data_rank(dist.get_rank()), i) for i in range(case.plan[update].micros)]
    if case.loop == "again":  # the first try of an update is thrown away
        chunk(*batches[0]).backward()
        chunk.zero_grad_buffer()
    if case.loop == "engine":
        _accumulate(case, chunk, optimizer, update, batches)
    else:
        _by_schedule(case, chunk, optimizer, batches)
    for group in optimizer.param_groups:  # as Megatron's OptimizerParamScheduler does
        group["lr"] = case.keys["lr"] * SCHEDULES[case.schedule](update)
    optimizer.step()


def _accumulate(case: Case, chunk: Any, optimizer: Any, update: int, batches: list[Any]) -> None:
    from megatron.core.distributed import finalize_model_grads

    for batch in batches:
        with chunk.no_sync() if batch is not batches[-1] else contextlib.nullcontext():
            loss = optimizer.scale_loss(chunk(*batch) / len(batches))
            (loss * float("inf") if case.plan[update].poisoned else loss).backward()
    finalize_model_grads([chunk])


def _by_schedule(case: Case, chunk: Any, optimizer: Any, batches: list[Any]) -> None:
    """By Megatron's own schedule. "per token": the gradient is divided by the tokens of all micro-batches."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    config = chunk.config
    config.finalize_model_grads_func, config.no_sync_func = finalize_model_grads, chunk.no_sync
    config.grad_scale_func = optimizer.scale_loss

    def loss_of(loss: Tensor) -> tuple[Any, ...]:
        if case.loop != "per token":
            return loss, {}
        tokens = torch.tensor(TOKENS, dtype=torch.int)
        return loss * TOKENS, tokens, {}

    get_forward_backward_func()(
        forward_step_func=lambda data, model: (model(*next(data)), loss_of),
        data_iterator=iter(batches),
        model=[chunk],
        num_microbatches=len(batches),
        seq_length=LENGTH,
        micro_batch_size=2,
    )


def _masters(case: Case, chunk: Any, optimizer: Any) -> dict[str, Tensor]:
    """The whole fp32 weight of every parameter."""
    if chunk.ddp_config.overlap_param_gather:
        chunk.start_param_sync(force_sync=True)  # otherwise the next forward gathers what the other ranks moved
    masters = dict(_own_masters(chunk, optimizer))
    shapes = {name: parameter.shape for name, parameter in whole_model(case).named_parameters()}
    whole = {name: join_parts(part, shapes[name], chunk.tp_group) for name, part in masters.items()}
    return of_all_stages(whole) if case.pipe > 1 else whole


def _own_masters(chunk: Any, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    """Of this rank's parts. A rank of the distributed optimizer has a range of each; the others' are added to it."""
    inner = optimizer.chained_optimizers[0]
    for name, parameter in chunk.named_parameters():
        master = getattr(parameter, "main_param", None)
        if hasattr(inner, "model_param_gbuf_map") and hasattr(parameter, "main_param"):
            whole = torch.zeros(parameter.numel())
            if master is not None:
                whole[inner._get_model_param_range_map(parameter)["param"].start :][: master.numel()] = master.detach()
            dist.all_reduce(whole, group=chunk.dp_cp_group)
            master = whole.view(parameter.shape)
        whole_name = name_in_whole(name.removeprefix("module."), chunk.module)
        yield whole_name, (parameter if master is None else master).detach().clone()
