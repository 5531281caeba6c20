"""What LENA reads of Megatron-core's optimizers and data parallelism: the only file with names that may change."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import StateError, UnsupportedError
from ...layouts.layout import GradientPieces, Layout, Segment
from ..deepspeed._internals.grid import Grid

logger = logging.getLogger("ds_lena")

SEEN_WITH = "0.16.1"
"""The version of Megatron-core that this file was tested with."""

EMBEDDING = "embedding.word_embeddings.weight"


def warn_of_version() -> None:
    """Say once that another version of Megatron-core is in use."""
    import megatron.core

    if megatron.core.__version__ != SEEN_WITH:
        logger.warning(
            "ds_lena was tested with megatron-core %s; this is %s. It reads the optimizer's internals and checks them "
            "at the start: install the tested version if that check fails.",
            SEEN_WITH,
            megatron.core.__version__,
        )


def all_ranks() -> torch.distributed.ProcessGroup:
    """The group of all ranks that run."""
    everything = torch.distributed.group.WORLD
    assert everything is not None, "Megatron has initialized torch.distributed"
    return everything


def inside(optimizer: Any, who: str) -> Any:
    """The one optimizer in what `get_megatron_optimizer` returned. `who`: in whose name an error is told.

    Raises:
        UnsupportedError: it is of another kind, or there are several, or it holds nothing.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer

    chained = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    if len(chained) != 1:
        raise UnsupportedError(
            f"{who}: Megatron has chained {len(chained)} optimizers, as for experts and for Muon, or with "
            "overlap_param_gather_with_optimizer_step=True. Supported is one: set that flag to False, "
            'expert_model_parallel_size to 1, and optimizer to "adam" or "sgd".'
        )
    known = (FP32Optimizer, Float16OptimizerWithFloat16Params, DistributedOptimizer)
    if type(chained[0]) not in known:
        raise UnsupportedError(
            f"{who}: got {type(chained[0]).__name__} in place of Megatron's optimizer. Supported are "
            f"{', '.join(k.__name__ for k in known)}, as megatron.core.optimizer.get_megatron_optimizer returns them."
        )
    if chained[0].is_stub_optimizer:
        raise UnsupportedError(f"{who}: this rank trains no parameter. Unfreeze one on every rank.")
    return chained[0]


def require_same_parameters(wrapper: Any, trained: Sequence[tuple[str, Tensor]]) -> None:
    """Raise `StateError` if what needs a gradient now is not what Megatron was given."""
    held, now = (
        {id(parameter) for _, parameter, _, _ in pieces_of(wrapper)},
        {id(parameter) for _, parameter in trained},
    )
    unfrozen = [name for name, parameter in trained if not hasattr(parameter, "main_grad")]
    if unfrozen or not held <= now:
        which = f'"{unfrozen[0]}" was unfrozen' if unfrozen else "a parameter was frozen, or replaced,"
        raise StateError(
            f"LENA: {which} after DistributedDataParallel or the optimizer was made. Freeze and unfreeze before that."
        )


def read_grid(chunk: Any) -> Grid:
    """Which ranks share what.

    Raises:
        UnsupportedError: there are ranks beside those of the model.
    """
    everything = all_ranks()
    grid = Grid(
        data=chunk.dp_cp_group,
        data_ranks=chunk.dp_cp_group.size(),
        tensor=chunk.tp_group,
        tensor_ranks=chunk.tp_group.size(),
        tensor_rank=chunk.tp_group.rank(),
        sequence=chunk.dp_cp_group,
        sequence_ranks=1,
        pipe_ranks=chunk.pp_group.size(),
        expert_ranks=1,
        everything=everything,
    )
    ranks = grid.data_ranks * grid.tensor_ranks * grid.pipe_ranks
    if ranks != everything.size():
        raise UnsupportedError(
            f"LENA: {everything.size()} ranks run, and Megatron's groups make {ranks} of them one model. Supported is "
            "one model on all ranks."
        )
    return grid


def names_in_whole_model(chunk: Any) -> list[tuple[str, Tensor]]:
    """The parameters of this rank's stage, under their names in a model that is not cut into stages.

    On a stage layers are counted from 0. The copy of the embedding on the last stage is its output layer.
    """
    paths = {
        f"{path}.": f"{path.rpartition('.')[0]}.{module.layer_number - 1}."
        for path, module in chunk.module.named_modules()
        if path.rpartition(".")[2].isdigit() and hasattr(module, "layer_number")
    }
    found: list[tuple[str, Tensor]] = []
    for name, parameter in chunk.module.named_parameters():
        local = next((path for path in paths if name.startswith(path)), "")
        whole = paths.get(local, "") + name.removeprefix(local)
        if getattr(parameter, "shared", False):
            whole = whole.replace("output_layer.weight", EMBEDDING)
        found.append((whole, parameter))
    return found


def tied_embedding(chunk: Any) -> dict[int, tuple[list[int], Any]]:
    """By id of this stage's copy of the embedding: the ranks with a copy, in the order of stages, and their group."""
    tied = [parameter for parameter in chunk.module.parameters() if getattr(parameter, "shared_embedding", False)]
    if not tied:
        return {}
    from megatron.core import parallel_state

    group = parallel_state.get_embedding_group()
    return {id(parameter): (torch.distributed.get_process_group_ranks(group), group) for parameter in tied}


