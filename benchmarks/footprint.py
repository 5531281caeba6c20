"""Memory and communication of training, with LENA and with torch's fused AdamW, each in processes of its own.

    python -m benchmarks.footprint

In plain PyTorch and under DeepSpeed's stages. Memory is that of tensors, on the rank that needs most; collectives are
counted with the bytes of the tensors that a rank puts in.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import command, engines
from benchmarks.contestants import ADAMW, LENA, build_model, make, random_tokens
from benchmarks.timing import Lap, Update, table, warm_up

PLAIN = "plain"
LAYOUTS = (PLAIN, "0", "1", "2", "3")
QUICK = {"model": "tiny", "tokens": 64, "layouts": [PLAIN, "2"]}
CONTESTANTS = [ADAMW, LENA["adamw"], LENA["lamb"], LENA["lars"]]
MEASURES = {
    "live": "tensors after an update",
    "forward_backward": "peak in forward and backward",
    "step": "in the step",
}
UPDATES = 3  # DeepSpeed gets to know the model in the first ones


def main() -> int:
    parser = command.parser(__doc__)
    engines.add_training(parser)
    add = parser.add_argument
    add("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="plain PyTorch, ZeRO stages; default: all")
    add("--tokens", type=int, default=512, help="of a sequence; default: 512")
    add("--only", nargs=2, metavar=("LAYOUT", "OPTIMIZER"), help=argparse.SUPPRESS)  # as one of the processes
    args = command.parse(parser, QUICK)
    if args.only:
        return look(*args.only, args)
    machine = command.describe()
    command.present("benchmarks.footprint", args, machine, *run(args))
    return 0


def run(args: argparse.Namespace) -> tuple[str, Any]:
    """The tables, and what every contestant needed; the rival is torch's fused AdamW."""
    memory, traffic, found = [], [], []
    for layout in args.layouts:
        title = "plain PyTorch" if layout == PLAIN else f"ZeRO {layout}"
        seen = {name: _start(layout, name, args) for name in CONTESTANTS}
        for name, own in seen.items():
            found.append({"layout": layout, "optimizer": name, **own})
            extra = [(own[key] - seen[ADAMW][key]) / own["parameters"] for key in MEASURES]
            memory.append([title, name])
            for key, more in zip(MEASURES, extra, strict=True):
                memory[-1] += [f"{own[key] / 2**20:.1f}", f"{more:+.3f}"]
            traffic += [[title, name, *cells] for cells in added_traffic(own["traffic"], seen[ADAMW]["traffic"])]
        print(f"{title}: done", file=sys.stderr)
    head = [
        "",
        "optimizer",
        *(f"{what}, {unit}" for what in MEASURES.values() for unit in ("MiB", "extra B/parameter")),
    ]
    of_traffic = ["", "optimizer", "collective", "calls", "bytes", "calls added", "bytes added"]
    return f"{table(head, memory)}\n\nIn one update:\n\n{table(of_traffic, traffic)}", found


