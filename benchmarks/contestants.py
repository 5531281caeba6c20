"""What is compared: LENA and torch's fused AdamW, on GPT-2s from scratch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import ds_lena

POSITIONS = 1024
KEYS: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


@dataclass(frozen=True)
class Size:
    """Of a GPT-2."""

    layers: int
    width: int
    heads: int
    vocabulary: int


SIZES = {
    "tiny": Size(layers=2, width=128, heads=2, vocabulary=1024),  # 0.7 M parameters in 28 tensors
    "30m": Size(layers=8, width=512, heads=8, vocabulary=8192),  # 29.9 M in 100
    "gpt2": Size(layers=12, width=768, heads=12, vocabulary=50257),  # 124.4 M in 148, the published GPT-2
}


def build_model(name: str) -> GPT2LMHeadModel:
    """Without dropout: its random numbers take time that has nothing to do with the optimizer."""
    size = SIZES[name]
    config = GPT2Config(
        vocab_size=size.vocabulary,
        n_positions=POSITIONS,
        n_layer=size.layers,
        n_embd=size.width,
        n_head=size.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # transformers cannot tell from the name of the class, and warns
    return model


def random_tokens(model: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Token ids for the model of this name."""
    return torch.randint(SIZES[model].vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def make_optimizer(name: str, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """`name`: "adamw" or "lena", with the same update rule."""
    if name == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **KEYS)
    return ds_lena.LENA(parameters, total_steps=1_000_000, **KEYS)
