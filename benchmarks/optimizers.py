"""Optimizers alone: one process, plain PyTorch, fp32, all on the same weights and ready-made gradients.

    python -m benchmarks.optimizers                        in the shapes of GPT-2, the step against its rivals
    python -m benchmarks.optimizers --counts 100 10000     30 M elements in few and many tensors: the cost of a tensor

Those of one base rule take turns. The backward pass only adds the gradients, so what LENA adds to it are its hooks, and
the norms of the averaged gradient, which plain PyTorch takes at the end of every pass. "step" moves the parameters; for
LAMB and LARS it takes the norms of the trust ratios too.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import command
from benchmarks.contestants import ADAMW, LENA, SIZES, Chain, available, build_model, make, rivals
from benchmarks.timing import HEAD, Lap, Samples, Update, against, measure, table, versus, warm_up

QUICK = {"model": "tiny", "elements": 100_000, "tokens": 32, "seconds": 0.5}
PHASES = ("backward", "step", "update")
OURS = LENA["adamw"]


def main() -> int:
    parser = command.parser(__doc__, seconds=30)
    add = parser.add_argument
    add("--model", choices=SIZES, default="gpt2", help="default: gpt2, of 124 M parameters")
    add("--families", nargs="+", choices=LENA, default=list(LENA), help="default: all")
    add("--counts", type=int, nargs="+", default=[], help="numbers of tensors, two or more, instead")
    add("--elements", type=int, default=30_000_000, help="in all of them together; default: 30 million")
    add("--tokens", type=int, default=512, help="of the micro-batch of a network of as many tensors; default: 512")
    args = command.parse(parser, QUICK)
    if args.counts and len(set(args.counts)) < 2:
        parser.error("--counts: a line needs two different numbers")
    machine = command.describe()
    device = command.one_process(args.threads)
    tables, found = (count_tensors if args.counts else compare_families)(args, device)
    command.present("benchmarks.optimizers", args, machine, tables, found)
    return 0


def compare_families(args: argparse.Namespace, device: torch.device) -> tuple[str, Any]:
    """The table, and all samples by family."""
    weights = [weight.detach() for weight in build_model(args.model).to(device).parameters()]
    gradients = [torch.randn_like(weight) * 1e-3 for weight in weights]
    rows, found = [], {}
    for family in args.families:
        found_rivals = rivals(family, device)
        others = available(["AdamW, foreach", "DeepSpeedCPUAdam"], device) if family == "adamw" else []
        names = [*found_rivals, *others, LENA[family]]
        samples = found[family] = _measure({name: ready_made(name, weights, gradients) for name in names}, args, device)
        for rival in found_rivals:
            shown = samples if rival == ADAMW else {name: samples[name] for name in (rival, LENA[family])}
            rows += [row for phase in PHASES for row in versus([phase], shown, rival, phase)]
        print(f"{family}: done", file=sys.stderr)
    return table(["phase", *HEAD], rows), found


def count_tensors(args: argparse.Namespace, device: torch.device) -> tuple[str, Any]:
    """The tables, and all samples by number of tensors and of a real network with the largest number."""
    rows, found, most = [], {}, max(args.counts)
    for count in args.counts:
        weights, gradients = (torch.randn(count, args.elements // count, device=device).unbind() for _ in "wg")
        found[str(count)] = _measure(
            {name: ready_made(name, weights, gradients) for name in (ADAMW, OURS)}, args, device
        )
    network = f"network of {most}"
    found[network] = _measure({name: _network(name, most, args, device) for name in (ADAMW, OURS)}, args, device)
    for title, samples in found.items():
        rows += [row for phase in PHASES for row in versus([title, phase], samples, ADAMW, phase)]
    lines = {phase: added_line({count: found[str(count)] for count in args.counts}, phase) for phase in PHASES}
    fitted = [[phase, f"{1e6 * slope:.2f}", f"{1000 * intercept:.1f}"] for phase, (slope, intercept) in lines.items()]
    share = lines["update"][0] * most / statistics.median(found[network][ADAMW]["update"])
    said = f"By the line, {most} tensors cost {share:.1%} of the network's update with AdamW."
    tables = table(["tensors", "phase", *HEAD], rows), table(["LENA adds to", "µs per tensor", "and ms"], fitted), said
    return "\n\n".join(tables), found


def added_line(by_count: Mapping[int, Samples], phase: str) -> tuple[float, float]:
    """Seconds that LENA adds to a phase: slope and intercept over the number of tensors, by least squares."""
    added = [against(samples[OURS][phase], samples[ADAMW][phase])["added"] for samples in by_count.values()]
    slope, intercept = statistics.linear_regression(list(by_count), added)
    return slope, intercept


def _measure(contestants: Mapping[str, Update], args: argparse.Namespace, device: torch.device) -> Samples:
    gc.collect()  # the states of those before
    warm_up(contestants, updates=2)
    return measure(contestants, args.seconds, device)


def ready_made(name: str, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Update:
    """The update of an optimizer of its own in the memory of `weights` and of their `.grad` (both modified in place).

    `gradients`: what the backward pass adds.
    """
    parameters = [nn.Parameter(weight.detach()) for weight in weights]
    for parameter, weight in zip(parameters, weights, strict=True):
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        parameter.grad = weight.grad
    optimizer = make(name, parameters)

    return _update(optimizer, lambda: torch.autograd.backward(parameters, gradients))


def _network(name: str, tensors: int, args: argparse.Namespace, device: torch.device) -> Update:
    """The training of a chain; its phase "backward" is forward and backward."""
    torch.manual_seed(0)
    model = Chain(tensors, args.elements).to(device)
    inputs = torch.randn(args.tokens, model.width, device=device)
    optimizer = make(name, model.parameters())

    def backward() -> None:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()

    return _update(optimizer, backward)


def _update(optimizer: torch.optim.Optimizer, backward: Callable[[], None]) -> Update:
    def update(lap: Lap) -> None:
        backward()
        lap("backward")
        optimizer.step()
        lap("step")

    return update


if __name__ == "__main__":
    sys.exit(main())
