"""A small language model as a list of layers: whole in one process, or as a PipelineModule of DeepSpeed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def stages_of(whole: PipelineTwin, stages: int) -> nn.Module:
    """A PipelineModule with the weights of `whole`, in float32."""
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    deepspeed.init_distributed("gloo")
    if whole.is_tied:
        embedding = (nn.Embedding, VOCAB, WIDTH)
        ends = [TiedLayerSpec(TIED, *embedding), TiedLayerSpec(TIED, *embedding, forward_fn=as_head)]
    else:
        ends = [LayerSpec(nn.Embedding, VOCAB, WIDTH), LayerSpec(nn.Linear, WIDTH, VOCAB, bias=False)]
    inner = [LayerSpec(Block, key_bias=False, mix=None)] * 3 + [LayerSpec(nn.LayerNorm, WIDTH)]
    model = PipelineModule([ends[0], *inner, ends[1]], num_stages=stages, loss_fn=loss_of, partition_method="uniform")
    weights = dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model
