"""The facts of an engine, read once into one object, before the engine makes its optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .grid import megatrons_parts, sequence_parallel_ranks, stages, tensor_parallel_ranks, ulysses_is_set_up


@dataclass(frozen=True)
class EngineFacts:
    """How an engine is configured, as far as this decides whether LENA is exact under it.

    `ranks`: the number of ranks that average a gradient. `fp32_accumulation`: gradients are added up in fp32.
    `predivide`: the part of the division that comes before the reduction of the gradient, 1 if none does.
    `prescales`: all of the division comes before the reduction.
    `sequence_ranks`: the number of ranks that share a micro-batch. `averages_apart`: they do not average their
    gradients. `unknown_sequence`: there are such ranks, and the engine does not know of them.
    `other_ranks`: there are ranks that hold neither a replica nor a part of this model.
    `offload_optimizer`, `offload_param`: the device, "none", "cpu" or "nvme".
    `forces_cpu_optimizer`: DeepSpeed refuses a client optimizer of others with offload.
    `low_precision_masters`: master weights in fp16 or bf16.
    `experts`: layers of `deepspeed.moe`. `auto_ep`: DeepSpeed is asked to make such layers of the model's own.
    `only_sequence_size`: the JSON says over how many ranks a sequence goes, and no groups are made for it.
    `unknown_parts`: Megatron-core has made groups for more parts of a model than the engine's.
    `stages`: of the pipeline, as the mpu says. `pipelined`: the model is a PipelineModule.
    """

    stage: int
    ranks: int
    fp16: bool
    autocasts_to_fp16: bool
    bf16: bool
    fp32_accumulation: bool
    autocasts: bool
    accumulates: bool
    clips: bool
    overlap_comm: bool
    round_robin: bool
    reduce_scatter: bool
    contiguous_gradients: bool
    prescales: bool
    offload_optimizer: str
    offload_param: str
    offload_ratio: float
    super_offload: bool
    forces_cpu_optimizer: bool
    low_precision_masters: bool
    zenflow: bool
    stages: int
    pipelined: bool
    autotp: bool
    dual_pipe: bool
    experts: bool
    auto_ep: bool
    sequence_ranks: int
    averages_apart: bool
    unknown_sequence: bool
    only_sequence_size: bool
    unknown_parts: bool
    context_parallel: bool
    tensor_ranks: int
    other_ranks: bool
    hpz: bool
    quantized_gradients: bool
    quantized_weights: bool
    quantized_frozen_weights: bool
    quantized_at_start: bool
    dynamic_batching: bool
    elastic_checkpoint: bool
    universal_checkpoint: bool
    deepcompile: bool
    sums_gradients: bool
    predivide: float
    in_data_parallel: bool


def read_facts(engine: Any) -> EngineFacts:
    """Read an engine that has its configuration and model. It needs no optimizer yet."""
    zero = engine._config.zero_config
    autocasts = bool(engine.torch_autocast_enabled())
    sampling = engine._config.data_efficiency_config["data_sampling"]
    sequence_ranks = sequence_parallel_ranks(engine)
    context_ranks = getattr(engine.mpu, "get_context_parallel_world_size", lambda: 1)
    tensor_ranks, pipe_ranks = tensor_parallel_ranks(engine), stages(engine)
    parts = tensor_ranks * pipe_ranks
    return EngineFacts(
        stage=engine.zero_optimization_stage(),
        ranks=engine.seq_dp_world_size,
        fp16=engine.fp16_enabled(),
        autocasts_to_fp16=autocasts and engine.torch_autocast_dtype() == torch.float16,
        bf16=engine.bfloat16_enabled(),
        fp32_accumulation=engine.get_data_types()[1] == torch.float32,
        autocasts=autocasts,
        accumulates=engine.gradient_accumulation_steps() > 1,
        clips=bool(engine.gradient_clipping()),
        overlap_comm=bool(zero.overlap_comm),
        round_robin=bool(zero.round_robin_gradients),
        reduce_scatter=bool(zero.reduce_scatter),
        contiguous_gradients=bool(zero.contiguous_gradients),
        prescales=not engine.postscale_gradients(),
        offload_optimizer=_device(zero.offload_optimizer),
        offload_param=_device(zero.offload_param),
        offload_ratio=getattr(zero.offload_optimizer, "ratio", 1.0),
        super_offload=bool(getattr(zero.offload_optimizer, "super_offload", False)),
        forces_cpu_optimizer=bool(engine.zero_force_ds_cpu_optimizer()),
        low_precision_masters=any(
            (engine.fp16_master_weights_and_gradients(), engine.bf16_master_weights_and_gradients())
        ),
        zenflow=bool(engine.zenflow),
        stages=pipe_ranks,
        pipelined=bool(engine.pipeline_parallelism),
        autotp=engine.autotp_size() > 1,
        dual_pipe=type(engine.module).__name__ == "DualPipeVModule",
        experts=bool(engine.has_moe_layers),
        auto_ep=bool(getattr(engine._config.expert_parallel_config, "enabled", False)),
        sequence_ranks=sequence_ranks,
        averages_apart=sequence_ranks > 1 and _averages_apart(engine),
        unknown_sequence=sequence_ranks == 1 and ulysses_is_set_up(),
        only_sequence_size=sequence_ranks == 1 and _has_only_sequence_size(engine._config._param_dict),
        unknown_parts=megatrons_parts() > parts,
        context_parallel=context_ranks() > 1,
        tensor_ranks=tensor_ranks,
        other_ranks=parts > 1 and engine.seq_dp_world_size * parts != dist.get_world_size(),
        hpz=zero.zero_hpz_partition_size > 1,
        quantized_gradients=bool(zero.zero_quantized_gradients),
        quantized_weights=bool(zero.zero_quantized_weights),
        quantized_frozen_weights=bool(zero.zero_quantized_nontrainable_weights),
        quantized_at_start=engine._config.weight_quantization_config is not None,
        dynamic_batching=bool(sampling["dynamic_batching"]["enabled"]),
        elastic_checkpoint=bool(zero.elastic_checkpoint),
        universal_checkpoint=bool(engine.load_universal_checkpoint()),
        deepcompile=bool(engine.is_deepcompile_enabled()),
        sums_gradients=not engine.gradient_average,
        predivide=engine.gradient_predivide_factor() if engine.postscale_gradients() else 1.0,
        in_data_parallel=isinstance(engine.module, (DistributedDataParallel, DataParallel)),
    )


def _averages_apart(engine: Any) -> bool:
    averaging = dist.get_process_group_ranks(engine.seq_data_parallel_group)
    return not set(dist.get_process_group_ranks(engine.seq_parallel_group)) <= set(averaging)


def _has_only_sequence_size(entries: Mapping[str, Any]) -> bool:
    return entries.get("sequence_parallel_size", 1) != 1 and "data_parallel_size" not in entries


def _device(offload: Any) -> str:
    return "none" if offload is None else str(getattr(offload.device, "value", offload.device))
