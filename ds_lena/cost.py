"""What LENA adds to a training step, on paper: bytes, collectives, passes over memory, calls, and seconds from these.

    python -m ds_lena.cost --params 70e9 --ranks 1024 --stage 3

All is for one rank and one update. Collectives and their bytes are exact, seconds are estimates; LENA's share is rather
too large than too small. `docs/cost-model.md` has the equations and says where each constant comes from.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, NamedTuple, NoReturn

from .errors import ConfigError
from .keys import BASES, KEYS
from .update.rules import RULES

PRECISIONS = {"fp32": 4, "bf16": 2}  # bytes of a weight and of its gradient
LARGEST = 1e15  # of every count
NUMBER, OTHER_NUMBERS, NUMBERS_PER_LAYER = 8, 2, 2  # the statistics: float64; n and the excluded norm; A and B
MEMORY_PER_LAYER = 200  # bytes: upper bound of LENA's float64 vectors


def _entry(meaning: str, default: Any = MISSING) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Job:
    """What is trained on how many ranks; an entry that is not allowed raises a ConfigError."""

    params: float = _entry("of the whole model, 70e9 for example; several for a table")
    ranks: int = _entry("of all kinds of parallelism together; several for a table")
    stage: int = _entry("ZeRO stage, 0 to 3", 2)
    tensor_parallel: int = _entry("ranks that share each tensor", 1)
    pipeline_parallel: int = _entry("pipeline stages", 1)
    tokens: float = _entry("per micro-batch and replica", 4096)
    accumulation: int = _entry("micro-batches per update and replica", 1)
    base: str = _entry(", ".join(BASES), "adamw")
    precision: str = _entry("of weights and gradients, fp32 or bf16 (with fp32 master weights)", "bf16")
    tensors: int | None = _entry("parameter tensors of the whole model; default: those of a GPT of this size", None)
    layers: int | None = _entry("gains of the whole model; default: one for each tensor", None)

    def __post_init__(self) -> None:
        for name in ("params", "tokens"):
            self._check(name, 1 <= getattr(self, name) <= LARGEST, f"a number from 1 to {LARGEST:g}")
        for name in ("ranks", "tensor_parallel", "pipeline_parallel", "accumulation", "tensors", "layers"):
            value = 1 if getattr(self, name) is None else getattr(self, name)
            self._check(name, 1 <= value <= LARGEST and not value % 1, f"a whole number from 1 to {LARGEST:g}")
        for name, known in (("stage", range(4)), ("base", BASES), ("precision", PRECISIONS)):
            self._check(name, getattr(self, name) in known, "one of " + ", ".join(map(str, known)))
        product = f"a multiple of tensor_parallel x pipeline_parallel = {self.per_replica}"
        self._check("ranks", not self.ranks % self.per_replica, product)
        at_most = f"at most the number of tensors, {self.all_tensors}"
        self._check("pipeline_parallel", self.pipeline_parallel <= self.all_tensors, at_most)
        of_params = f"at most the number of parameters, {self.params:g}"
        self._check("tensors", self.all_tensors <= self.params, of_params)
        self._check("layers", self.all_layers <= self.all_tensors, at_most)

    def _check(self, name: str, right: bool, allowed: str) -> None:
        if not right:
            raise ConfigError(f'LENA: "{name}": {getattr(self, name)!r} is not allowed; allowed is {allowed}.')

    @property
    def per_replica(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def replicas(self) -> int:
        return self.ranks // self.per_replica

    @property
    def all_tensors(self) -> int:
        """Of a GPT with 12 d^2 parameters in a block and a width d of 128 per block: 12 in a block, and 4 more."""
        blocks = max(1, round((self.params / (12 * 128**2)) ** (1 / 3)))
        return 12 * blocks + 4 if self.tensors is None else self.tensors

    @property
    def all_layers(self) -> int:
        return self.all_tensors if self.layers is None else self.layers

    @property
    def pieces(self) -> tuple[int, int, int]:
        """Tensors that a rank computes gradients of; pieces of their average that it measures; pieces that it moves.

        ZeRO-0 deals out whole tensors to measure. ZeRO-1 and 2 cut the flat row of all, where a rank has up to one
        tensor more than its share. ZeRO-3 gives every rank a piece of every tensor.
        """
        tensors = math.ceil(self.all_tensors / self.pipeline_parallel)
        share = math.ceil(tensors / self.replicas)
        if self.stage == 3 or self.replicas == 1:
            return tensors, tensors, tensors
        if self.stage == 0:
            return tensors, share, tensors
        return tensors, min(share + 1, tensors), min(share + 1, tensors)


@dataclass(frozen=True)
class Machine:
    """What one kind of machine needs, in seconds, bytes per second and FLOP per second; all ranks are alike."""

    hook_s: float = _entry("the hook of one tensor in a backward pass, besides reading its gradient")
    norm_s: float = _entry("the norm of one piece of the averaged gradient, besides reading it")
    call_s: float = _entry("one more call of the update's kernel")
    update_s: float = _entry("the factors of an update, besides layer_s")
    layer_s: float = _entry("the factors of an update, for each layer")
    memory_bandwidth: float = _entry("of a norm over a large tensor, and of the update")
    flops: float = _entry("that forward and backward reach")
    collective_s: float = _entry("an all-reduce of nothing, before any hop")
    hop_inside_s: float = _entry("a hop to another rank of the node")
    hop_between_s: float = _entry("a hop to another node")
    bandwidth_inside: float = _entry("of one rank, within its node")
    bandwidth_between: float = _entry("of one rank, to other nodes")
    ranks_per_node: int = _entry("that share a node")
    cores: int = _entry("of a node, for all its ranks; 0 where no rank waits for a core")
    turn_s: float = _entry("what a hop takes longer for every further rank on the same core")
    note: str = ""

    def __post_init__(self) -> None:
        for name, entry in CONSTANTS.items():
            value, whole, zero = getattr(self, name), entry.type == "int", name.endswith("_s") or name == "cores"
            if not (math.isfinite(value) and (value > 0 or (value == 0 and zero)) and not (whole and value % 1)):
                allowed = f"a {'whole ' if whole else ''}number {'>=' if zero else '>'} 0"
                raise ConfigError(f'LENA: "{name}": {value!r} is not allowed; allowed is {allowed}.')

    def crowding(self, ranks: int) -> float:
        """How many ranks of a node share one core."""
        return max(1.0, min(ranks, self.ranks_per_node) / self.cores) if self.cores else 1.0


CONSTANTS = {entry.name: entry for entry in fields(Machine) if entry.name != "note"}
MACHINES = {
    "cpu-2-cores": Machine(
        hook_s=6.7e-6, norm_s=6.1e-6, call_s=8e-6, update_s=710e-6, layer_s=0.37e-6, memory_bandwidth=10.5e9,
        flops=118e9, collective_s=74e-6, hop_inside_s=125e-6, hop_between_s=125e-6, bandwidth_inside=2e9,
        bandwidth_between=2e9, ranks_per_node=1 << 30, cores=2, turn_s=580e-6,
        note="2 cores of a Xeon, gloo, fp32; measured by us",
    ),
    "h100": Machine(
        hook_s=21e-6, norm_s=0.0, call_s=3e-9, update_s=700e-6, layer_s=0.0, memory_bandwidth=3.35e12,
        flops=0.4 * 989e12, collective_s=6.8e-6, hop_inside_s=0.6e-6, hop_between_s=5e-6, bandwidth_inside=450e9,
        bandwidth_between=50e9, ranks_per_node=8, cores=0, turn_s=0.0,
        note="host costs measured by us on one H200, the rest published figures",
    ),
}  # fmt: skip


TITLES = {
    "hooks": "norms of micro-gradients", "average": "norms of the averaged gradient", "collectives": "all-reduce",
    "factors": "factors", "calls": "more kernel calls in the update", "trust": "norms for the trust ratio",
    "forward_backward_s": "forward and backward", "sent_bytes": "gradients and weights sent",
    "communication_s": "sending them", "optimizer_bytes": "read and written by the update", "optimizer_s": "update",
    "state_bytes": "weights, gradients, moments", "seconds": "step, sending behind arithmetic",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One thing that LENA does in an update: `count` of them, over `bytes` of memory or network in all."""

    count: int
    bytes: float
    seconds: float


