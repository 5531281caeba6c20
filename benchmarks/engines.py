"""A whole update under DeepSpeed: engines that differ in their optimizer and nothing else train in turn.

    python -m benchmarks.engines                                       starts its own ranks
    deepspeed --module benchmarks.engines --model gpt2                 the same, started by a launcher
    python -m benchmarks.engines --ranks 1 --stages 0 --tokens 128     one rank: what the hooks cost
    python -m benchmarks.engines --muon --stages 1 2 3                 DeepSpeed's Muon, alone and watched
    python -m benchmarks.engines --check-sync                          on CUDA: count what makes the host wait, instead
    python -m benchmarks.engines --profile                             what a profiler sees in an update, instead

"forward_backward" contains LENA's hooks, "step" all the rest: the norms of the averaged gradient, the all-reduce, the
factors and the move.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import itertools
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import ds_lena
from benchmarks import command, contestants
from benchmarks.contestants import LENA, POSITIONS
from benchmarks.profiling import profile, summary
from benchmarks.timing import HEAD, Lap, Update, count_syncs, measure, table, versus, warm_up

QUICK = {"model": "tiny", "tokens": [64], "seconds": 1.0, "accumulation": [1]}
PHASES = ("update", "forward_backward", "step")
MUON, WATCHED = "DeepSpeed Muon", "DeepSpeed Muon, watched"
LAYOUT = ["ZeRO", "accumulation", "tokens"]


def main() -> int:
    parser = command.parser(__doc__, seconds=25)
    add_training(parser)
    add = parser.add_argument
    add("--base", choices=LENA, default="adamw", help="LENA's base rule; beside it the stock optimizer with that rule")
    add("--muon", action="store_true", help="DeepSpeed's Muon, without and with ds_lena.watch, in LENA's place")
    add("--stages", type=int, nargs="+", choices=range(4), default=[0, 1, 2, 3], help="ZeRO stages; default: all")
    add("--accumulation", type=int, nargs="+", default=[1, 4], help="micro-batches per update; default: 1 4")
    add("--tokens", type=int, nargs="+", default=[512], help=f"of a sequence, at most {POSITIONS}; default: 512")
    add("--check-sync", action="store_true", help="count operations that make the host wait for the GPU; no times")
    add("--profile", action="store_true", help="what torch.profiler sees in updates of LENA and its rival, instead")
    args = command.parse(parser, QUICK)
    if args.check_sync and not torch.cuda.is_available():
        parser.error("--check-sync needs CUDA")
    if not all(2 <= tokens <= POSITIONS for tokens in args.tokens):
        parser.error(f"--tokens {args.tokens}: from 2 to {POSITIONS}")
    return command.run_on_ranks("benchmarks.engines", args, lambda: run(args))


def add_training(parser: Any) -> None:
    add = parser.add_argument
    add("--ranks", type=int, help="default: the number of GPUs; 2 without one")
    add("--model", choices=contestants.SIZES, default="30m", help="default: 30m")
    add("--micro-batch", type=int, default=1, help="sequences of a micro-batch; default: 1")
    add("--precision", choices=("fp32", "bf16"), default="fp32")
    add("--clipping", type=float, default=0.0, help="gradient clipping; default: none")


def run(args: argparse.Namespace) -> tuple[str, Any]:
    """All cases one after the other; every rank returns the same tables and samples."""
    device = join(args.threads)
    rivals = contestants.rivals(args.base, device)[:2]
    names = [rivals[0], MUON, WATCHED] if args.muon else [*rivals, LENA[args.base]]
    rows, found = [], []
    for accumulation, tokens, stage in itertools.product(args.accumulation, args.tokens, args.stages):
        layout = {"stage": stage, "accumulation": accumulation, "tokens": tokens}
        engines, updates = start(names, args, stage, accumulation, tokens)
        cells = [str(value) for value in layout.values()]
        if args.check_sync:
            seen = {name: count_syncs(update) for name, update in updates.items()}
            rows += [[*cells, name, phase, str(n)] for name, counts in seen.items() for phase, n in counts.items()]
        elif args.profile:
            seen = summary({name: profile(updates[name]) for name in (names[-1], names[0])})
        else:
            seen = slowest(measure(updates, args.seconds, device, meet))
            rows += [row for phase in PHASES for row in versus([phase, *cells], seen, names[0], phase)]
        found.append(layout | {"seen": seen})
        if rank() == 0:
            print(f"{layout}: done", file=sys.stderr)
        del updates
        end(engines)
    torch.distributed.destroy_process_group()
    if args.profile:
        return "\n\n".join(case["seen"] for case in found), found
    return table(
        [*LAYOUT, "optimizer", "phase", "waits"] if args.check_sync else ["phase", *LAYOUT, *HEAD], rows
    ), found


def start(
    names: Sequence[str], args: argparse.Namespace, stage: int, accumulation: int, tokens: int
) -> tuple[dict[str, Any], dict[str, Update]]:
    """Engines with these optimizers, and their updates, warmed up."""
    engines = {name: make_engine(name, args, stage, accumulation) for name in names}
    batches = contestants.random_tokens(args.model, (accumulation, args.micro_batch, tokens), seed=rank())
    updates = {name: trainer(engine, batches.to(_device())) for name, engine in engines.items()}
    warm_up(updates, 2 if accumulation == 1 else 1)
    return engines, updates


def rank() -> int:
    return torch.distributed.get_rank()


def join(threads: int) -> torch.device:
    """Become one of the ranks; returns this rank's device."""
    import deepspeed  # slow to import; only the ranks need it
    from deepspeed.accelerator import get_accelerator

    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed's use of torch.distributed
    torch.set_num_threads(threads)
    accelerator = get_accelerator()
    accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(accelerator.communication_backend_name(), verbose=False)
    return _device()


