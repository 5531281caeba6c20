"""The language models that are compared, from what `studies.yaml` says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from ..common.models import bert, gpt2, modernbert

MASKED = ("bert", "modernbert")
"""Architectures that predict masked tokens; the others predict the next one."""


def build(model: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, length: int) -> nn.Module:
    """A model for blocks of `length` tokens.

    Args:
        model: `architecture` (a key of `ARCHITECTURES`), `layers`, `width`, `heads`, `initializer_range`.
    """
    return ARCHITECTURES[model["architecture"]](model, tokenizer, length)


def _shared(model: Mapping[str, Any]) -> dict[str, Any]:
    return {"shape": (model["layers"], model["width"], model["heads"]), "initializer_range": model["initializer_range"]}


def _gpt2(model: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, length: int) -> nn.Module:
    return gpt2(tokenizer=tokenizer, length=length, use_cache=False, **_shared(model))


def _bert(model: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, length: int) -> nn.Module:
    return bert(tokenizer=tokenizer, length=length, **_shared(model))


def _modernbert(model: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, length: int) -> nn.Module:
    # Gated, so twice the intermediate size is computed.
    more = {"local_attention": length, "intermediate_size": 2 * model["width"], "attn_implementation": "sdpa"}
    return modernbert(tokenizer=tokenizer, length=length, **_shared(model), **more)


def _llama(model: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, length: int) -> nn.Module:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=length,
        num_hidden_layers=model["layers"],
        hidden_size=model["width"],
        num_attention_heads=model["heads"],
        intermediate_size=5 * model["width"] // 2,  # three matrices: near the 8/3 of the published ones
        initializer_range=model["initializer_range"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=False,
    )
    return AutoModelForCausalLM.from_config(config)


ARCHITECTURES: dict[str, Callable[[Mapping[str, Any], PreTrainedTokenizerFast, int], nn.Module]] = {
    "gpt2": _gpt2,
    "bert": _bert,
    "modernbert": _modernbert,
    "llama": _llama,
}
