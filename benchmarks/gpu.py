"""All that is measured on one GPU, in parts: `bash benchmarks/gpu.sh OUT` runs them, each in a process of its own.

    python -m benchmarks.gpu PART --out OUT [--seconds 100] [--quick]

    smoke     LENA trains: AdamW and LAMB in plain PyTorch and at ZeRO-2
    parity    the tests of tests/parity/test_gpu.py, against the float64 reference
    table     whole updates and their steps beside DeepSpeed's FusedAdam, and how often the host waits for the GPU
    profile   launches, and what takes longest, at ZeRO-2, in GPT-2 of 124 M and 1.5 B parameters
    step      the move alone: one flat tensor of 124 M elements in 148 and in 10,000 pieces

A part prints each result as soon as it has it, and then saves all that it has: PART.json and PART.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ds_lena
from benchmarks import command, contestants, engines
from benchmarks.contestants import ADAMW, FUSED_ADAM, LENA, build_model
from benchmarks.profiling import COLUMNS, profile, summary
from benchmarks.timing import Lap, Samples, Update, against, count_syncs, measure, table, warm_up
from ds_lena.layouts.layout import Segment
from ds_lena.update.apply import Applier, Rates
from ds_lena.update.rules import RULES
from ds_lena.update.segments import cut_flat


class Report:
    """The rows of one part and all that was measured, saved after every row."""

    def __init__(self, args: argparse.Namespace, head: Sequence[str]) -> None:
        self._args, self._head = args, list(head)
        self._machine = command.describe()
        self._rows: list[list[str]] = []
        self._found: list[Any] = []
        self._after: list[str] = []
        self._start = time.monotonic()
        self.failed = 0
        print(f"\n## {args.part}\n\n{self._machine}\n\n{table(head, [])}", flush=True)

    def add(self, row: Sequence[str], found: Any) -> None:
        self._rows.append(list(row))
        self._found.append(found)
        print(f"| {' | '.join(row)} |", flush=True)
        self._save()

    def text(self, text: str) -> None:
        """Tables after the rows."""
        self._after.append(text)
        print(f"\n{text}", flush=True)
        self._save()

    def fail(self, name: str) -> None:
        """A row for what has just raised."""
        self.failed += 1
        traceback.print_exc()
        error = traceback.format_exc()
        last = error.strip().splitlines()[-1].replace("|", "/")
        self.add([name, f"FAILED: {last[:300]}"], {"name": name, "error": error})

    def seconds_left(self) -> float:
        return float(self._args.seconds) - (time.monotonic() - self._start)

    def _save(self) -> None:
        path = self._args.out / self._args.part
        results = {"machine": self._machine, "part": self._args.part, "found": self._found, "text": self._after}
        path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        rows = [row + [""] * (len(self._head) - len(row)) for row in self._rows]
        texts = [f"## {self._args.part}", self._machine, table(self._head, rows), *self._after]
        path.with_suffix(".md").write_text("\n\n".join(texts) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("part", choices=PARTS)
    add("--out", type=Path, required=True, help="folder for the results")
    add("--seconds", type=float, default=600.0, help="begin no case later than this; default: 600")
    add("--quick", action="store_true", help="tiny sizes, also without a GPU: whether it runs, not how fast")
    args = parser.parse_args()
    if not (args.quick or torch.cuda.is_available()):
        parser.error("needs a GPU that torch sees through CUDA; --quick tries the program without one")
    args.out.mkdir(parents=True, exist_ok=True)
    return PARTS[args.part](args)


def join() -> torch.device:
    """Become the only rank; returns its device."""
    found = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(found | {"MASTER_PORT": str(command.free_port())})
    return engines.join(threads=1)


# -- smoke -------------------------------------------------------------------------------------------------------------


def smoke(args: argparse.Namespace) -> int:
    """Fails if nothing works; a fault in one place is for the other parts to show."""
    report = Report(args, ["LENA", "result"])
    device = join()
    cases = list(itertools.product(("adamw", "lamb"), ("plain", 2), ("bf16",)))
    for base, stage, precision in cases:
        name = f"{base}, {f'ZeRO-{stage}' if stage != 'plain' else 'plain PyTorch'}, {precision}"
        try:
            if stage == "plain":
                _train_plain(base, precision, device)
            else:
                _train(base, int(stage), precision)
        except Exception:
            report.fail(name)
        else:
            report.add([name, "ok"], {"name": name})
    return 1 if report.failed == len(cases) else 0


def _train_plain(base: str, precision: str, device: torch.device) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    shapes = [(64, 32), (1,), (7,), (33, 5)]
    weights = [torch.nn.Parameter(torch.ones(shape, dtype=dtype, device=device)) for shape in shapes]
    optimizer = contestants.make(LENA[base], weights)
    for _ in range(2):
        sum(weight.square().sum() for weight in weights).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(bool(torch.isfinite(weight).all()) for weight in weights), "weights are not finite"


def _train(base: str, stage: int, precision: str) -> None:
    case = Case(model="tiny", base=base, stage=stage, precision=precision, accumulation=2, tokens=32)
    running, updates = case.start([LENA[base]])
    try:
        (engine,) = running.values()
        found = ds_lena.report(engine)
        assert found["update"] == 1, f"{found['update']} updates reported after one"
        assert all(math.isfinite(layer["factor"]) for layer in found["layers"].values()), "a factor is not finite"
    finally:
        updates.clear()
        engines.end(running)


# -- parity ------------------------------------------------------------------------------------------------------------

DISTANCES = ["share of path", "displacement error", "displacement error, copy on the CPU", "between the references"]


def parity(args: argparse.Namespace) -> int:
    """The tests, with their distances from the reference."""
    import pytest

    report = Report(args, ["test", "result", *DISTANCES])

    class Rows:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                add(report)

    def add(test: Any) -> None:
        seen, name = dict(test.user_properties), test.nodeid.rpartition("[")[2].rstrip("]")
        report.add(
            [name, test.outcome, *(f"{seen[key]:.1e}" if key in seen else "" for key in DISTANCES)],
            {"name": name, "outcome": test.outcome, **seen, "error": test.longreprtext},
        )
        if test.failed:
            print(test.longreprtext[-700:], flush=True)

    if args.quick:
        os.environ["TEST_DEVICE"] = "cpu"
    words = ["tests/parity/test_gpu.py", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider"]
    return int(pytest.main([*words, *(["-k", "zero2 and adamw"] if args.quick else [])], plugins=[Rows()]))


# -- table, profile ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One training. `rivals`: how many besides LENA, the first of FusedAdam and torch's fused AdamW that can be had."""

    model: str = "gpt2"
    base: str = "adamw"
    stage: int = 2
    precision: str = "bf16"
    accumulation: int = 1
    micro_batch: int = 1
    tokens: int = 1024
    clipping: float = 1.0
    rivals: int = 1
    seconds: float = 8.0

    def __str__(self) -> str:
        where = f"{self.model}, {self.base}, ZeRO-{self.stage}, {self.micro_batch}x{self.tokens}"
        return f"{where}, accumulation {self.accumulation}"

    def names(self, device: torch.device) -> list[str]:
        return [*contestants.available([FUSED_ADAM, ADAMW], device)[: self.rivals], LENA[self.base]]

    def start(self, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, Update]]:
        args = argparse.Namespace(**vars(self))
        return engines.start(names, args, self.stage, self.accumulation, self.tokens)


