"""The program of one rank: for every stage, accumulation and length, DeepSpeed engines train alike models in turn."""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

import torch.distributed as dist

from benchmarks.command import Found
from benchmarks.deepspeed_run import accelerator, device, end, free, join, make_engine, meet, slowest, trainer
from benchmarks.models import random_tokens
from benchmarks.roster import LENA, REFERENCE, STOCK, available
from benchmarks.timing import Stopwatch, compare, count_syncs, measure, warm_up


def run(args: argparse.Namespace) -> Found:
    """All cases one after the other; every rank returns the same."""
    join(args.threads)
    wanted = [STOCK[args.base], LENA[args.base]]
    if args.base == "adamw" and accelerator.device_name() != "cpu":
        wanted.insert(1, "DeepSpeed FusedAdam")
    names, left_out = available(wanted, device())
    if LENA[args.base] in left_out:
        sys.exit(f"benchmarks: {left_out}")
    if STOCK[args.base] not in names:
        names.insert(0, REFERENCE)
    cases = []
    for accumulation, tokens, stage in itertools.product(args.accumulation, args.tokens, args.stages):
        cases.append(_run_case(names, args, stage, accumulation, tokens))
        if dist.get_rank() == 0:
            print(_progress(cases[-1]), file=sys.stderr)
        free()
    dist.destroy_process_group()
    return {"cases": cases, "left_out": left_out}


def _run_case(names: list[str], args: argparse.Namespace, stage: int, accumulation: int, tokens: int) -> dict[str, Any]:
    batches = random_tokens(args.model, (accumulation, 1, tokens), seed=dist.get_rank())
    engines = {name: make_engine(name, args, stage, accumulation) for name in names}
    contestants = {name: trainer(engine, batches.to(engine.device)) for name, engine in engines.items()}
    warm_up(contestants, updates=2 if accumulation == 1 else 1)
    case: dict[str, Any] = {"stage": stage, "accumulation": accumulation, "tokens": tokens, "reference": names[0]}
    if args.check_sync:
        case["syncs"] = {name: count_syncs(update) for name, update in contestants.items()}
    else:
        stopwatch = Stopwatch(args.clock, accelerator.synchronize)
        runs_ahead = accelerator.device_name() != "cpu"
        case["seconds"] = slowest(measure(contestants, args.seconds, stopwatch, runs_ahead, meet))
    end(engines)
    return case


def _progress(case: dict[str, Any]) -> str:
    """One line, to show while the others run."""
    layout = f"ZeRO {case['stage']}, accumulation {case['accumulation']}, {case['tokens']} tokens"
    if "syncs" in case:
        return f"{layout}: {case['syncs']}"
    compared = compare(case["seconds"], case["reference"])["update"]
    ratios = [f"{name} {own['ratio_of_medians']:.3f}" for name, own in compared.items() if name != case["reference"]]
    return f"{layout}, x {case['reference']}: {', '.join(ratios)}"