class Cost(NamedTuple):
    """`parts`: what LENA adds. `stock`: bytes and seconds of the same update without it. `share`: one by the other."""

    parts: dict[str, Part]
    stock: dict[str, float]
    seconds: float
    share: float


def collective_bytes(job: Job) -> list[int]:
    """Bytes of the buffer of each all-reduce of an update, over all ranks. The second is that of the trust ratios."""
    if job.ranks == 1:
        return []
    statistics = NUMBER * (OTHER_NUMBERS + NUMBERS_PER_LAYER * job.all_layers)
    return [statistics, NUMBER * 2 * job.all_tensors] if RULES[job.base].trust else [statistics]


def all_reduce_seconds(size: float, ranks: int, machine: Machine) -> float:
    """Of `size` bytes, by a ring or by a tree of nodes, whichever is faster. A hop is paid to add up and to spread."""
    if ranks == 1:
        return 0.0
    nodes, inside = math.ceil(ranks / machine.ranks_per_node), min(ranks, machine.ranks_per_node)
    wait = machine.turn_s * (machine.crowding(ranks) - 1)
    hop_inside, hop_between = machine.hop_inside_s + wait, machine.hop_between_s + wait
    ring = (ranks - nodes) * hop_inside + (nodes - 1) * hop_between
    tree = (inside - 1) * hop_inside + math.ceil(math.log2(nodes)) * hop_between
    bandwidth = machine.bandwidth_inside if nodes == 1 else machine.bandwidth_between
    transfer = size / bandwidth * machine.crowding(ranks)
    return machine.collective_s + min(2 * (ring + transfer * (ranks - 1) / ranks), 2 * (tree + transfer))


