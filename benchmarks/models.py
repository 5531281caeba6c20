"""The models that are trained, from scratch: GPT-2s, and a chain of many small tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

POSITIONS = 1024


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


def build_model(name: str) -> Any:
    """Without dropout: its random numbers take time that has nothing to do with the optimizer."""
    from transformers import GPT2Config, GPT2LMHeadModel  # slow to import, and not needed for every benchmark

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


class Chain(nn.Module):
    """A deep and narrow residual network of `tensors` tensors, half of them biases, of about `elements` in all."""

    def __init__(self, tensors: int, elements: int) -> None:
        super().__init__()
        self.width = chain_width(tensors, elements)
        self.layers = nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(tensors // 2))

    def forward(self, x: Tensor) -> Tensor:
        scale = len(self.layers) ** -0.5  # so that the sum stays finite, however long the chain
        for layer in self.layers:
            x = torch.add(x, layer(torch.relu(x)), alpha=scale)
        return x


def chain_width(tensors: int, elements: int) -> int:
    """Width w of square layers, of w (w + 1) elements each, so that tensors / 2 of them hold at most `elements`."""
    each = elements / (tensors // 2)
    return max(int((math.sqrt(1 + 4 * each) - 1) / 2), 1)
