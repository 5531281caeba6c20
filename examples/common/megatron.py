"""A GPT of Megatron-core, split over tensor-parallel ranks, on GPUs or on the CPU."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import random
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from .options import option


@dataclass
class MegatronArguments:
    """The model, and how it is split."""

    tensor_parallel: int = option(2, "Ranks over which tensors are split.")
    sequence_parallel: bool = option(False, "Split layer norms over the same ranks by the places of a sequence.")
    layers: int = option(4, "Transformer layers.")
    hidden_size: int = option(128, "Width.")
    heads: int = option(4, "Attention heads, a multiple of the tensor-parallel ranks.")


class Norm(nn.LayerNorm):
    """torch's layer norm with the mark of Megatron, whose own wrapper of it does not take sequence_parallel."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel


class Gpt(GPTModel):
    """`model(blocks)`, blocks (batch, length): the mean loss of each next token, in nats."""

    def forward(self, blocks: Tensor) -> Tensor:
        places = torch.arange(blocks.shape[1], device=blocks.device)
        future = (places > places[:, None])[None, None]
        losses = super().forward(blocks, places.expand(len(blocks), -1), future, labels=blocks.roll(-1, dims=1))
        return losses[:, :-1].mean()  # the last token has no next one


def build(args: MegatronArguments, vocab_size: int, length: int, seed: int, bf16: bool) -> Gpt:
    """This rank's part of the model. `initialize_model_parallel` has been called."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
    else:
        _without_gpu()
    config = TransformerConfig(
        num_layers=args.layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.heads,
        tensor_model_parallel_size=args.tensor_parallel,
        sequence_parallel=args.sequence_parallel,
        use_cpu_initialization=not on_gpu,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    layer = get_gpt_layer_local_spec()
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    block = TransformerBlockSubmodules(layer_specs=[layer] * args.layers, layer_norm=Norm)
    rows = -(-vocab_size // args.tensor_parallel) * args.tensor_parallel  # each rank has as many of the vocabulary
    return Gpt(config, block, rows, length, share_embeddings_and_output_weights=True)


def data_parallel_rank() -> tuple[int, int]:
    """This rank among those that have data of their own, and their number."""
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


class _NoStates:
    """Megatron keeps random states of CUDA, for dropout. Here there is neither."""

    def fork(self, *_: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def add(self, *_: Any) -> None: ...

    def is_initialized(self) -> bool:
        return True


def _without_gpu() -> None:
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    random._CUDA_RNG_STATE_TRACKER, random._CUDA_RNG_STATE_TRACKER_INITIALIZED = _NoStates(), True