def estimate(job: Job, machine: Machine) -> Cost:
    """What LENA adds to one update of this job on one rank of this machine."""
    rule, crowding, number = RULES[job.base], machine.crowding(job.ranks), PRECISIONS[job.precision]
    moments = len(rule.buffers({name: key.default for name, key in KEYS.items()}))
    tensors, measured, moved = job.pieces
    hooks, trust, sizes = tensors * job.accumulation, 2 * measured if rule.trust else 0, collective_bytes(job)
    local = job.params / job.per_replica  # parameters of a rank before ZeRO
    owned = local / job.replicas

    def part(count: int, elements: float, bytes_each: int, seconds: float) -> Part:
        size = elements * bytes_each
        return Part(count, size, (size / machine.memory_bandwidth + seconds) * crowding)

    parts = {
        "hooks": part(hooks, local * job.accumulation, number, hooks * machine.hook_s),
        "average": part(measured, owned, number, measured * machine.norm_s),
        "collectives": Part(len(sizes), sum(sizes), sum(all_reduce_seconds(s, job.ranks, machine) for s in sizes)),
        "factors": part(1, 0, 0, machine.update_s + job.all_layers * machine.layer_s),
        "calls": part(moved - 1, 0, 0, (moved - 1) * machine.call_s),
        "trust": part(trust, owned if trust else 0, 4 * (2 + moments), trust * machine.norm_s),
    }
    # How often a rank sends the size of its model. ZeRO-0: an all-reduce, which is two. ZeRO-1: one reduction, and one
    # gathering of weights; ZeRO-2 reduces after every micro-batch, and ZeRO-3 gathers twice in each.
    times = (2, 2, job.accumulation + 1, 3 * job.accumulation)[job.stage]
    sent = times * local * number * (job.replicas - 1) / job.replicas
    bandwidth = machine.bandwidth_inside if job.ranks <= machine.ranks_per_node else machine.bandwidth_between
    master, copy = (4, number) if number < 4 else (0, 0)  # an update of fp32 masters writes the weights as well
    updated = (local if job.stage == 0 else owned) * (4 * (3 + 2 * moments) + copy)
    kept = (master + 4 * moments, number, number)  # each stage cuts one more of these among the replicas
    stock = {
        "forward_backward_s": 6 * local * job.tokens * job.accumulation / machine.flops * crowding,
        "sent_bytes": sent,
        "communication_s": sent / bandwidth * crowding,
        "optimizer_bytes": updated,
        "optimizer_s": updated / machine.memory_bandwidth * crowding,
        "state_bytes": sum((owned if job.stage > cut else local) * size for cut, size in enumerate(kept)),
    }
    stock["seconds"] = max(stock["forward_backward_s"], stock["communication_s"]) + stock["optimizer_s"]
    seconds = sum(part.seconds for part in parts.values())
    return Cost(parts, stock, seconds, seconds / stock["seconds"])


def as_dict(job: Job, machine: Machine, cost: Cost) -> dict[str, Any]:
    """Everything, in bytes and seconds."""
    of_step = cost.stock["seconds"]
    return {
        "job": asdict(job) | {"tensors": job.all_tensors, "layers": job.all_layers, "replicas": job.replicas},
        "machine": asdict(machine),
        "collective_bytes": collective_bytes(job),
        "lena": {name: asdict(part) | {"share": part.seconds / of_step} for name, part in cost.parts.items()},
        "memory_bytes": MEMORY_PER_LAYER * job.all_layers,
        "stock": cost.stock,
        "added_seconds": cost.seconds,
        "share": cost.share,
    }


