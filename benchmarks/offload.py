"""The optimizer step on the CPU: one flat fp32 tensor, of which LENA moves each piece with a rate of its own.

    python -m benchmarks.offload                   100 M elements in 148 pieces
    python -m benchmarks.offload --pieces 1000

DeepSpeedCPUAdam moves the whole tensor at once. LENA does it by DeepSpeed's kernel, or by torch's. They take turns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import command
from benchmarks.timing import HEAD, Lap, Update, measure, table, versus, warm_up
from ds_lena.integrations.deepspeed._internals.cpu_adam import adamw_on_cpu
from ds_lena.layouts.layout import Segment
from ds_lena.update.apply import Applier, Rates
from ds_lena.update.rules import RULES, Rule, adamw
from ds_lena.update.segments import cut_flat

QUICK = {"elements": 100_000, "pieces": 10, "seconds": 0.5}
STOCK = "DeepSpeedCPUAdam"


def main() -> int:
    parser = command.parser(__doc__, seconds=60)
    add = parser.add_argument
    add("--elements", type=int, default=100_000_000, help="default: 100 million")
    add("--pieces", type=int, default=148, help="default: 148")
    args = command.parse(parser, QUICK)
    machine = command.describe()
    command.one_process(args.threads)
    tables, found = compare(args)
    command.present("benchmarks.offload", args, machine, tables, found)
    return 0


def compare(args: argparse.Namespace) -> tuple[str, Any]:
    """The table, and all samples."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    flat = nn.Parameter(torch.randn(args.elements))
    flat.grad = torch.randn_like(flat) * 1e-3
    kernel = adamw_on_cpu()
    if kernel is adamw.move:
        sys.exit("DeepSpeed's kernel cannot be compiled here")
    contestants = {
        STOCK: _update(DeepSpeedCPUAdam([flat], lr=1e-5, weight_decay=0.01).step),
        "LENA, DeepSpeed's kernel": _update(_lena(flat, args.pieces, kernel)),
        "LENA, torch's kernel": _update(_lena(flat, args.pieces, adamw.move)),
    }
    warm_up(contestants, updates=2)
    samples = measure(contestants, args.seconds, torch.device("cpu"))
    return table(HEAD, versus([], samples, STOCK, "step")), samples


def _lena(flat: Tensor, pieces: int, move: Callable[..., None]) -> Callable[[], None]:
    borders = [i * flat.numel() // pieces for i in range(pieces + 1)]
    segments = [Segment(i, borders[i], borders[i + 1] - borders[i], 0) for i in range(pieces)]
    cut = cut_flat(flat.numel(), segments, list(range(pieces)), [True] * pieces)
    applier = Applier(Rule(RULES["adamw"].buffers, move), {flat: cut})
    group = {"params": [flat], "lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    state: dict[Tensor, dict[str, Any]] = {flat: {}}
    rates = torch.linspace(1, 2, pieces, dtype=torch.float64)

    def step() -> None:
        with torch.no_grad():
            applier.apply([group], state, Rates(rates))

    return step


def _update(step: Callable[[], object]) -> Update:
    def update(lap: Lap) -> None:
        step()
        lap("step")

    return update


if __name__ == "__main__":
    sys.exit(main())
