"""For models of Megatron-core under DeepSpeed: gradients that Megatron's own loop would add up over tensor parallelism.

model = GPTModel(config, …)
sum_partial_gradients(model)
deepspeed.initialize(model=model, mpu=parallel_state, …)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ADDS_UP = "Call ds_lena.integrations.megatron.sum_partial_gradients(model) before deepspeed.initialize."
_ADDED_UP = "ds_lena_adds_up"
_OF_HEADS = ("q_layernorm", "k_layernorm")


def sum_partial_gradients(model: nn.Module) -> list[str]:
    """Add up, over the tensor-parallel ranks, the gradients of which each rank has only a part. Returns their names.

    They are those of layer norms and of row-parallel biases under `sequence_parallel`, and of `q_layernorm` and
    `k_layernorm`. Megatron's own training loop adds them up in `finalize_model_grads`. DeepSpeed does not call it, so
    that the copies drift apart, with any optimizer. A hook on each parameter adds them up in every backward pass.

    Call it once, after `initialize_model_parallel` and before `deepspeed.initialize`. Without tensor parallelism it
    changes nothing.
    """
    from megatron.core import parallel_state

    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return []
    group = parallel_state.get_tensor_model_parallel_group()

    def add_up(gradient: Tensor) -> Tensor:
        total = gradient.detach().clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total

    names = []
    for name, parameter in model.named_parameters():
        if gradients_are_partial(name, parameter):
            parameter.register_hook(add_up)
            setattr(parameter, _ADDED_UP, True)
            names.append(name)
    return names


def gradients_are_partial(name: str, parameter: Tensor) -> bool:
    """Whether a tensor-parallel rank sees only a part of this gradient of a whole tensor, and nobody adds them up."""
    is_copy = not getattr(parameter, "tensor_model_parallel", False)
    is_of_heads = any(part in name.split(".") for part in _OF_HEADS)
    is_partial = is_copy and (getattr(parameter, "sequence_parallel", False) or is_of_heads)
    return parameter.requires_grad and is_partial and not is_added_up(parameter)


def is_added_up(parameter: Tensor) -> bool:
    """Whether `sum_partial_gradients` has hooked this parameter."""
    return getattr(parameter, _ADDED_UP, False)


def name_mpu_calls(parallel_state: object) -> None:
    """Give `megatron.core.parallel_state` the two names that DeepSpeed calls of an mpu, if it lacks them."""
    for ours, theirs in (
        ("get_model_parallel_world_size", "get_tensor_model_parallel_world_size"),
        ("get_model_parallel_rank", "get_tensor_model_parallel_rank"),
    ):
        if not hasattr(parallel_state, ours) and hasattr(parallel_state, theirs):
            setattr(parallel_state, ours, getattr(parallel_state, theirs))
