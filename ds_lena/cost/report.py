"""A cost as text and as plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .job import Job, blocks_of
from .machines import Machine
from .model import Cost, collective_bytes

_TITLES = {
    "hooks": "norms of micro-gradients",
    "average": "norms of the averaged gradient",
    "collectives": "all-reduce",
    "factors": "factors",
    "calls": "more kernel calls in the update",
    "trust": "norms for the trust ratio",
}


def as_dict(job: Job, machine: Machine, cost: Cost) -> dict[str, Any]:
    """Everything, in bytes and seconds."""
    stock = asdict(cost.stock) | {"seconds": cost.stock.seconds}
    parts = {name: asdict(part) | {"share": part.seconds / cost.stock.seconds} for name, part in cost.parts.items()}
    return {
        "job": asdict(job) | {"tensors": job.all_tensors, "layers": job.all_layers, "replicas": job.replicas},
        "machine": asdict(machine),
        "collective_bytes": collective_bytes(job),
        "lena": parts,
        "memory_bytes": cost.memory_bytes,
        "stock": stock,
        "added_seconds": cost.seconds,
        "share": cost.share,
    }


def as_text(job: Job, cost: Cost, name: str, machine: Machine) -> str:
    """A readable table."""
    stock = cost.stock
    rows = [["LENA, per rank and update", "count", "bytes", "time", "of the step"]]
    for key, part in cost.parts.items():
        if part.count:
            rows.append([_TITLES[key], f"{part.count:,}", size(part.bytes), seconds(part.seconds), _share(part, cost)])
    rows.append(["together", "", "", seconds(cost.seconds), f"{cost.share:.2%}"])
    rows.append([])
    rows.append([f"without LENA ({job.base})", "", "bytes", "time", ""])
    rows.append(["forward and backward", "", "", seconds(stock.forward_backward_s), ""])
    rows.append(["gradients and weights sent", "", size(stock.sent_bytes), seconds(stock.communication_s), ""])
    rows.append(["update", "", size(stock.optimizer_bytes), seconds(stock.optimizer_s), ""])
    rows.append(["weights, gradients, moments", "", size(stock.state_bytes), "", ""])
    rows.append(["step, sending behind arithmetic", "", "", seconds(stock.seconds), "100%"])
    return "\n".join([*_heading(job, name, machine), "", *columns(rows), "", *_remarks(job, cost, machine)])


def as_markdown(costs: Sequence[tuple[Job, Cost]]) -> str:
    """One row for each job."""
    head = ["parameters", "ranks", "state/rank", "step", "all-reduce", "its time", "norms", "calls, factors", "LENA"]
    rows = [head, ["---:"] * len(head)]
    for job, cost in costs:
        norms = cost.hooks.seconds + cost.average.seconds + cost.trust.seconds
        host = cost.factors.seconds + cost.calls.seconds
        times = [seconds(value) for value in (cost.collectives.seconds, norms, host)]
        step = [size(cost.stock.state_bytes), seconds(cost.stock.seconds), size(cost.collectives.bytes)]
        rows.append([f"{job.params:.4g}", f"{job.ranks:,}", *step, *times, f"{cost.share:.2%}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the first column left and all others right."""
    widths = [max(len(row[i]) for row in rows if len(row) > i) for i in range(max(map(len, rows)))]
    aligned = [[f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(row)] for row in rows]
    return ["  ".join(row).rstrip() for row in aligned]


def seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}" if value < 1000 * scale else f"{value:,.0f} s"
    return f"{value / 1e-6:.2g} µs"


def size(value: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}" if value < 1000 * scale else f"{value / scale:,.0f} {unit}"
    return f"{value:.0f} B" if value else ""


def _share(part: Any, cost: Cost) -> str:
    return f"{part.seconds / cost.stock.seconds:.2%}"


def _heading(job: Job, name: str, machine: Machine) -> list[str]:
    shape = f"{blocks_of(job.params)} blocks, " if job.tensors is None else ""
    return [
        f"{job.params:.4g} parameters ({shape}{job.all_tensors} tensors, {job.all_layers} layers), {job.precision}",
        f"{job.ranks:,} ranks = {job.replicas} data x {job.tensor_parallel} tensor x {job.pipeline_parallel} pipeline, "
        f"ZeRO-{job.stage}",
        f"{job.tokens:,.0f} tokens per micro-batch and replica, {job.accumulation} micro-batches per update",
        f"machine {name}: {machine.note}{'; but for what was given' if '=' in name else ''}",
    ]


def _remarks(job: Job, cost: Cost, machine: Machine) -> list[str]:
    said = [f"Memory of LENA on each rank: {size(cost.memory_bytes)}, nothing per parameter."]
    if machine.crowding(job.ranks) > 1:
        said.append(
            f"{machine.crowding(job.ranks):g} ranks share a core: each waits for its turn, and so it is counted."
        )
    if job.ranks_per_replica > 1:
        said.append(
            "LENA refuses tensor and pipeline parallelism under DeepSpeed so far; this is what they would cost."
        )
    if job.replicas * job.accumulation == 1:
        said.append("One micro-batch per update: there is no variance to measure, and LENA is its base rule.")
    return said
