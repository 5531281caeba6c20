"""Ways to give every layer of a flat tensor its own learning rate: AdamW on one process, flat fp32 tensors.

    python -m benchmarks.designs --out designs.json

"kernel per layer" is what LENA does. "one learning rate" is another method, one call for the whole tensor: the bound.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim.adamw import adamw

from benchmarks import command, tables
from benchmarks.machine import describe
from benchmarks.models import build_model
from benchmarks.timing import Lap, Samples, Update, compare, measure, warm_up

QUICK = {"elements": 20_000, "seconds": 0.2}
BETAS, EPS, DECAY = (0.9, 0.999), 1e-8, 0.01
KERNEL: dict[str, Any] = {"beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS, "amsgrad": False, "maximize": False}
BOUND = "one learning rate"
BLOCK = 1 << 16  # elements that the caches hold


class Flat:
    """Weights, gradient and moments of all layers in flat tensors, and a learning rate for each layer."""

    def __init__(self, sizes: list[int]) -> None:
        generator = torch.Generator().manual_seed(0)
        total = sum(sizes)
        self.sizes = sizes
        self.weights, self.gradient = torch.randn(total, generator=generator), torch.full((total,), 1e-3)
        self.moments = torch.zeros(total), torch.zeros(total)
        self.count = torch.ones(())
        self.rates = torch.rand(len(sizes), generator=generator) * 1e-5
        self.by_size = torch.tensor(sizes)

    def pieces(self, sizes: list[int] | int) -> Any:
        return zip(*(t.split(sizes) for t in (self.weights, self.gradient, *self.moments)), strict=True)


def per_layer_by_torch_optim(flat: Flat) -> None:
    for (w, g, m, v), lr in zip(flat.pieces(flat.sizes), flat.rates.tolist(), strict=True):
        steps = [flat.count.clone()]
        adamw([w], [g], [m], [v], [], steps, foreach=False, fused=True, lr=lr, weight_decay=DECAY, **KERNEL)


def per_layer_by_kernel(flat: Flat) -> None:
    for (w, g, m, v), lr in zip(flat.pieces(flat.sizes), flat.rates.tolist(), strict=True):
        torch._fused_adamw_([w], [g], [m], [v], [], [flat.count], lr=lr, weight_decay=DECAY, **KERNEL)


def per_layer_by_tensor_rate(flat: Flat) -> None:
    for (w, g, m, v), lr in zip(flat.pieces(flat.sizes), flat.rates.unbind(), strict=True):
        torch._fused_adamw_([w], [g], [m], [v], [], [flat.count], lr=lr, weight_decay=DECAY, **KERNEL)


def rate_of_each_element(flat: Flat) -> None:
    """The moments and the step's direction for all layers at once, then as many learning rates as elements."""
    rates = torch.repeat_interleave(flat.rates, flat.by_size, output_size=flat.weights.numel())
    for (w, g, m, v), lr in zip(flat.pieces(BLOCK), rates.split(BLOCK), strict=True):
        direction = torch.zeros_like(w)
        torch._fused_adamw_([direction], [g], [m], [v], [], [flat.count], lr=1.0, weight_decay=0.0, **KERNEL)
        w.addcmul_(direction.sub_(w, alpha=DECAY), lr)


def one_rate(flat: Flat) -> None:
    tensors = [[t] for t in (flat.weights, flat.gradient, *flat.moments)]
    torch._fused_adamw_(*tensors, [], [flat.count], lr=1e-5, weight_decay=DECAY, **KERNEL)


DESIGNS: dict[str, Callable[[Flat], None]] = {
    BOUND: one_rate,
    "kernel per layer": per_layer_by_kernel,
    "kernel per layer, rate as a tensor": per_layer_by_tensor_rate,
    "torch.optim's function per layer": per_layer_by_torch_optim,
    "a rate for each element": rate_of_each_element,
}


def main() -> int:
    parser = command.parser(__doc__, seconds=20)
    parser.add_argument("--elements", type=int, default=30_000_000, help="in equal layers; default: 30 M")
    args = command.parse(parser, QUICK)
    machine = describe()
    command.present(args, machine, run(args), as_tables)
    return 0


def run(args: argparse.Namespace) -> command.Found:
    """One case for GPT-2's shapes, and one for each number of equal layers."""
    command.one_process(args.threads)
    size = "tiny" if args.quick else "gpt2"
    of_model = [parameter.numel() for parameter in build_model(size).parameters()]
    shapes = {f"{size}: {len(of_model)} layers": of_model}
    for count in (1000, 10_000):
        shapes[f"{count:,} equal layers"] = [max(1, args.elements // count)] * count
    cases = [
        {"layers": title, "elements": sum(sizes), "seconds": _measure(sizes, args)} for title, sizes in shapes.items()
    ]
    return {"cases": cases, "left_out": {}}


def _measure(sizes: list[int], args: argparse.Namespace) -> Samples:
    flat = Flat(sizes)
    contestants = {name: _update(design, flat) for name, design in DESIGNS.items()}
    warm_up(contestants, updates=1)
    return measure(contestants, args.seconds, command.stopwatch_for(torch.device("cpu"), args.clock), runs_ahead=False)


def _update(design: Callable[[Flat], None], flat: Flat) -> Update:
    def update(lap: Lap) -> None:
        design(flat)
        lap("step")

    return update


def as_tables(results: Mapping[str, Any]) -> str:
    rows: tables.Rows = []
    for case in results["cases"]:
        cells = [case["layers"], f"{case['elements'] / 1e6:.1f} M"]
        rows += tables.versus(cells, compare(case["seconds"], BOUND)["step"], BOUND)
    title = "A step of AdamW with a learning rate for each layer, as a multiple of one call with one learning rate:"
    return f"{title}\n\n{tables.table(['layers', 'elements', *tables.versus_head(BOUND)], rows)}"


if __name__ == "__main__":
    sys.exit(main())
