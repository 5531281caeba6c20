"""The language models that are compared, from what `studies.yaml` says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from ..common.models import Shape, bert, gpt2, modernbert

MASKED = ("bert", "modernbert")
"""Architectures that predict masked tokens; the others predict the next one."""


def build(model: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, length: int) -> nn.Module:
    """A model for blocks of `length` tokens, with the settings in which this comparison differs from the examples.

    Args:
        model: `architecture` (a key of `ARCHITECTURES`), `layers`, `width`, `heads`, `initializer_range`.
    """
    architecture, width = model["architecture"], model["width"]
    more = {
        "gpt2": {"use_cache": False},
        "bert": {},
        # Gated, so twice the intermediate size is computed.
        "modernbert": {"local_attention": length, "intermediate_size": 2 * width, "attn_implementation": "sdpa"},
        "llama": {"use_cache": False},
    }[architecture]
    shape = model["layers"], width, model["heads"]
    return ARCHITECTURES[architecture](shape, tokenizer, length, initializer_range=model["initializer_range"], **more)


def _llama(shape: Shape, tokenizer: PreTrainedTokenizerFast, length: int, **more: Any) -> nn.Module:
    layers, width, heads = shape
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=length,
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=5 * width // 2,  # three matrices: near the 8/3 of the published ones
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **more,
    )
    return AutoModelForCausalLM.from_config(config)


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "gpt2": gpt2,
    "bert": bert,
    "modernbert": modernbert,
    "llama": _llama,
}
