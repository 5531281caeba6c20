"""Training in plain PyTorch, one process."""

from __future__ import annotations

import argparse

import torch

from benchmarks.models import build_model, random_tokens
from benchmarks.roster import make
from benchmarks.timing import Lap, Update


def make_trainer(optimizer: str, args: argparse.Namespace, device: torch.device) -> tuple[Update, int]:
    """The function that trains for one update of one micro-batch, and how many parameters it trains.

    `args`: model, tokens and precision.
    """
    torch.manual_seed(0)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    model = build_model(args.model).to(device, dtype)
    made = make(optimizer, model.parameters())
    tokens = random_tokens(args.model, (1, args.tokens), seed=0).to(device)

    def update(lap: Lap) -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        lap("forward_backward")
        made.step()
        made.zero_grad()
        lap("step")

    return update, sum(parameter.numel() for parameter in model.parameters())
