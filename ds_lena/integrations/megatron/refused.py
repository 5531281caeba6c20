"""What is refused around Megatron's own optimizers, and the flag to set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ...errors import UnsupportedError
from .partial import is_added_up

FUSED = "The hooks see what autograd gets, and that is a placeholder then."

Table = list[tuple[bool, str, str]]
"""(is it in use, what it is, what to do)."""


def refuse_unsupported(wrapper: Any, chunks: Sequence[Any], who: str) -> None:
    """Raise `UnsupportedError` for the first thing in use under which no measurement would be exact.

    `who`: in whose name it is told.
    """
    from megatron.core.distributed import DistributedDataParallel

    if len(chunks) != 1 or not isinstance(chunks[0], DistributedDataParallel):
        given = ", ".join(type(chunk).__name__ for chunk in chunks) or "nothing"
        raise UnsupportedError(
            f"{who}: got the model chunks [{given}]. Supported is one, wrapped in Megatron-core's "
            "DistributedDataParallel: no FSDP, and no virtual pipeline stages "
            "(virtual_pipeline_model_parallel_size=None)."
        )
    _refuse(_where_it_is_measured(wrapper.config, chunks[0]), who)


def refuse_other_rules(wrapper: Any, who: str) -> None:
    """Raise `UnsupportedError` if Megatron's inner optimizer is none whose place LENA can take."""
    _refuse(_what_is_replaced(wrapper.config), who)


def _refuse(table: Table, who: str) -> None:
    for is_in_use, what, instead in table:
        if is_in_use:
            raise UnsupportedError(f"{who} around Megatron's optimizer does not support {what}. {instead}")


def _where_it_is_measured(optimizer: Any, chunk: Any) -> Table:
    model, ddp = chunk.config, chunk.ddp_config
    tensor_ranks = chunk.tp_group.size()
    parameters = [p for p in chunk.parameters() if p.requires_grad]
    return [
        (
            any(_is_fused(module) for module in (model, *chunk.modules())),
            "weight gradients that layers add to main_grad themselves",
            f"{FUSED} Set gradient_accumulation_fusion=False (--no-gradient-accumulation-fusion in Megatron-LM).",
        ),
        (
            model.delay_wgrad_compute or ddp.delay_wgrad_compute or model.defer_embedding_wgrad_compute,
            "weight gradients that are computed after the backward pass",
            "Set delay_wgrad_compute=False and defer_embedding_wgrad_compute=False.",
        ),
        (
            model.cuda_graph_impl != "none",
            "CUDA graphs",
            'A replayed graph runs no hooks. Set cuda_graph_impl="none", enable_cuda_graph=False.',
        ),
        (
            model.overlap_moe_expert_parallel_comm,
            "the combined schedule of overlap_moe_expert_parallel_comm",
            "Set overlap_moe_expert_parallel_comm=False.",
        ),
        (
            chunk.pp_group.size() > 1 and bool(model.mtp_num_layers),
            "prediction of several tokens with pipeline parallelism",
            "Set mtp_num_layers=None, or pipeline_model_parallel_size=1.",
        ),
        (
            any(getattr(p, "shared", False) and not getattr(p, "shared_embedding", False) for p in parameters),
            "parameters with copies on several stages, other than the word embedding",
            "Set pipeline_model_parallel_size=1.",
        ),
        (model.context_parallel_size > 1, "context parallelism", "Set context_parallel_size=1."),
        (
            chunk.ep_group.size() > 1 or any(not getattr(p, "allreduce", True) for p in parameters),
            "expert parallelism of Megatron",
            "Set expert_model_parallel_size=1.",
        ),
        (
            bool(model.num_moe_experts) and tensor_ranks > 1,
            "experts that are split by tensor parallelism",
            "Set tensor_model_parallel_size=1, or num_moe_experts=None.",
        ),
        (
            tensor_ranks > 1 and any(getattr(p, "average_gradients_across_tp_domain", False) for p in parameters),
            "parameters marked average_gradients_across_tp_domain",
            "Set tensor_model_parallel_size=1.",
        ),
        (
            any(is_added_up(p) for p in parameters),
            "sum_partial_gradients() in Megatron's own loop",
            "It is for DeepSpeed; Megatron's finalize_model_grads() would add the parts up again. Leave it out.",
        ),
        (ddp.use_megatron_fsdp, "Megatron's FSDP", "Set use_megatron_fsdp=False."),
        (
            ddp.num_distributed_optimizer_instances > 1,
            "several instances of the distributed optimizer",
            "Set num_distributed_optimizer_instances=1.",
        ),
        (
            ddp.fp8_param_gather or bool(model.fp8_param),
            "parameters in fp8",
            "Set fp8_param_gather=False, and fp8_param=False in the model's config.",
        ),
        (
            optimizer.use_precision_aware_optimizer,
            "the precision-aware optimizer",
            "Set use_precision_aware_optimizer=False.",
        ),
        (optimizer.optimizer_cpu_offload, "Megatron's offload to the CPU", "Set optimizer_cpu_offload=False."),
    ]


def _what_is_replaced(optimizer: Any) -> Table:
    return [
        (
            optimizer.optimizer == "adam" and not optimizer.decoupled_weight_decay,
            "Adam with weight decay inside the gradient",
            "Set decoupled_weight_decay=True, which makes it AdamW.",
        ),
        (
            optimizer.optimizer not in ("adam", "sgd"),
            f'optimizer="{optimizer.optimizer}"',
            'Set optimizer="adam" or "sgd" in OptimizerConfig.',
        ),
    ]


def _is_fused(owner: nn.Module | Any) -> bool:
    """Whether a config or a layer says so, by Megatron's name for it or by Transformer Engine's."""
    return bool(
        getattr(owner, "gradient_accumulation_fusion", False) or getattr(owner, "fuse_wgrad_accumulation", False)
    )
