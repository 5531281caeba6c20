"""A small language model as a list of layers: whole in one process, or as a PipelineModule of DeepSpeed.

The layers of a stage can be split over tensor-parallel ranks, too, by Megatron-core's communication.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.megatron_gpt import take_parts
from tests.helpers.model import VOCAB, WIDTH, Block

TIED, LAST = "embed", 5  # the layer that a tied model has at both ends; the last layer's number


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def as_head(embedding: nn.Embedding, x: Tensor) -> Tensor:
    return F.linear(x, embedding.weight)


class PipelineTwin(nn.Module):
    """`twin(tokens, _)` is the mean loss. Its parameters have the names that a PipelineModule gives them."""

    def __init__(self, is_tied: bool) -> None:
        super().__init__()
        self.is_tied = is_tied
        embedding = nn.Embedding(VOCAB, WIDTH)
        if is_tied:
            self.tied_modules = nn.ModuleDict({TIED: embedding})
        else:
            self.add_module("0", embedding)
        for number in (1, 2, 3):
            self.add_module(str(number), Block(key_bias=False, mix=None))
        self.add_module("4", nn.LayerNorm(WIDTH))
        if not is_tied:
            self.add_module(str(LAST), nn.Linear(WIDTH, VOCAB, bias=False))

    def forward(self, tokens: Tensor, _: bool = False) -> Tensor:
        x = (self.tied_modules[TIED] if self.is_tied else self.get_submodule("0"))(tokens[:, :-1])
        for number in (1, 2, 3, 4):
            x = self.get_submodule(str(number))(x)
        logits = as_head(self.tied_modules[TIED], x) if self.is_tied else self.get_submodule(str(LAST))(x)
        return loss_of(logits, tokens[:, 1:])


def stages_of(whole: PipelineTwin, stages: int, tensor: int) -> nn.Module:
    """A PipelineModule with this rank's part of the weights of `whole`, in float32."""
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    deepspeed.init_distributed("gloo")
    is_split = tensor > 1
    embedding, head = (_PartOfEmbedding, _part_as_head) if is_split else (nn.Embedding, as_head)
    if whole.is_tied:
        tied = (TIED, embedding, VOCAB, WIDTH)
        ends = [TiedLayerSpec(*tied), TiedLayerSpec(*tied, forward_fn=head)]
    else:
        ends = [LayerSpec(embedding, VOCAB, WIDTH), LayerSpec(nn.Linear, WIDTH, VOCAB, bias=False)]
    block = LayerSpec(_PartOfBlock) if is_split else LayerSpec(Block, key_bias=False, mix=None)
    layers = [ends[0], *[block] * 3, LayerSpec(nn.LayerNorm, WIDTH), ends[1]]
    grid = PipeModelDataParallelTopology(stages, tensor, torch.distributed.get_world_size() // (stages * tensor))
    model = PipelineModule(layers, loss_fn=loss_of, partition_method="uniform", topology=grid)
    take_parts(model, whole, model.mpu().get_tensor_model_parallel_rank())
    return model


# -- tensor parallelism -----------------------------------------------------------------------------------------------


def _halve(layer: nn.Module, name: str, dim: int) -> None:
    """Leave a tensor-parallel rank its part of a weight, and mark it as one."""
    from megatron.core import parallel_state

    ranks = parallel_state.get_tensor_model_parallel_world_size()
    part = nn.Parameter(getattr(layer, name).detach().chunk(ranks, dim)[0].clone())
    part.tensor_model_parallel, part.partition_dim = True, dim
    setattr(layer, name, part)


class _PartOfEmbedding(nn.Embedding):
    """Each rank has some columns."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        _halve(self, "weight", 1)

    def forward(self, tokens: Tensor) -> Tensor:
        from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

        return gather_from_tensor_model_parallel_region(super().forward(tokens))


def _part_as_head(embedding: nn.Embedding, x: Tensor) -> Tensor:
    from megatron.core.tensor_parallel import (
        reduce_from_tensor_model_parallel_region,
        scatter_to_tensor_model_parallel_region,
    )

    return reduce_from_tensor_model_parallel_region(
        F.linear(scatter_to_tensor_model_parallel_region(x), embedding.weight)
    )


class _Column(nn.Linear):
    """Each rank has some outputs."""

    def __init__(self, *sizes: int, bias: bool) -> None:
        super().__init__(*sizes, bias=bias)
        _halve(self, "weight", 0)
        if bias:
            _halve(self, "bias", 0)

    def forward(self, x: Tensor) -> Tensor:
        from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

        return super().forward(copy_to_tensor_model_parallel_region(x))


class _Row(nn.Linear):
    """Each rank has some inputs, and a copy of the bias."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        _halve(self, "weight", 1)

    def forward(self, x: Tensor) -> Tensor:
        from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region

        return reduce_from_tensor_model_parallel_region(F.linear(x, self.weight)) + self.bias


class _PartOfBlock(Block):
    """Each rank has some of the heads, and some of the inner units."""

    def __init__(self) -> None:
        super().__init__(key_bias=False, mix=None)
        for name in ("query", "key", "value"):
            self.attention.add_module(name, _Column(WIDTH, WIDTH, bias=name != "key"))
        self.attention.out = _Row(WIDTH, WIDTH)
        self.up, self.down = _Column(WIDTH, 4 * WIDTH, bias=True), _Row(4 * WIDTH, WIDTH)
