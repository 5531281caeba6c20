"""What a machine needs for the simplest things: constants in seconds and in bytes per second, named by machine."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ..errors import ConfigError

WHOLE_CONSTANTS = ("ranks_per_node", "cores")


@dataclass(frozen=True)
class Machine:
    """Constants of one kind of machine; all ranks are alike.

    Of LENA, all on the host, and besides the passes over memory:
        hook_s: the hook of one tensor in one backward pass.
        norm_s: the norm of one piece of the averaged gradient.
        call_s: one more call of the update's kernel.
        update_s, layer_s: the factors of an update, once and for each layer.
    Of memory and arithmetic, of one rank:
        memory_bandwidth: bytes a second of a norm over a large tensor, and of the base rule's update.
        flops: floating-point operations a second that forward and backward reach.
    Of the network:
        collective_s: an all-reduce of nothing, before any hop.
        hop_inside_s, hop_between_s: one hop to another rank of the same node, of another node.
        bandwidth_inside, bandwidth_between: bytes a second of one rank, within its node and to other nodes.
        ranks_per_node: how many ranks share a node.
    Of ranks that share cores:
        cores: of a node, for all its ranks, each of which needs one; 0 where no rank waits for a core.
        turn_s: what a hop takes longer for every further rank on the same core, which has to have its turn.
    """

    hook_s: float
    norm_s: float
    call_s: float
    update_s: float
    layer_s: float
    memory_bandwidth: float
    flops: float
    collective_s: float
    hop_inside_s: float
    hop_between_s: float
    bandwidth_inside: float
    bandwidth_between: float
    ranks_per_node: int
    cores: int
    turn_s: float
    note: str

    def __post_init__(self) -> None:
        for name in CONSTANTS:
            value = getattr(self, name)
            is_number = math.isfinite(value) and value == (int(value) if name in WHOLE_CONSTANTS else value)
            may_be_zero = name.endswith("_s") or name == "cores"
            if not is_number or value < 0 or (value == 0 and not may_be_zero):
                kind = "a whole number" if name in WHOLE_CONSTANTS else "a number"
                sign = ">= 0" if may_be_zero else "> 0"
                raise ConfigError(f'LENA: "{name}": {value!r} is not allowed; allowed is {kind} {sign}.')

    def crowding(self, ranks: int) -> float:
        """How many ranks of a node share one core."""
        return max(1.0, min(ranks, self.ranks_per_node) / self.cores) if self.cores else 1.0

    def bandwidth(self, ranks: int) -> float:
        """Bytes a second that one of so many ranks can send to the others."""
        return self.bandwidth_inside if ranks <= self.ranks_per_node else self.bandwidth_between


CONSTANTS = tuple(field.name for field in fields(Machine) if field.name != "note")
"""The names of all constants."""

_CPU = Machine(
    hook_s=6.7e-6,
    norm_s=6.1e-6,
    call_s=8e-6,
    update_s=710e-6,
    layer_s=0.37e-6,
    memory_bandwidth=10.5e9,
    flops=118e9,
    collective_s=74e-6,
    hop_inside_s=125e-6,
    hop_between_s=125e-6,
    bandwidth_inside=2e9,
    bandwidth_between=2e9,
    ranks_per_node=1 << 30,
    cores=2,
    turn_s=580e-6,
    note="2 cores of a Xeon, gloo, fp32; measured by us",
)
_H100 = Machine(
    hook_s=_CPU.hook_s,
    norm_s=_CPU.norm_s,
    call_s=_CPU.call_s,
    update_s=_CPU.update_s,
    layer_s=_CPU.layer_s,
    memory_bandwidth=3.35e12,
    flops=0.4 * 989e12,
    collective_s=6.8e-6,
    hop_inside_s=0.6e-6,
    hop_between_s=5e-6,
    bandwidth_inside=450e9,
    bandwidth_between=50e9,
    ranks_per_node=8,
    cores=0,
    turn_s=0.0,
    note="NOT measured by us: published figures, and host costs as on our CPU",
)

MACHINES = {"cpu-2-cores": _CPU, "h100": _H100}
"""docs/cost-model.md says where each number comes from."""
