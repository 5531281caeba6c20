"""What LENA's hooks add to forward and backward: the same model and tokens, with hooks and without, in one process.

    python -m benchmarks.hooks --out hooks.json

Under an engine a backward pass holds the hooks alone. In plain PyTorch the norms of the averaged gradient follow it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks import command, tables
from benchmarks.machine import describe
from benchmarks.models import POSITIONS, SIZES, build_model, random_tokens
from benchmarks.ready_made import PLAIN, LikeAnEngine
from benchmarks.roster import LENA, make
from benchmarks.timing import Lap, Samples, Update, compare, measure, warm_up

QUICK = {"model": "tiny", "tokens": [16, 64], "seconds": 0.5}
WITHOUT, HOOKS = "no optimizer", LENA["adamw"]
CONTESTANTS = (WITHOUT, HOOKS, HOOKS + PLAIN)
PHASE = "forward_backward"


def main() -> int:
    parser = command.parser(__doc__, seconds=30)
    parser.add_argument("--model", choices=SIZES, default="30m", help="default: 30m")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 1024], help=f"at most {POSITIONS}")
    args = command.parse(parser, QUICK)
    machine = describe()
    command.present(args, machine, run(args), as_tables)
    return 0


def run(args: argparse.Namespace) -> command.Found:
    """One case for each number of tokens."""
    device = command.one_process(args.threads)
    models = {name: _model(name, args.model, device) for name in CONTESTANTS}
    cases = []
    for count in args.tokens:
        tokens = random_tokens(args.model, (1, count), seed=0).to(device)
        cases.append({"tokens": count, "seconds": _measure(models, tokens, args)})
    return {"cases": cases, "left_out": {}}


def _measure(models: Mapping[str, tuple[Any, Any]], tokens: Tensor, args: argparse.Namespace) -> Samples:
    contestants = {name: _passes(model, lena, tokens) for name, (model, lena) in models.items()}
    warm_up(contestants, updates=2)
    stopwatch = command.stopwatch_for(tokens.device, args.clock)
    return measure(contestants, args.seconds, stopwatch, runs_ahead=tokens.device.type != "cpu")


def _model(name: str, size: str, device: torch.device) -> tuple[Any, Any]:
    """A model, and the LENA that watches it, if any."""
    torch.manual_seed(0)
    model = build_model(size).to(device)
    lena: Any = None if name == WITHOUT else make(HOOKS, model.parameters())
    if name == HOOKS:
        LikeAnEngine(lena)
    return model, lena


def _passes(model: Any, lena: Any, tokens: Tensor) -> Update:
    """Forward and backward into fresh gradients; then, in a phase that is not shown, the window is thrown away."""

    def update(lap: Lap) -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        lap(PHASE)
        model.zero_grad()
        if lena is not None:
            lena.end_update(applied=False)
        lap("clean")

    return update


def as_tables(results: Mapping[str, Any]) -> str:
    rows: tables.Rows = []
    for case in results["cases"]:
        rows += tables.versus([str(case["tokens"])], compare(case["seconds"], WITHOUT)[PHASE], WITHOUT)
    title = "Forward and backward of one micro-batch with LENA, as a multiple of the same without an optimizer:"
    return f"{title}\n\n{tables.table(['tokens', *tables.versus_head(WITHOUT)], rows)}"


if __name__ == "__main__":
    sys.exit(main())
