"""One case of a model that is split over ranks, as one rank sees it, and the whole model in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.helpers.case import Case
from tests.helpers.gpt_twin import GptTwin
from tests.helpers.megatron_gpt import megatrons_groups, take_parts
from tests.helpers.moe_model import expert_name, moe_twin, route_clearly, with_deepspeed_moe
from tests.helpers.pipeline_model import PipelineTwin, stages_of
from tests.helpers.sequence_model import shared_model

FAMILIES = {"moe-mixtral": "Mixtral", "moe-qwen2": "Qwen2Moe", "moe-qwen3": "Qwen3Moe", "qwen3": "Qwen3"}
"""Of transformers' models, by what is in the name of a split."""


def whole_model(case: Case) -> nn.Module:
    """The whole model in float64, with its first weights."""
    if case.split.startswith("pipeline"):
        model: nn.Module = PipelineTwin(is_tied="tied" in case.split)
    elif case.has_deepspeed_moe:
        model = moe_twin()
    elif case.split.startswith(("megatron", "ulysses-gpt")):
        model = GptTwin(tied="tied" in case.split, head_norms="head-norms" in case.split)
    else:
        model = _of_transformers(case.split)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.double().named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.1 * noise if "norm" in name and name.endswith("weight") else 0.3 * noise)
    if case.has_deepspeed_moe:
        route_clearly(model)
    return model


@contextmanager
def split_model(case: Case) -> Iterator[tuple[nn.Module, Any]]:
    """This rank's part of the model in float32, with the same weights, and the mpu."""
    whole = whole_model(case)
    if case.split.startswith("pipeline"):
        sizes = {"tensor_model_parallel_size": case.tensor, "pipeline_model_parallel_size": case.pipe}
        with megatrons_groups(**sizes) if case.tensor > 1 else nullcontext():
            yield stages_of(whole, case.pipe, case.tensor), None
        return
    if case.has_deepspeed_moe:
        yield with_deepspeed_moe(whole, case.expert_rank(dist.get_rank()), case.expert, case.spread), None
        return
    if case.split.startswith("ulysses"):
        with shared_model(case, whole.float()) as model_and_mpu:
            yield model_and_mpu
        return
    if not case.split.startswith("megatron"):
        if case.stage == 3 and "moe" in case.split:
            from deepspeed.utils import set_z3_leaf_modules

            set_z3_leaf_modules(whole, [type(whole.model.layers[0].mlp)])
        yield whole.float(), None  # AutoTP splits it
        return
    from tests.helpers.megatron_gpt import megatron_gpt

    sizes = {"tensor_model_parallel_size": case.tensor, "pipeline_model_parallel_size": case.pipe}
    with megatrons_groups(**sizes) as parallel_state:
        flags = (f in case.split for f in ("sequence", "tied", "head-norms"))
        model = megatron_gpt(case.tensor, *flags, case.pipe)
        take_parts(model, whole, parallel_state.get_tensor_model_parallel_rank())
        if case.stage is not None and "unsummed" not in case.split:
            from ds_lena.integrations.megatron import sum_partial_gradients

            sum_partial_gradients(model)
        yield model, parallel_state


def join_parts(part: Tensor, whole: torch.Size, group: dist.ProcessGroup) -> Tensor:
    """The whole tensor. NaN where ranks have copies of a tensor, and they differ."""
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, part, group=group)
    if part.shape == whole:
        return _same(parts)
    (dim,) = [d for d, sizes in enumerate(zip(part.shape, whole, strict=True)) if sizes[0] != sizes[1]]
    return torch.cat(parts, dim)


def _same(copies: list[Tensor]) -> Tensor:
    first = copies[0]
    return first if all(torch.equal(first, copy) for copy in copies) else torch.full_like(first, torch.nan)


def of_all_experts(case: Case, masters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the whole model. NaN where ranks have copies of a tensor, and they differ."""
    place = case.expert_rank(dist.get_rank())
    return of_all_stages(
        {expert_name(name, place, case.expert, case.spread): weight for name, weight in masters.items()}
    )


def of_all_stages(masters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of all stages. NaN where ranks have copies of a tensor, and they differ."""
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, masters)
    names = dict.fromkeys(name for of_rank in everybody for name in of_rank)
    return {name: _same([of_rank[name] for of_rank in everybody if name in of_rank]) for name in names}


def _of_transformers(split: str) -> nn.Module:
    import transformers

    family = next((name for mark, name in FAMILIES.items() if mark in split), "Llama")
    sizes = {
        "vocab_size": 40,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3 if "uneven" in split else 2,
        "head_dim": 4,
        "tie_word_embeddings": False,
        "attn_implementation": "sdpa" if "ulysses" in split else "eager",
    }
    if "moe" in split:
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
        sizes |= {"num_local_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}

    class Model(getattr(transformers, f"{family}ForCausalLM")):  # type: ignore[misc, valid-type]
        def forward(self, tokens: Tensor, _: bool = False) -> Tensor:
            return super().forward(input_ids=tokens, labels=tokens, use_cache=False).loss

    return Model(getattr(transformers, f"{family}Config")(**sizes))
