"""The model and the data of scripts/hf_growth.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

BATCH, ACCUMULATION, RANKS = 2, 2, 2
SAMPLES = 88  # 22 micro-batches of a rank in an epoch
BUDGET = 148.0  # samples: 37 micro-batches of a rank
LR = 3e-3
SPOILED = 3  # the micro-batch whose loss is NaN on one rank, in the second update
LENGTH, VOCAB = 8, 96


def sample(number: int) -> dict[str, Tensor]:
    """Its first token is its number. A part of its labels do not count, another part in each."""
    tokens = torch.randint(VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(number))
    tokens[0] = number
    labels = tokens.clone()
    labels[LENGTH - number % 5 :] = -100
    return {"input_ids": tokens, "labels": labels}


class Tokens(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return sample(number)


class Endless(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """Data without a length, which may end."""

    def __init__(self, end: int | None = None) -> None:
        self.end = end

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        number = 0
        while number != self.end:
            yield sample(number % SAMPLES)
            number += 1


def model(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    size = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": LENGTH, "vocab_size": VOCAB}
    return GPT2LMHeadModel(GPT2Config(**size, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0))
