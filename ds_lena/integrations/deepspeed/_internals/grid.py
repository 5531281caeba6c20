"""The parallel grid of an engine: how many ranks share what. It is read of the engine and its mpu."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Group = torch.distributed.ProcessGroup


@dataclass(frozen=True)
class Grid:
    """`data`: the ranks over which this rank's gradients are averaged. `tensor`: the ranks that hold the parts of its
    tensors. `sequence`: the ranks that share its micro-batches, which are among those of `data`. `pipe_ranks`: the
    number of stages. `expert_ranks`: the most ranks over which the experts of one layer are spread. `everything`: all
    ranks of the model, with all replicas and parts.
    """

    data: Group
    data_ranks: int
    tensor: Group
    tensor_ranks: int
    tensor_rank: int
    sequence: Group
    sequence_ranks: int
    pipe_ranks: int
    expert_ranks: int
    everything: Group

    @property
    def is_split(self) -> bool:
        """Whether ranks hold different parts of the model."""
        return self.tensor_ranks * self.pipe_ranks * self.expert_ranks > 1

    @property
    def shares_micro_batches(self) -> bool:
        """Whether several ranks work on one micro-batch."""
        return self.is_split or self.sequence_ranks > 1

    @property
    def replicas(self) -> int:
        """How many micro-batches are at work at once."""
        return self.data_ranks // self.sequence_ranks


def read_grid(engine: Any) -> Grid:
    """The grid of an engine. On an axis of one rank the group is of no use. `everything` is `data` if all have all."""
    from deepspeed.utils.bwc import bwc_tensor_model_parallel_group, bwc_tensor_model_parallel_rank

    data, tensor_ranks, pipe_ranks = engine.seq_data_parallel_group, tensor_parallel_ranks(engine), stages(engine)
    has_parts, sequence_ranks = tensor_ranks > 1, sequence_parallel_ranks(engine)
    return Grid(
        data=data,
        data_ranks=torch.distributed.get_world_size(data),
        tensor=bwc_tensor_model_parallel_group(engine.mpu) if has_parts else data,
        tensor_ranks=tensor_ranks,
        tensor_rank=bwc_tensor_model_parallel_rank(engine.mpu) if has_parts else 0,
        sequence=engine.seq_parallel_group if sequence_ranks > 1 else data,
        sequence_ranks=sequence_ranks,
        pipe_ranks=pipe_ranks,
        expert_ranks=max((expert.ranks for expert in experts(engine.module).values()), default=1),
        everything=_all_ranks() if tensor_ranks * pipe_ranks > 1 else data,
    )


def _all_ranks() -> Group:
    group = torch.distributed.group.WORLD
    assert group is not None, "DeepSpeed has initialized torch.distributed"
    return group


def tensor_parallel_ranks(engine: Any) -> int:
    """The number of ranks over which tensors are split, by AutoTP, or as the mpu says. Ulysses' mpu splits none."""
    from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size

    is_ulysses = hasattr(engine.mpu, "initialize_sequence_parallel")
    return 1 if engine.mpu is None or is_ulysses else int(bwc_tensor_model_parallel_world_size(engine.mpu))


def sequence_parallel_ranks(engine: Any) -> int:
    """The number of ranks that share a micro-batch."""
    return int(engine.sequence_parallel_size)


def ulysses_is_set_up() -> bool:
    """Whether `initialize_sequence_parallel` of DeepSpeed's own mpu has been called."""
    mpu = sys.modules.get("deepspeed.runtime.sequence_parallel.parallel_state_sp")
    return mpu is not None and mpu._SEQUENCE_PARALLEL_GROUP is not None


def megatrons_parts() -> int:
    """Into how many parts Megatron-core's groups split a model. 1 if there are no such groups."""
    state = sys.modules.get("megatron.core.parallel_state")
    if state is None or not state.model_parallel_is_initialized():
        return 1
    return int(state.get_tensor_model_parallel_world_size() * state.get_pipeline_model_parallel_world_size())


def stages(engine: Any) -> int:
    """The number of stages of the pipeline."""
    from deepspeed.utils.bwc import bwc_pipeline_parallel_world_size

    return int(bwc_pipeline_parallel_world_size(engine.mpu))


def tied_weights(model: Any) -> list[tuple[Tensor, list[int], Group]]:
    """The tied weights of a PipelineModule that lie on several stages: weight, ranks that hold a copy, their group."""
    found = []
    for key, comm in getattr(model, "tied_comms", {}).items():
        for name in [comm["weight_attr"]] if isinstance(comm["weight_attr"], str) else comm["weight_attr"]:
            weight = functools.reduce(getattr, name.split("."), model.tied_modules[key])
            found.append((weight, list(comm["ranks"]), comm["group"]))
    return found


@dataclass(frozen=True)
class Expert:
    """One expert of a `deepspeed.moe` layer.

    `local`, `number`: its number on this rank, and in the whole layer. `ranks`: over which the experts of the layer are
    spread. `copies`: the ranks that hold a copy of this one.
    """

    local: int
    number: int
    ranks: int
    copies: Group


def experts(model: torch.nn.Module) -> dict[int, Expert]:
    """The expert that a parameter belongs to, by `id(parameter)`. Dense parameters have none."""
    from deepspeed.moe.experts import Experts
    from deepspeed.utils import groups

    found = {}
    for module in model.modules():
        if isinstance(module, Experts):
            here = module.deepspeed_experts
            for local, expert in enumerate(here):
                for parameter in expert.parameters():
                    name = parameter.group_name
                    found[id(parameter)] = Expert(
                        local=local,
                        number=local + groups._get_expert_parallel_rank(name) * len(here),
                        ranks=groups._get_expert_parallel_world_size(name),
                        copies=groups._get_expert_data_parallel_group(name),
                    )
    return found


def is_marked_as_expert(parameter: Tensor) -> bool:
    """Whether DeepSpeed averages the gradient over the copies of an expert alone."""
    from deepspeed.moe.utils import is_moe_param

    return bool(is_moe_param(parameter))


def is_part(parameter: Tensor) -> bool:
    """Whether a rank holds a part of the tensor, by the mark of Megatron and AutoTP. Otherwise it has a copy."""
    return bool(getattr(parameter, "tensor_model_parallel", False) or getattr(parameter, "model_parallel", False))


def partition_dim(parameter: Tensor) -> int | None:
    """The dimension along which the tensor is cut, if the parameter says so."""
    dim = getattr(parameter, "partition_dim", None)
    return dim if isinstance(dim, int) and dim >= 0 else None