class MegatronLayout(Layout):
    """The averaged gradient is in `main_grad` of the model's parameters. `step()` moves tensors of the optimizer.

    `pieces`: the tensor that holds a piece of a parameter, and the piece, for each one on this rank.
    `measured`: the parameters whose pieces here are this rank's share of the averaged gradient.
    `mends`: see `Layout`. There is nothing to mend here.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        pieces: Sequence[tuple[Tensor, Segment]],
        measured: Callable[[int], bool],
        wrapper: Any,
        mends: bool,
    ) -> None:
        self._parameters, self._pieces, self._measured, self._wrapper = parameters, pieces, measured, wrapper
        self.mends = mends

    def segments(self) -> list[tuple[Tensor, list[Segment]]]:
        return [(flat, [segment]) for flat, segment in self._pieces]

    def gradients(self) -> GradientPieces:
        for flat, segment in self._pieces:
            if self._measured(segment.parameter):
                gradient: Tensor = self._parameters[segment.parameter].main_grad  # type: ignore[attr-defined]
                piece = gradient.view(-1).narrow(0, segment.offset, segment.length)
                yield segment.parameter, piece.view_as(flat)

    def unchanged_up_to(self) -> int:
        """Megatron adds a gradient to `main_grad`, and drops it."""
        return sys.maxsize

    def loss_scale(self) -> float:
        """Of this window: it is asked for before Megatron divides by it, and changes it."""
        scaler = getattr(self._wrapper, "grad_scaler", None)
        return 1.0 if scaler is None else float(scaler.scale)


def layout_of(wrapper: Any, parameters: Sequence[Tensor], grid: Grid, mends: bool) -> MegatronLayout:
    """Where the optimizer has its pieces of `parameters`."""
    index = {id(parameter): i for i, parameter in enumerate(parameters)}
    pieces = [
        (flat, Segment(index[id(parameter)], start=0, length=flat.numel(), offset=offset))
        for _, parameter, flat, offset in pieces_of(wrapper)
    ]
    rank, ranks = torch.distributed.get_rank(grid.data), grid.data_ranks
    has_ranges = is_sharded(wrapper)
    return MegatronLayout(parameters, pieces, lambda i: has_ranges or i % ranks == rank, wrapper, mends)


def pieces_of(wrapper: Any) -> Iterator[tuple[int, Tensor, Tensor, int]]:
    """The number of the group, a model's parameter, the tensor that `step()` moves for it, and its offset in there."""
    is_range = is_sharded(wrapper)
    if is_range:
        of_model = [wrapper.model_fp32_groups, wrapper.model_float16_groups]
        moved = [wrapper.shard_fp32_groups, wrapper.shard_fp32_from_float16_groups]
    elif hasattr(wrapper, "float16_groups"):
        of_model = [wrapper.fp32_from_fp32_groups, wrapper.float16_groups]
        moved = [wrapper.fp32_from_fp32_groups, wrapper.fp32_from_float16_groups]
    else:
        of_model = moved = [[group["params"] for group in wrapper.optimizer.param_groups]]
    for model_groups, moved_groups in zip(of_model, moved, strict=True):
        for number, (parameters, flats) in enumerate(zip(model_groups, moved_groups, strict=True)):
            for parameter, flat in zip(parameters, flats, strict=True):
                offset = wrapper._get_model_param_range_map(parameter)["param"].start if is_range else 0
                yield number, parameter, flat, offset


def is_sharded(wrapper: Any) -> bool:
    """Whether this is the distributed optimizer, of which each data-parallel rank has a range of some parameters."""
    return hasattr(wrapper, "model_param_gbuf_map")


def holds_gradients(chunk: Any) -> bool:
    """Whether passes have left gradients in the buffers. This waits for the device."""
    return any(bool(p.main_grad.any()) for p in chunk.parameters() if hasattr(p, "main_grad"))


def own_keys(wrapper: Any) -> Mapping[str, tuple[Any, str]]:
    """Of the keys that are Megatron's: the value, and its name in OptimizerConfig."""
    config = wrapper.config
    common = {"lr": (config.lr, "lr"), "weight_decay": (config.weight_decay, "weight_decay")}
    if config.optimizer == "adam":
        betas = (config.adam_beta1, config.adam_beta2)
        return common | {"betas": (betas, "adam_beta1 and adam_beta2"), "eps": (config.adam_eps, "adam_eps")}
    return common | {"momentum": (config.sgd_momentum, "sgd_momentum")}


def planned_micro_batches() -> tuple[int | None, int | None]:
    """Micro-batches of one rank in a full update, and samples in a micro-batch. None where Megatron was not told."""
    from megatron.core import num_microbatches_calculator as calculator

    if calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR is None:
        return None, None
    return calculator.get_num_microbatches(), calculator.get_micro_batch_size()


# -- calls that are added ---------------------------------------------------------------------------------------------


def around_step(wrapper: Any, before: Callable[[], None], after: Callable[[bool], None]) -> None:
    """Call `before()` when the gradients are reduced, and neither unscaled nor clipped, and `after(applied)` after the
    update. An update that Megatron skips, since a gradient is not finite, ends with False.
    """
    prepare, step = wrapper.prepare_grads, wrapper.step_with_ready_grads

    def prepare_grads() -> bool:
        before()
        is_skipped = True
        try:
            is_skipped = prepare()
        finally:
            if is_skipped:
                after(False)
        return is_skipped

    def step_with_ready_grads() -> bool:
        applied = False
        try:
            applied = step()
        finally:
            after(bool(applied))
        return applied

    wrapper.prepare_grads, wrapper.step_with_ready_grads = prepare_grads, step_with_ready_grads


def after_call(owner: Any, method: str, action: Callable[..., None]) -> None:
    """Call `action` with the same arguments after a method of DistributedDataParallel."""
    original = getattr(owner, method)

    def call(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        action(*args, **kwargs)
        return result

    setattr(owner, method, call)
