"""Optimizers alone: one process, fp32, in the shapes of GPT-2, all on the same weights and gradients.

    python -m benchmarks.optimizers --out optimizers.json

Optimizers of one family take turns, always with torch's fused AdamW among them, one family after the other, so that
no more than one family's states are in memory.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import command, tables
from benchmarks.machine import describe
from benchmarks.models import POSITIONS, SIZES, build_model, random_tokens
from benchmarks.ready_made import PLAIN, contestant, with_steps
from benchmarks.roster import LENA, REFERENCE, STOCK, available
from benchmarks.timing import Lap, Stopwatch, compare, count_syncs, measure, warm_up

QUICK = {"model": "tiny", "tokens": 64, "seconds": 0.5}
ALONE = ["AdamW, foreach", "DeepSpeedCPUAdam", "DeepSpeed FusedAdam"]
FAMILIES = {
    "adamw": [REFERENCE, *ALONE, LENA["adamw"] + PLAIN, LENA["adamw"]],
    **{base: [REFERENCE, STOCK[base], LENA[base]] for base in ("lamb", "lars", "sgd")},
}
MODEL_PASSES = 3


def main() -> int:
    args = arguments()
    machine = describe()
    command.present(args, machine, run(args), as_tables)
    return 0


def arguments() -> argparse.Namespace:
    parser = command.parser(__doc__, seconds=40)
    parser.add_argument("--model", choices=SIZES, default="gpt2", help="default: gpt2, of 124 M parameters")
    parser.add_argument("--tokens", type=int, default=512, help="of the model's own pass, for scale; default: 512")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="default: all")
    parser.add_argument("--contestants", nargs="+", help="of these families only some, beside the reference")
    parser.add_argument("--check-sync", action="store_true", help="CUDA: count what makes the host wait; no times")
    args = command.parse(parser, QUICK)
    if args.check_sync and not torch.cuda.is_available():
        parser.error("--check-sync needs CUDA")
    if not 2 <= args.tokens <= POSITIONS:
        parser.error(f"--tokens {args.tokens}: from 2 to {POSITIONS}")
    return args


def run(args: argparse.Namespace) -> command.Found:
    """One case for each family."""
    device = command.one_process(args.threads)
    stopwatch = command.stopwatch_for(device, args.clock)
    model = build_model(args.model).to(device)
    model_pass = _time_model(model, args, stopwatch)
    weights = [weight.detach() for weight in model.parameters()]
    gradients = [torch.randn_like(weight) * 1e-3 for weight in weights]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient.clone()
    cases: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for family in args.families:
        wanted = [n for n in FAMILIES[family] if n == REFERENCE or not args.contestants or n in args.contestants]
        names, missing = available([name.removesuffix(PLAIN) for name in wanted], device)
        left_out |= missing
        names = [name for name in wanted if name.removesuffix(PLAIN) in names]
        if names == [REFERENCE]:
            continue
        case = {"family": family, "model_pass": model_pass}
        cases.append(case | _run_family(names, weights, gradients, args, stopwatch))
        print(f"{family}: done", file=sys.stderr)
        gc.collect()  # the states
    return {"cases": cases, "left_out": left_out}


def _run_family(
    names: Sequence[str],
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    args: argparse.Namespace,
    stopwatch: Stopwatch,
) -> dict[str, Any]:
    contestants = {name: contestant(name, weights, gradients) for name in names}
    warm_up(contestants, updates=2)
    if args.check_sync:
        return {"syncs": {name: count_syncs(update) for name, update in contestants.items()}}
    runs_ahead = weights[0].device.type != "cpu"
    samples = with_steps(measure(contestants, args.seconds, stopwatch, runs_ahead))
    return {"seconds": samples}


def _time_model(model: nn.Module, args: argparse.Namespace, stopwatch: Stopwatch) -> float:
    """Seconds of one forward and backward pass of the model itself, the median of a few."""
    tokens = random_tokens(args.model, (1, args.tokens), seed=0).to(next(model.parameters()).device)

    def one_pass(lap: Lap) -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        model.zero_grad()

    one_pass(lambda phase: None)
    return statistics.median(stopwatch.time_whole(one_pass)["update"] for _ in range(MODEL_PASSES))


def as_tables(results: Mapping[str, Any]) -> str:
    cases = results["cases"]
    if "syncs" in cases[0]:
        return tables.syncs(["family"], [([case["family"]], case["syncs"]) for case in cases])
    whole, tokens = cases[0]["model_pass"], results["settings"]["tokens"]
    return "\n\n".join(
        [
            "The step, as a multiple of torch's fused AdamW:",
            _all_versus(cases, "step"),
            "The same against the stock optimizer with the same rule, where there is one:",
            _against_stock(cases),
            "LENA's step in two parts, and what its hooks add to a backward pass over ready-made gradients (in plain "
            "PyTorch with the norms of the averaged gradient, which are part of the step otherwise):",
            _parts(cases),
            f"A forward and backward pass of the model over {tokens} tokens takes {tables.ms(whole)} ms.",
        ]
    )


def _all_versus(cases: Sequence[Mapping[str, Any]], phase: str) -> str:
    rows: tables.Rows = []
    for case in cases:
        rows += tables.versus([case["family"]], compare(case["seconds"], REFERENCE)[phase], REFERENCE)
    return tables.table(["family", *tables.versus_head(REFERENCE)], rows)


def _against_stock(cases: Sequence[Mapping[str, Any]]) -> str:
    rows: tables.Rows = []
    for case in cases:
        stock, lena = STOCK[case["family"]], LENA[case["family"]]
        if {stock, lena} <= case["seconds"].keys():
            both = {name: case["seconds"][name] for name in (stock, lena)}
            rows += tables.versus([stock], compare(both, stock)["step"], stock)
    return tables.table(["stock", *tables.versus_head("stock")], rows)


def _parts(cases: Sequence[Mapping[str, Any]]) -> str:
    rows: tables.Rows = []
    for case in cases:
        hooks = compare(case["seconds"], REFERENCE)["backward"]
        for name in (name for name in case["seconds"] if name.startswith("LENA")):
            phases = case["seconds"][name]
            parts = [tables.ms(statistics.median(phases[p])) if p in phases else "" for p in ("measure", "move")]
            share = hooks[name]["added"]["median"] / case["model_pass"]
            step = tables.ms(statistics.median(phases["step"]))
            rows.append([name, step, *parts, tables.added(hooks[name]), f"{share:.1%}"])
    head = ["", "step ms", "norms and factors ms", "moving ms", "added to backward ms", "of the model's pass"]
    return tables.table(head, rows)


if __name__ == "__main__":
    sys.exit(main())