def _start(layout: str, optimizer: str, args: argparse.Namespace) -> dict[str, Any]:
    """What new processes see."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "found.json"
        passed_on = ("model", "tokens", "micro_batch", "precision", "clipping", "threads")
        options = [w for name in passed_on for w in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
        options += ["--only", layout, optimizer, "--out", str(results)]
        ranks = 1 if layout == PLAIN else args.ranks
        if failed := command.start_ranks("benchmarks.footprint", options, ranks, args.threads):
            sys.exit(f"benchmarks: {optimizer}, {layout}: a rank ended with code {failed}")
        return json.loads(results.read_text())


def look(layout: str, optimizer: str, args: argparse.Namespace) -> int:
    """As one of the processes: train, and write down what that took on the rank that needs most."""
    by_rank = _look_plain(optimizer, args) if layout == PLAIN else _look_under_deepspeed(layout, optimizer, args)
    if os.environ["RANK"] == "0":
        most = {name: max(found[name] for found in by_rank) for name in by_rank[0] if name != "traffic"}
        args.out.write_text(json.dumps(most | {"traffic": by_rank[0]["traffic"]}))
    command.leave()


def _look_plain(optimizer: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    device = command.one_process(args.threads)
    model = build_model(args.model).to(device, torch.bfloat16 if args.precision == "bf16" else torch.float32)
    made = make(optimizer, model.parameters())
    tokens = random_tokens(args.model, (args.micro_batch, args.tokens), seed=0).to(device)

    def update(lap: Lap) -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        lap("forward_backward")
        made.step()
        made.zero_grad()
        lap("step")

    return [_see(update, sum(parameter.numel() for parameter in model.parameters()))]


def _look_under_deepspeed(stage: str, optimizer: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    device = engines.join(args.threads)
    engine = engines.make_engine(optimizer, args, int(stage))
    parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters())
    batches = random_tokens(args.model, (1, args.micro_batch, args.tokens), seed=engines.rank()).to(device)
    by_rank = engines.from_all_ranks(_see(engines.trainer(engine, batches), parameters))
    engines.end({optimizer: engine})
    torch.distributed.destroy_process_group()
    return by_rank


def _see(update: Update, parameters: int) -> dict[str, Any]:
    warm_up({"": update}, UPDATES)
    with Collectives() as seen:
        warm_up({"": update}, UPDATES)
    traffic = {name: [calls / UPDATES, size / UPDATES] for name, (calls, size) in sorted(seen.by_name.items())}
    found = {"parameters": parameters, "live": live_bytes(), "traffic": traffic}
    # What a thread of gloo frees escapes the profiler, now and then and in every contestant: the least of several.
    several = [tracked_peaks(update) for _ in range(UPDATES)]
    return found | {phase: min(peaks[phase] for peaks in several) for phase in several[0]}


def added_traffic(own: Mapping[str, list[float]], theirs: Mapping[str, list[float]]) -> list[list[str]]:
    """Rows: a collective, its calls and bytes, and how many more than the rival's."""
    rows = []
    for name in sorted(own.keys() | theirs.keys()):
        mine, other = own.get(name, [0, 0]), theirs.get(name, [0, 0])
        more = (f"{a - b:+,.10g}" for a, b in zip(mine, other, strict=True))
        rows.append([name, *(f"{value:,.10g}" for value in mine), *more])
    return rows


# -- collectives ------------------------------------------------------------------------------------------------------


class Collectives(TorchDispatchMode):
    """All c10d operations that this thread starts meanwhile: `names`, and `sizes`, the bytes that this rank puts in.

    Below torch.distributed's functions and those that deepspeed.comm took from it: both end in the dispatcher.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.sizes: list[int] = []

    @property
    def by_name(self) -> dict[str, tuple[int, int]]:
        """How many, and bytes of all of them."""
        each = [(name.strip("_"), size) for name, size in zip(self.names, self.sizes, strict=True)]
        return {name: (sum(n == name for n, _ in each), sum(s for n, s in each if n == name)) for name, _ in each}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.names.append(func._schema.name.removeprefix("c10d::"))
            # What is sent is the argument named after it where there are two, else the first.
            names = [argument.name for argument in func._schema.arguments]
            sent = next((value for name, value in zip(names, args, strict=False) if "input" in name), args[0])
            self.sizes.append(sum(leaf.nbytes for leaf in tree_leaves(sent) if isinstance(leaf, Tensor)))
        return func(*args, **(kwargs or {}))


# -- memory -----------------------------------------------------------------------------------------------------------


def live_bytes() -> int:
    """Bytes of all tensors of this process, each storage once."""
    while gc.collect():  # once is not enough for engines, which have finalizers
        pass
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size for size in storages.values() if isinstance(size, int))  # torch.compile keeps some without memory


def tracked_peaks(update: Update) -> dict[str, int]:
    """By phase of an update: bytes that torch's allocator handed out at most, beyond what was there when it began."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    start = _start_on_cpu if device.type == "cpu" else _start_on_gpu
    peaks, stop = {}, start()

    def lap(phase: str) -> None:
        nonlocal stop
        peaks[phase], stop = stop(), start()

    update(lap)
    stop()
    return peaks


def _start_on_gpu() -> Callable[[], int]:
    memory = torch.get_device_module()
    memory.reset_peak_memory_stats()
    before = memory.memory_allocated()
    return lambda: memory.max_memory_allocated() - before


def _start_on_cpu() -> Callable[[], int]:
    profile = torch.autograd.profiler.profile(profile_memory=True).__enter__()

    def stop() -> int:
        profile.__exit__(None, None, None)
        events = sorted(profile.kineto_results.events(), key=lambda event: event.start_ns())
        return max(accumulate((event.nbytes() for event in events if event.name() == "[memory]"), initial=0))

    return stop


if __name__ == "__main__":
    sys.exit(main())
