"""What is trained on how many ranks, and the sizes that follow from it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import ConfigError
from ..keys import BASES

STAGES = (0, 1, 2, 3)
PRECISIONS = {"fp32": 4, "bf16": 2}
"""Bytes of a weight and of its gradient, as the model holds them."""

LARGEST = 1e15
"""Of every count: beyond it no number that comes out means anything."""

WIDTH_PER_BLOCK = 128  # GPT-3 175B: 12,288 / 96; Llama 3.1 405B: 16,384 / 126
TENSORS_PER_BLOCK = 12  # GPT-2's: two norms and four linear layers, each with a bias
OTHER_TENSORS = 4  # two embeddings, and the last norm


@dataclass(frozen=True)
class Job:
    """One training job.

    Args:
        params: parameters of the whole model.
        ranks: of all kinds of parallelism together.
        stage: of ZeRO; 0 is plain data parallelism.
        tensor_parallel, pipeline_parallel: ranks that share one replica. LENA refuses both under DeepSpeed so far.
        tokens: in one micro-batch of one replica.
        accumulation: micro-batches of one replica in an update.
        base: the base rule.
        precision: of weights and gradients; fp32 or bf16 with fp32 master weights.
        tensors: parameter tensors of the whole model; None is a GPT's, see `tensors_of`.
        layers: gains of the whole model; None is one for each tensor, as `"layer": "tensor"`.
    """

    params: float
    ranks: int
    stage: int = 2
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    tokens: float = 4096
    accumulation: int = 1
    base: str = "adamw"
    precision: str = "bf16"
    tensors: int | None = None
    layers: int | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in self._wrong():
            raise ConfigError(f'LENA: "{name}": {value!r} is not allowed; allowed is {allowed}.')

    def _wrong(self) -> Iterator[tuple[str, object, str]]:
        """(name, value, what is allowed) of what is not."""
        for name in ("params", "tokens"):
            if not 1 <= getattr(self, name) <= LARGEST:
                yield name, getattr(self, name), f"a number from 1 to {LARGEST:g}"
        for name in ("ranks", "tensor_parallel", "pipeline_parallel", "accumulation", "tensors", "layers"):
            value = getattr(self, name)
            if value is not None and not (1 <= value <= LARGEST and value == int(value)):
                yield name, value, f"a whole number from 1 to {LARGEST:g}"
        for name, known in (("stage", STAGES), ("base", BASES), ("precision", tuple(PRECISIONS))):
            if getattr(self, name) not in known:
                yield name, getattr(self, name), "one of " + ", ".join(f"{value}" for value in known)
        if self.ranks % self.ranks_per_replica:
            product = f"tensor_parallel x pipeline_parallel = {self.ranks_per_replica}"
            yield "ranks", self.ranks, f"a multiple of {product}"
        if self.pipeline_parallel > self.all_tensors:
            yield "pipeline_parallel", self.pipeline_parallel, f"at most the number of tensors, {self.all_tensors}"
        if self.all_tensors > self.params:
            yield "tensors", self.tensors, f"at most the number of parameters, {self.params:g}"
        if self.all_layers > self.all_tensors:
            yield "layers", self.layers, f"at most the number of tensors, {self.all_tensors}"

    @property
    def ranks_per_replica(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def replicas(self) -> int:
        """The size of a data-parallel group."""
        return self.ranks // self.ranks_per_replica

    @property
    def all_tensors(self) -> int:
        """T: parameter tensors of the whole model."""
        return tensors_of(self.params) if self.tensors is None else self.tensors

    @property
    def all_layers(self) -> int:
        """L: gains of the whole model."""
        return self.all_tensors if self.layers is None else self.layers

    @property
    def local_tensors(self) -> int:
        """Tensors of one pipeline stage; tensor parallelism cuts each of them, so that every rank has a part."""
        return math.ceil(self.all_tensors / self.pipeline_parallel)

    @property
    def local_params(self) -> float:
        """Parameters of a rank before ZeRO: those whose micro-gradients it makes."""
        return self.params / self.ranks_per_replica

    @property
    def owned_params(self) -> float:
        """Parameters whose averaged gradient this rank measures, at ZeRO-0 as well."""
        return self.local_params / self.replicas

    @property
    def measured_pieces(self) -> int:
        """Pieces of the averaged gradient that this rank measures.

        ZeRO-0 deals out whole tensors. ZeRO-1 and 2 cut the flat row of all of them, and up to one tensor more than
        its share lies on a rank. ZeRO-3 gives every rank a piece of every tensor.
        """
        if self.stage == 3 or self.replicas == 1:
            return self.local_tensors
        share = math.ceil(self.local_tensors / self.replicas)
        return share if self.stage == 0 else min(share + 1, self.local_tensors)

    @property
    def moved_pieces(self) -> int:
        """Pieces that this rank's update moves, each by a call of its own."""
        return self.local_tensors if self.stage == 0 else self.measured_pieces

    @property
    def number_bytes(self) -> int:
        """Of a weight and of its gradient."""
        return PRECISIONS[self.precision]


def blocks_of(params: float) -> int:
    """Blocks of a GPT with 12 d^2 parameters in each and a width d of 128 per block: 12 x 128^2 x blocks^3."""
    return max(1, round((params / (12 * WIDTH_PER_BLOCK**2)) ** (1 / 3)))


def tensors_of(params: float) -> int:
    """Parameter tensors of such a GPT."""
    return TENSORS_PER_BLOCK * blocks_of(params) + OTHER_TENSORS