def _device() -> torch.device:
    return torch.device(importlib.import_module("deepspeed.accelerator").get_accelerator().current_device_name())


def make_engine(optimizer: str, args: argparse.Namespace, stage: int, accumulation: int = 1) -> Any:
    """An engine with a model of its own, from the same random numbers every time.

    Raises:
        NotAvailable: the optimizer cannot be had here or in this stage.
    """
    import deepspeed

    torch.manual_seed(0)
    with _device():
        model = contestants.build_model(args.model)
    keys = entries(args, stage, accumulation)
    if optimizer in (MUON, WATCHED):
        # Its Adam is torch's here: DeepSpeed's would have to be compiled.
        muon = {"type": "Muon", "params": {"lr": 0.02, "torch_adam": True}}
        keys |= {"optimizer": muon, "zero_optimization": {"stage": stage, "reduce_scatter": False}}
        engine = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=keys)[0]
        if optimizer == WATCHED:
            ds_lena.watch(engine)
        return engine
    made = contestants.make(optimizer, model.parameters())
    try:
        return deepspeed.initialize(model=model, optimizer=made, config=keys)[0]
    except ds_lena.LenaError as error:  # on every rank
        raise contestants.NotAvailable(str(error)) from error


def entries(args: argparse.Namespace, stage: int, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's configuration, without an optimizer."""
    return {
        "train_micro_batch_size_per_gpu": args.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,  # for the stock optimizers; LENA does not need it
        "bf16": {"enabled": args.precision == "bf16"},
        "gradient_clipping": args.clipping,
        "steps_per_print": 1_000_000,
    }


def trainer(engine: Any, batches: Tensor) -> Update:
    """The function that trains for one update. `batches` (accumulation, micro-batch, tokens): token ids."""

    def update(lap: Lap) -> None:
        for tokens in batches:
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            lap("forward_backward")
            engine.step()
            lap("step")

    return update


def end(engines: dict[str, Any]) -> None:
    """Destroy engines, empty the dict and free their memory; the caller has dropped their trainers."""
    for engine in engines.values():
        engine.destroy()
    engines.clear()
    gc.collect()
    torch.cuda.empty_cache()


def meet(more: bool) -> bool:
    """A barrier; true if every rank wants more."""
    flag = torch.tensor(float(more), device=_device())
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
    return bool(flag)


def from_all_ranks(own: Any) -> list[Any]:
    """The same list on every rank."""
    by_rank: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(by_rank, own)
    return by_rank


def slowest(samples: Any) -> dict[str, dict[str, list[float]]]:
    """Every entry as on the rank that took longest for it."""
    by_rank = from_all_ranks(samples)

    def longest(name: str, phase: str) -> list[float]:
        return [max(taken) for taken in zip(*(one[name][phase] for one in by_rank), strict=True)]

    return {name: {phase: longest(name, phase) for phase in phases} for name, phases in samples.items()}


if __name__ == "__main__":
    sys.exit(main())