def as_text(job: Job, cost: Cost, machine: Machine) -> str:
    """The parts of one job, and what they are added to."""
    entries = asdict(job) | {"tensors": job.all_tensors, "layers": job.all_layers, "replicas": job.replicas}
    said = (f"{name} {value:,g}" if not isinstance(value, str) else value for name, value in entries.items())
    lines = [", ".join(said), f"machine {machine.note}", ""]
    rows = [("LENA, per rank and update", "count", "bytes", "time", "of the step")]
    for name, part in cost.parts.items():
        cells = (f"{part.count:,}", in_bytes(part.bytes), in_seconds(part.seconds))
        rows += [(TITLES[name], *cells, f"{part.seconds / cost.stock['seconds']:.2%}")] if part.count else []
    rows += [("together", "", "", in_seconds(cost.seconds), f"{cost.share:.2%}"), ("without LENA", "", "", "", "")]
    for name, value in cost.stock.items():
        shown = (in_bytes(value), "") if name.endswith("bytes") else ("", in_seconds(value))
        rows.append((TITLES[name], "", *shown, ""))
    lines += [f"{name:<32}{n:>9}{size:>9}{time:>9}{share:>13}".rstrip() for name, n, size, time, share in rows]
    lines += [
        "",
        f"Memory of LENA on each rank: {in_bytes(MEMORY_PER_LAYER * job.all_layers)}.",
        "On a GPU also 0.03 bytes for each parameter that the rank moves, 0.09 with LAMB and LARS.",
    ]
    if machine.crowding(job.ranks) > 1:
        lines.append(f"{machine.crowding(job.ranks):g} ranks share a core; each waits for its turn.")
    return "\n".join(lines)


def as_markdown(costs: Sequence[tuple[Job, Cost]]) -> str:
    """One row for each job."""
    head = ["parameters", "ranks", "state/rank", "step", "all-reduce", "its time", "norms", "calls, factors", "LENA"]
    rows = [head, ["---:"] * len(head)]
    for job, cost in costs:
        part = {name: part.seconds for name, part in cost.parts.items()}
        times = (part["collectives"], part["hooks"] + part["average"] + part["trust"], part["factors"] + part["calls"])
        step = [in_bytes(cost.stock["state_bytes"]), in_seconds(cost.stock["seconds"])]
        shown = [*step, in_bytes(cost.parts["collectives"].bytes), *map(in_seconds, times), f"{cost.share:.2%}"]
        rows.append([f"{job.params:.4g}", f"{job.ranks:,}", *shown])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def in_seconds(value: float) -> str:
    return _in_units(value, (("s", 1.0), ("ms", 1e-3))) or f"{_round(value * 1e6)} µs"


def in_bytes(value: float) -> str:
    return _in_units(value, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1)))


def _in_units(value: float, units: Sequence[tuple[str, float]]) -> str:
    """In the largest unit of which it is at least one; nothing below all of them."""
    return next((f"{_round(value / scale)} {unit}" for unit, scale in units if value >= scale), "")


def _round(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value >= 1 else f"{value:.2g}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"LENA: {message}. See {self.prog} --help.\n")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed is a number, such as 70e9") from None


def _whole(text: str) -> int:
    if (value := _number(text)) % 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed is a whole number")
    return int(value)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m ds_lena.cost", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--machine", choices=MACHINES, default="h100", help="default: h100, whose network we have not measured"
    )
    parser.add_argument("--json", action="store_true", help="everything, in bytes and seconds")
    constants = parser.add_argument_group("constants of the machine, in seconds, bytes per second and FLOP per second")
    for entry in (*fields(Job), *CONSTANTS.values()):
        add: Any = (constants if entry.name in CONSTANTS else parser).add_argument
        more = {"nargs": "+", "required": True} if entry.name in ("params", "ranks") else {}
        default = f"; default: {entry.default}" if entry.default not in (MISSING, None) else ""
        read = str if entry.type == "str" else _number if entry.type == "float" else _whole
        add(f"--{entry.name.replace('_', '-')}", type=read, help=entry.metadata["help"] + default, **more)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the cost of every job that is asked for. 2 where one of them cannot exist."""
    given = {key: value for key, value in vars(_parser().parse_args(arguments)).items() if value is not None}
    entries = {entry.name: given[entry.name] for entry in fields(Job) if entry.name in given}
    constants = {key: given[key] for key in CONSTANTS if key in given}
    try:
        machine = MACHINES[given["machine"]]
        changed = "".join(f", {name}={value:g}" for name, value in constants.items())
        machine = replace(machine, note=f"{given['machine']}{changed}: {machine.note}", **constants)
        jobs = [Job(**entries | {"params": p, "ranks": r}) for p in given["params"] for r in given["ranks"]]
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    costs = [(job, estimate(job, machine)) for job in jobs]
    if given["json"]:
        found = [as_dict(job, machine, cost) for job, cost in costs]
        text = json.dumps(found[0] if len(found) == 1 else found, indent=1)
    elif len(costs) == 1:
        text = as_text(*costs[0], machine)
    else:
        text = as_markdown(costs)
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
