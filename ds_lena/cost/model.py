"""The cost model: pure functions of a job and a machine. Collectives are exact, seconds are estimates.

Everything is of one rank and one update. LENA's work does not overlap with anything in this model, and stock
training overlaps its communication with its arithmetic completely; so LENA's share is rather too large than too small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..keys import KEYS
from ..update.rules import RULES
from .job import Job
from .machines import Machine

FLOAT64 = 8
OTHER_NUMBERS = 2
"""What the statistics all-reduce carries besides the layers' numbers: n, and the norm of excluded parameters."""
NUMBERS_PER_LAYER = 2
"""A and B."""
DEVICE_BYTES_PER_LAYER = 200
"""Upper bound of LENA's float64 vectors, one entry for each layer."""

FLOPS_PER_PARAM_AND_TOKEN = 6  # forward 2, backward 4


def moments(base: str) -> int:
    """fp32 numbers that a base rule keeps for each parameter."""
    defaults = {name: key.default for name, key in KEYS.items()}
    return len(RULES[base].buffers(defaults))


def has_norms(base: str) -> bool:
    """Whether a rule needs norms of whole tensors of weights and updates: one more all-reduce, two more passes."""
    return RULES[base].trust is not None


@dataclass(frozen=True)
class Part:
    """One thing that LENA does in an update: `count` of them, over `bytes` of memory or network in all."""

    count: int
    bytes: float
    seconds: float


@dataclass(frozen=True)
class Stock:
    """The same update without LENA.

    sent_bytes: by this rank, for gradients and weights. optimizer_bytes: read and written by the update. state_bytes:
    weights, gradients and the optimizer's state on this rank, without activations.
    """

    forward_backward_s: float
    sent_bytes: float
    communication_s: float
    optimizer_bytes: float
    optimizer_s: float
    state_bytes: float

    @property
    def seconds(self) -> float:
        return max(self.forward_backward_s, self.communication_s) + self.optimizer_s


@dataclass(frozen=True)
class Cost:
    """What LENA adds, part by part, and what it is added to.

    hooks: norms of the micro-gradients. average: norms of the averaged gradient. collectives: the all-reduces, with
    the bytes of their buffers. factors: from the statistics to the learning rates. calls: of the update's kernel that
    AdamW does not make. trust: norms for lars and lamb. memory_bytes: on the device, for as long as the run.
    """

    hooks: Part
    average: Part
    collectives: Part
    factors: Part
    calls: Part
    trust: Part
    memory_bytes: int
    stock: Stock

    @property
    def parts(self) -> dict[str, Part]:
        names = ("hooks", "average", "collectives", "factors", "calls", "trust")
        return {name: getattr(self, name) for name in names}

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts.values())

    @property
    def share(self) -> float:
        """What LENA adds, as a share of the update without it."""
        return self.seconds / self.stock.seconds


def estimate(job: Job, machine: Machine) -> Cost:
    """What LENA adds to one update of this job on one rank of this machine."""
    return Cost(
        hooks=_pass(
            job.local_tensors * job.accumulation, job.local_params * job.accumulation, machine.hook_s, job, machine
        ),
        average=_pass(job.measured_pieces, job.owned_params, machine.norm_s, job, machine),
        collectives=_collectives(job, machine),
        factors=_on_host(1, machine.update_s + job.all_layers * machine.layer_s, job, machine),
        calls=_on_host(job.moved_pieces - 1, (job.moved_pieces - 1) * machine.call_s, job, machine),
        trust=_trust(job, machine),
        memory_bytes=DEVICE_BYTES_PER_LAYER * job.all_layers,
        stock=_stock(job, machine),
    )


def collective_bytes(job: Job) -> list[int]:
    """Bytes of the buffer of each all-reduce of an update. The first runs over all ranks, and is LENA's own."""
    if job.ranks == 1:
        return []
    statistics = FLOAT64 * (OTHER_NUMBERS + NUMBERS_PER_LAYER * job.all_layers)
    return [statistics, FLOAT64 * 2 * job.all_tensors] if has_norms(job.base) else [statistics]


