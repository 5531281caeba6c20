"""LENA's cost against the number of tensors, and against the number of micro-batches in an update. One process.

    python -m benchmarks.tensors --out tensors.json

The same number of elements in few and in many tensors: what an update with LENA takes longer than one with torch's
fused AdamW is fitted by a line. At the largest number a real network of as many tensors is trained as well.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks import command, tables
from benchmarks.machine import describe
from benchmarks.models import Chain
from benchmarks.ready_made import contestant, stepping, with_steps
from benchmarks.roster import LENA, REFERENCE, make
from benchmarks.timing import Lap, Samples, Update, compare, fit_line, measure, warm_up

QUICK = {
    "counts": [10, 100],
    "elements": 100_000,
    "accumulation": [1, 2],
    "passes_on": 50,
    "tokens": 32,
    "seconds": 0.5,
}
NAMES = (REFERENCE, LENA["adamw"])
OURS = LENA["adamw"]


def main() -> int:
    parser = command.parser(__doc__, seconds=20)
    add = parser.add_argument
    add("--counts", type=int, nargs="+", default=[100, 300, 1000, 3000, 10000], help="of tensors, two or more")
    add("--elements", type=int, default=30_000_000, help="in all tensors together; default: 30 million")
    add("--accumulation", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="micro-batches, two or more numbers")
    add("--passes-on", type=int, default=1000, help="tensors while micro-batches vary; default: 1000")
    add("--tokens", type=int, default=512, help="of the network's micro-batch; default: 512")
    args = command.parse(parser, QUICK)
    if min(len(set(args.counts)), len(set(args.accumulation))) < 2:
        parser.error("--counts, --accumulation: a line needs two different numbers")
    machine = describe()
    command.present(args, machine, run(args), as_tables)
    return 0


def run(args: argparse.Namespace) -> command.Found:
    """Cases of three kinds: "tensors", "passes" and "network"."""
    device = command.one_process(args.threads)
    ready_made = [("tensors", count, 1) for count in args.counts]
    ready_made += [("passes", args.passes_on, passes) for passes in args.accumulation]
    cases = []
    for kind, tensors, passes in ready_made:
        contestants = _ready_made(tensors, passes, args.elements, device)
        cases.append(
            {"kind": kind, "tensors": tensors, "passes": passes, "seconds": _measure(contestants, args, device)}
        )
        _done(cases[-1])
    network = {"kind": "network", "tensors": max(args.counts) // 2 * 2, "passes": 1}
    cases.append(network | {"seconds": _measure(_networks(network["tensors"], args, device), args, device)})
    _done(cases[-1])
    return {"cases": cases, "left_out": {}}


def _ready_made(tensors: int, passes: int, elements: int, device: torch.device) -> dict[str, Update]:
    weights = list(torch.randn(tensors, elements // tensors, device=device).unbind())
    gradients = list(torch.randn(tensors, elements // tensors, device=device).mul_(1e-3).unbind())
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient.clone()
    return {name: contestant(name, weights, gradients, passes) for name in NAMES}


def _networks(tensors: int, args: argparse.Namespace, device: torch.device) -> dict[str, Update]:
    return {name: _network(name, tensors, args, device) for name in NAMES}


def _network(name: str, tensors: int, args: argparse.Namespace, device: torch.device) -> Update:
    """The training of a chain; its phase "backward" is forward and backward."""
    torch.manual_seed(0)
    model = Chain(tensors, args.elements).to(device)
    inputs = torch.randn(args.tokens, model.width, device=device)
    step = stepping(make(name, model.parameters()))

    def update(lap: Lap) -> None:
        model(inputs).square().mean().backward()
        lap("backward")
        step(lap)
        model.zero_grad()

    return update


def _measure(contestants: Mapping[str, Update], args: argparse.Namespace, device: torch.device) -> Samples:
    warm_up(contestants, updates=2)
    gc.collect()  # the states of the case before
    stopwatch = command.stopwatch_for(device, args.clock)
    return with_steps(measure(contestants, args.seconds, stopwatch, runs_ahead=device.type != "cpu"))


def _done(case: Mapping[str, Any]) -> None:
    print(f"{case['kind']}: {case['tensors']} tensors, {case['passes']} micro-batches", file=sys.stderr)


def as_tables(results: Mapping[str, Any]) -> str:
    kinds = {kind: list(group) for kind, group in itertools.groupby(results["cases"], key=lambda case: case["kind"])}
    elements = f"{results['settings']['elements'] / 1e6:g} million elements"
    return "\n\n".join(
        [
            f"Ready-made gradients, {elements}, in more and more tensors:",
            _versus(kinds["tensors"], "tensors"),
            _lines(kinds["tensors"], "tensors"),
            f"The same in {kinds['passes'][0]['tensors']} tensors, with more and more micro-batches in an update:",
            _versus(kinds["passes"], "passes"),
            _lines(kinds["passes"], "passes"),
            f"A training step of a network of {kinds['network'][0]['tensors']} tensors, forward and backward included:",
            _versus(kinds["network"], "tensors"),
            _share(kinds["tensors"], kinds["network"][0]),
        ]
    )


def _versus(cases: Sequence[Mapping[str, Any]], counted: str) -> str:
    rows: tables.Rows = []
    for case in cases:
        compared = compare(case["seconds"], REFERENCE)
        for phase in ("backward", "step", "update"):
            rows += tables.versus([str(case[counted]), phase], compared[phase], REFERENCE)
    return tables.table([counted, "phase", *tables.versus_head(REFERENCE)], rows)


def added_line(cases: Sequence[Mapping[str, Any]], counted: str, phase: str) -> dict[str, float]:
    """Seconds that LENA adds to a phase, as a line over what was counted, through the medians within rounds."""
    added = [compare(case["seconds"], REFERENCE)[phase][OURS]["added"]["median"] for case in cases]
    return fit_line([case[counted] for case in cases], added)


def _lines(cases: Sequence[Mapping[str, Any]], counted: str) -> str:
    rows = []
    for phase in ("backward", "step", "update"):
        line = added_line(cases, counted, phase)
        rows.append([phase, f"{1e6 * line['slope']:.2f}", tables.ms(line["intercept"])])
    return tables.table(["LENA adds to", f"µs for each of the {counted}", "and ms"], rows)


def _share(cases: Sequence[Mapping[str, Any]], network: Mapping[str, Any]) -> str:
    """The line's cost of the tensors in terms of the network's step."""
    cost = added_line(cases, "tensors", "update")["slope"] * network["tensors"]
    whole = compare(network["seconds"], REFERENCE)["update"][REFERENCE]["median"]
    return (
        f"By the line above, {network['tensors']} tensors cost {tables.ms(cost)} ms, "
        f"{cost / whole:.1%} of this step with AdamW."
    )


if __name__ == "__main__":
    sys.exit(main())