CASES = (
    Case(micro_batch=8, rivals=2, seconds=20),
    Case(micro_batch=8, stage=1, accumulation=4, seconds=18),
    Case(micro_batch=8, stage=3, seconds=18),
    Case(micro_batch=1, seconds=12),
    Case(micro_batch=8, stage=0, rivals=2, seconds=14),
    Case(micro_batch=8, base="lamb", seconds=12),
    Case(micro_batch=2, model="gpt2-xl", seconds=24),
    Case(micro_batch=8, stage=1, seconds=12),
    Case(micro_batch=8, stage=2, accumulation=4, seconds=10),
)
TINY = (
    Case(model="tiny", tokens=64, seconds=0.5),
    Case(model="tiny", tokens=64, seconds=0.5, base="lamb", stage=0, accumulation=2),
)
COMPARED = ["rounds", "rival, ms", "ms", "ratio of medians", "of minima", "within rounds",
            "step: rival, ms", "ms", "ratio", "waits: rival", "own"]  # fmt: skip


def whole_updates(args: argparse.Namespace) -> int:
    """A row for every contestant but the first, the rival."""
    report = Report(args, ["case", "rival", "optimizer", *COMPARED])
    device = join()
    for case in TINY if args.quick else CASES:
        if report.seconds_left() < case.seconds + 5:
            report.add([str(case), "left out: no time"], {"case": vars(case)})
            continue
        running: dict[str, Any] = {}
        updates: dict[str, Update] = {}
        try:
            running, updates = case.start(case.names(device))
            on_cuda = device.type == "cuda"
            waits = {name: count_syncs(update) if on_cuda else {} for name, update in updates.items()}
            samples = measure(updates, case.seconds, device)
            rival, *others = samples
            for name in others:
                found = {"case": vars(case), "samples": {one: samples[one] for one in (rival, name)}, "waits": waits}
                report.add([str(case), rival, name, *_compared(samples, waits, rival, name)], found)
        except Exception:
            report.fail(str(case))
        finally:
            updates.clear()
            engines.end(running)
    return report.failed