def all_reduce_seconds(size: float, ranks: int, machine: Machine) -> float:
    """Seconds of an all-reduce of `size` bytes: by a ring or by a tree of nodes, whichever is faster.

    Within a node both go from rank to rank. A hop is paid twice: once to add up, once to spread the sum.
    """
    if ranks == 1:
        return 0.0
    nodes = math.ceil(ranks / machine.ranks_per_node)
    inside = min(ranks, machine.ranks_per_node)
    wait = machine.turn_s * (machine.crowding(ranks) - 1)
    hop_inside, hop_between = machine.hop_inside_s + wait, machine.hop_between_s + wait
    ring = (ranks - nodes) * hop_inside + (nodes - 1) * hop_between
    tree = (inside - 1) * hop_inside + math.ceil(math.log2(nodes)) * hop_between
    transfer = size / machine.bandwidth(ranks) * machine.crowding(ranks)
    return machine.collective_s + min(2 * (ring + transfer * (ranks - 1) / ranks), 2 * (tree + transfer))


def _pass(tensors: int, elements: float, per_tensor_s: float, job: Job, machine: Machine) -> Part:
    """Reading each of `elements` numbers once, in `tensors` pieces."""
    size = elements * job.number_bytes
    seconds = size / machine.memory_bandwidth + tensors * per_tensor_s
    return Part(tensors, size, seconds * machine.crowding(job.ranks))


def _on_host(count: int, seconds: float, job: Job, machine: Machine) -> Part:
    return Part(count, 0, seconds * machine.crowding(job.ranks))


def _collectives(job: Job, machine: Machine) -> Part:
    sizes = collective_bytes(job)
    return Part(len(sizes), sum(sizes), sum(all_reduce_seconds(size, job.ranks, machine) for size in sizes))


def _trust(job: Job, machine: Machine) -> Part:
    """Norms of the weights and of the updates, in fp32, at most from weights, gradient and moments."""
    if not has_norms(job.base):
        return Part(0, 0, 0.0)
    passes, size = 2 * job.measured_pieces, 4 * (2 + moments(job.base)) * job.owned_params
    seconds = size / machine.memory_bandwidth + passes * machine.norm_s
    return Part(passes, size, seconds * machine.crowding(job.ranks))


def _stock(job: Job, machine: Machine) -> Stock:
    crowding = machine.crowding(job.ranks)
    operations = FLOPS_PER_PARAM_AND_TOKEN * job.local_params * job.tokens * job.accumulation
    sent = _transfers(job) * job.local_params * job.number_bytes * (job.replicas - 1) / job.replicas
    moved = job.local_params if job.stage == 0 else job.owned_params
    copy_of_weights = job.number_bytes if job.number_bytes < 4 else 0
    traffic = moved * (4 * (3 + 2 * moments(job.base)) + copy_of_weights)
    return Stock(
        forward_backward_s=operations / machine.flops * crowding,
        sent_bytes=sent,
        communication_s=sent / machine.bandwidth(job.ranks) * crowding,
        optimizer_bytes=traffic,
        optimizer_s=traffic / machine.memory_bandwidth * crowding,
        state_bytes=_state_bytes(job),
    )


def _transfers(job: Job) -> int:
    """How often a rank sends the size of its model in an update.

    ZeRO-0 all-reduces gradients: twice. ZeRO-1 reduces them once and gathers weights once; ZeRO-2 reduces after every
    micro-batch; ZeRO-3 gathers weights twice for every micro-batch as well, and not after the update.
    """
    return {0: 2, 1: 2, 2: job.accumulation + 1, 3: 3 * job.accumulation}[job.stage]


def _state_bytes(job: Job) -> float:
    """Each stage cuts one more of optimizer state, gradients and weights among the replicas."""
    master = 4 if job.number_bytes < 4 else 0
    kept = (master + 4 * moments(job.base), job.number_bytes, job.number_bytes)
    return sum(
        (job.owned_params if job.stage > cut else job.local_params) * size for cut, size in enumerate(kept)
    )  # fmt: skip
