"""Models that share a micro-batch over ranks: each rank has a part of the sequence, and all heads meet in attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as functional
from torch import Tensor, nn

from ds_lena.integrations.deepspeed.axes import sequence
from tests.helpers.case import Case
from tests.helpers.gpt_twin import LENGTH, GptTwin, attend


@contextmanager
def shared_model(case: Case, whole: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """`model(tokens, _)` is this rank's loss for the whole model's weights, and DeepSpeed's mpu."""
    import deepspeed

    # At ZeRO 3 DeepSpeed divides the sum over ranks by all of them, at the others by the number of micro-batches.
    factor = 1 if case.stage == 3 else 1 / case.sequence
    deepspeed.init_distributed("gloo")
    if "llama" in case.split:
        with _shared_llama(case, whole, factor) as found:
            yield found
        return
    from deepspeed.runtime.sequence_parallel import parallel_state_sp as mpu

    mpu.initialize_sequence_parallel(case.sequence)
    model = SharedGpt(mpu.get_sequence_parallel_group(), case.split, factor)
    model.load_state_dict(whole.state_dict())
    with mock.patch.object(sequence, "ELEMENTS", 600):  # several buckets
        yield model, mpu


def mine(tensor: Tensor, group: Any) -> Tensor:
    """This rank's part of (batch, place)."""
    return tensor.chunk(dist.get_world_size(group), dim=-1)[dist.get_rank(group)]


class SharedGpt(GptTwin):
    """The twin with `DistributedAttention`. Its loss is this rank's part, and in some kinds of it that of the whole."""

    def __init__(self, group: Any, kind: str, factor: float) -> None:
        from deepspeed.sequence.layer import DistributedAttention

        super().__init__(tied="tied" in kind)
        self.group, self.kind, self.factor = group, kind, factor
        for layer in self.decoder.layers:
            layer.self_attention.attend = _attending(DistributedAttention(_attend, group, scatter_idx=2, gather_idx=1))

    def forward(self, tokens: Tensor, _: bool = False) -> Tensor:
        x = self.body(mine(tokens[:, :-1], self.group), mine(torch.arange(LENGTH), self.group))
        if "whole-loss" not in self.kind and "one-head" not in self.kind:
            return self.loss(x, mine(tokens[:, 1:], self.group)) * self.factor
        gathered = torch.cat(functional.all_gather(x, group=self.group), dim=1)
        if "whole-loss" in self.kind:
            return self.loss(gathered, tokens[:, 1:]) * self.factor
        if dist.get_rank(self.group) > 0:  # one rank has the loss, the others only take part
            return (gathered * 0).sum()
        return self.loss(gathered, tokens[:, 1:]) * self.factor * dist.get_world_size(self.group)


def _attending(attention: nn.Module) -> Any:
    """`attention` for (batch, head, place, size). A function, so that names of parameters stay."""

    def shared(*states: Tensor) -> Tensor:
        return attention(*(state.transpose(1, 2) for state in states), 0).transpose(1, 2)

    return shared


def _attend(*states: Tensor) -> Tensor:
    return attend(*(state.transpose(1, 2) for state in states)).transpose(1, 2)


@contextmanager
def _shared_llama(case: Case, whole: nn.Module, factor: float) -> Iterator[tuple[nn.Module, Any]]:
    """As accelerate and HF Trainer do it."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.integrations.deepspeed import deepspeed_sp_compute_loss
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    mpu = UlyssesSPAttentionHF.register_with_transformers(whole, "sdpa", case.sequence, case.plan[0].size)
    group, forward = mpu.get_sequence_parallel_group(), type(whole).__bases__[0].forward
    plan = SimpleNamespace(sp_backend="deepspeed", sp_size=case.sequence)

    def loss(self: nn.Module, tokens: Tensor, _: bool = False) -> Tensor:
        places = torch.arange(tokens.shape[1] - 1).expand(len(tokens), -1)
        parts = {"input_ids": tokens[:, :-1], "position_ids": places, "shift_labels": tokens[:, 1:]}
        inputs = {name: mine(part, group).contiguous() for name, part in parts.items()} | {"use_cache": False}
        return deepspeed_sp_compute_loss(None, lambda **given: forward(self, **given), inputs, False, plan) * factor

    type(whole).forward = loss
    mends = case.world > case.sequence  # on gloo, torch 2.13 takes ranks of a group for ranks of the world
    with mock.patch.object(functional, "all_gather", _gather) if mends else nullcontext():
        try:
            yield whole, mpu
        finally:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = before


class _Gather(torch.autograd.Function):
    """torch's differentiable all_gather, as it is on NCCL."""

    @staticmethod
    def forward(ctx: Any, group: Any, tensor: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, tensor.contiguous(), group=group)
        return tuple(gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        total = torch.stack(gradients)
        dist.all_reduce(total, group=ctx.group)
        return None, total[dist.get_rank(ctx.group)]


def _gather(tensor: Tensor, group: Any) -> tuple[Tensor, ...]:
    return _Gather.apply(group, tensor)