def _compared(samples: Samples, waits: Any, rival: str, name: str) -> Iterator[str]:
    """The cells under COMPARED."""
    whole, step = (against(samples[name][phase], samples[rival][phase]) for phase in ("update", "step"))
    yield str(whole["rounds"])
    yield from (f"{1000 * whole[key]:.1f}" for key in ("reference", "median"))
    yield from (f"**{whole['ratio_of_medians']:.3f}**", f"{whole['ratio_of_minima']:.3f}")
    yield "{paired:.3f} [{paired_q1:.3f}, {paired_q3:.3f}]".format(**whole)
    yield from (f"{1000 * step[key]:.1f}" for key in ("reference", "median"))
    yield f"{step['ratio_of_medians']:.2f}"
    yield from (str(sum(waits[one].values())) for one in (rival, name))


def profiles(args: argparse.Namespace) -> int:
    """LENA and its rival, by phase and by operation."""
    report = Report(args, ["optimizer", "phase", *COLUMNS])
    device = join()
    for case in TINY[:1] if args.quick else (Case(micro_batch=8), Case(micro_batch=2, model="gpt2-xl", seconds=25)):
        if report.seconds_left() < case.seconds:
            report.text(f"{case}\n\nleft out: no time")
            continue
        running, updates = case.start(case.names(device))
        try:
            report.text(f"{case}\n\n{summary({name: profile(update) for name, update in updates.items()})}")
        finally:
            updates.clear()
            engines.end(running)
    return 0


# -- step --------------------------------------------------------------------------------------------------------------


def steps(args: argparse.Namespace) -> int:
    """The move of one flat fp32 tensor, the whole of it by one rate or each piece by its own."""
    report = Report(args, ["pieces", "optimizer", "rounds", "ms", "ratio", *COLUMNS[:4]])
    device = join()
    model = "tiny" if args.quick else "gpt2"
    with torch.device("meta"):
        gpt2 = [p.numel() for p in build_model(model).parameters()]
    many = 100 if args.quick else 10_000
    for sizes in (gpt2, [sum(gpt2) // many] * many):
        flat = torch.randn(sum(sizes), device=device)
        flat.grad = torch.randn_like(flat) * 1e-3
        names = contestants.available([FUSED_ADAM, ADAMW], device)
        updates = {name: _stock_step(name, flat) for name in names} | {LENA["adamw"]: _lena_step(flat, sizes)}
        warm_up(updates, 2)
        samples = measure(updates, 0.5 if args.quick else 4, device)
        for name, update in updates.items():
            found = against(samples[name]["update"], samples[names[0]]["update"])
            seen = profile(update, updates=1)["phases"]["step"]
            cells = [f"{value:.0f}" for value in seen[:3]] + [f"{seen[3]:.2f}"]
            ratio = f"{found['ratio_of_medians']:.2f}"
            row = [str(len(sizes)), name, str(found["rounds"]), f"{1000 * found['median']:.2f}", ratio, *cells]
            report.add(row, {"pieces": len(sizes), "name": name, "samples": samples[name], "profile": seen})
        del updates
    return 0


def _stock_step(name: str, flat: torch.Tensor) -> Update:
    parameter = torch.nn.Parameter(flat.clone())
    parameter.grad = flat.grad
    optimizer = contestants.make(name, [parameter])

    def update(lap: Lap) -> None:
        optimizer.step()
        lap("step")

    return update


def _lena_step(flat: torch.Tensor, sizes: Sequence[int]) -> Update:
    parameter = torch.nn.Parameter(flat.clone())
    parameter.grad = flat.grad
    starts = itertools.accumulate(sizes, initial=0)
    segments = [
        Segment(number, start, size, 0) for number, (start, size) in enumerate(zip(starts, sizes, strict=False))
    ]
    cut = cut_flat(flat.numel(), segments, rates=range(len(sizes)), decays=[True] * len(sizes))
    applier, state = Applier(RULES["adamw"], {parameter: cut}), {parameter: {}}
    groups = contestants.make(LENA["adamw"], [parameter]).param_groups
    factors = torch.linspace(0.5, 1.5, len(sizes), dtype=torch.float64, device=flat.device)

    def update(lap: Lap) -> None:
        applier.apply(groups, state, Rates(factors))
        lap("step")

    return update


def build(args: argparse.Namespace) -> int:
    """Have DeepSpeed compile its FusedAdam; the parts that need it find it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"can be had: {contestants.available([FUSED_ADAM, ADAMW], device)}")
    return 0


PARTS = {
    "build": build,
    "smoke": smoke,
    "parity": parity,
    "table": whole_updates,
    "profile": profiles,
    "step": steps,
}

if __name__ == "__main__":
    command.leave(main())
