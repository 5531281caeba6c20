"""Megatron-core's GPT on the CPU, tensor-parallel over gloo ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.gpt_twin import HEADS, LAYERS, LENGTH, VOCAB, WIDTH


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Megatron-core asks for the current CUDA device, and keeps random states of CUDA. Here there is none."""
    from megatron.core.tensor_parallel import random

    class NoStates:
        def fork(self, *_: Any) -> contextlib.AbstractContextManager[None]:
            return contextlib.nullcontext()

        def add(self, *_: Any) -> None: ...

        def is_initialized(self) -> bool:
            return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: "cpu")
        patch.setattr(torch.cuda, "synchronize", lambda *_: None)
        patch.setattr(random, "_get_all_rng_states", lambda: ())
        patch.setattr(random, "_set_all_rng_states", lambda *_: None)
        patch.setattr(random, "_CUDA_RNG_STATE_TRACKER", NoStates())
        patch.setattr(random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True)
        yield


@contextlib.contextmanager
def megatrons_groups(**sizes: int) -> Iterator[Any]:
    """Megatron-core's `parallel_state`, with groups of these sizes."""
    from megatron.core import parallel_state

    with on_cpu():
        parallel_state.initialize_model_parallel(**sizes)
        try:
            yield parallel_state
        finally:
            parallel_state.destroy_model_parallel()


def name_in_whole(name: str, model: nn.Module) -> str:
    """Of a parameter of Megatron's GPT. Each of two stages has one layer, and the last a copy of a tied embedding."""
    if getattr(model, "pre_process", True):
        return name
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    return name.replace("layers.0.", "layers.1.")


@torch.no_grad()
def take_parts(model: nn.Module, whole: nn.Module, rank: int) -> None:
    """Give a tensor-parallel rank's model its parts of the weights of `whole`, by their names."""
    weights = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        weight = weights[name_in_whole(name, model)]
        for dim, (part, size) in enumerate(zip(parameter.shape, weight.shape, strict=True)):
            if part != size:
                weight = weight.narrow(dim, rank * part, part)
        parameter.copy_(weight)


def megatron_gpt(tensor: int, sequence_parallel: bool, tied: bool, head_norms: bool, pipe: int = 1) -> nn.Module:
    """`model(tokens, _)` is the mean loss, as the twin's. On a stage before the last: what it hands on."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    class Norm(nn.LayerNorm):
        """Megatron's own wrapper of torch's norm does not take sequence_parallel."""

        def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
            super().__init__(hidden_size, eps)
            for parameter in self.parameters():
                parameter.sequence_parallel = config.sequence_parallel

    class Gpt(GPTModel):
        def forward(self, tokens: Tensor, _: bool = False) -> Tensor:
            places = torch.arange(LENGTH).expand(len(tokens), -1)
            future = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
            result = super().forward(tokens[:, :-1], places, future, labels=tokens[:, 1:])
            return result.mean() if self.post_process else result

    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipe,
        pipeline_dtype=torch.float32,
        batch_p2p_comm=False,
        sequence_parallel=sequence_parallel,
        qk_layernorm=head_norms,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=False,
    )
    layer = get_gpt_layer_local_spec(qk_layernorm=head_norms)
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = Norm
    if head_norms:
        parts.self_attention.submodules.q_layernorm = parts.self_attention.submodules.k_layernorm = Norm
    block = TransformerBlockSubmodules(layer_specs=[layer] * (LAYERS // pipe), layer_norm=Norm)
    stage = {
        "pre_process": parallel_state.is_pipeline_first_stage(),
        "post_process": parallel_state.is_pipeline_last_stage(),
    }
    return Gpt(config, block, VOCAB, LENGTH, share_embeddings_and_output_weights=tied, **stage)
