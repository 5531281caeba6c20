"""The only file that spells private DeepSpeed names or patches DeepSpeed. Seen with DeepSpeed 0.19.8.

Two parts: the seam (where DeepSpeed's engine calls us) and the layouts (where each wrapper keeps the averaged gradient
and the tensors that it gives to `step()`). `tests/integrations/test_deepspeed_private.py` pins every name used here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import StateError
from ..shards import Segment

SEEN_WITH = "0.19.8"
"""The DeepSpeed version with which every name below was checked."""

Pieces = Iterator[tuple[int, Tensor | None]]

# -- the seam ---------------------------------------------------------------------------------------------------------


def wrap_configure_optimizer(engine_module: ModuleType, wrapper: Callable[..., None]) -> None:
    """Have `wrapper(engine, original, client_optimizer, model_parameters)` run where an engine makes its optimizer."""
    engine_class = engine_module.DeepSpeedEngine
    original = engine_class._configure_optimizer

    @functools.wraps(original)
    def configure(self: Any, client_optimizer: Any, model_parameters: Any) -> None:
        wrapper(self, functools.partial(original, self), client_optimizer, model_parameters)

    engine_class._configure_optimizer = configure


def allow_under_zero(optimizer_class: type) -> None:
    """Make ZeRO accept the class without `zero_allow_untested_optimizer`."""
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    if optimizer_class not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(optimizer_class)


def wrap_model_step(engine: Any, before: Callable[[], object], after: Callable[[bool], None]) -> None:
    """Call `before()` between reduction and clipping of an update, `after(applied)` when the update is through.

    Also called by the engine's `step` at every gradient accumulation boundary, skipped updates included.
    """
    original = engine._take_model_step

    def take_model_step(*args: Any, **kwargs: Any) -> Any:
        before()
        applied = False
        try:
            result = original(*args, **kwargs)
            applied = engine.was_step_applied()
        finally:
            after(applied)
        return result

    engine._take_model_step = take_model_step


def after_scheduler(engine: Any, action: Callable[[], None]) -> None:
    """Call `action()` once, right after the engine has made its learning-rate scheduler, still in `initialize`."""
    original = engine._configure_lr_scheduler

    def configure(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        action()

    engine._configure_lr_scheduler = configure


def wrap_destroy(engine: Any, before: Callable[[], None]) -> None:
    """Call `before()` when the engine is destroyed."""
    original = engine.destroy

    def destroy(*args: Any, **kwargs: Any) -> Any:
        before()
        return original(*args, **kwargs)

    engine.destroy = destroy


def write_events(engine: Any, values: Callable[[], Mapping[str, float]]) -> None:
    """Give `values()` to the engine's monitors, as DeepSpeed writes its own. Only rank 0 writes, and asks for them."""
    if engine.monitor.enabled and engine.global_rank == 0:
        engine.monitor.write_events(
            [(f"Train/{name}", value, engine.global_samples) for name, value in values().items()]
        )


def basic_optimizer(engine: Any) -> Any:
    """The optimizer inside of ZeRO's or the precision wrappers."""
    return engine.basic_optimizer


def scheduler_total_steps(engine: Any) -> int | None:
    """`total_num_steps` of DeepSpeed's scheduler, whether made from the JSON or given to `initialize`."""
    value = getattr(engine.lr_scheduler, "total_num_steps", None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def data_parallel_group(engine: Any) -> torch.distributed.ProcessGroup:
    """The ranks over which the engine averages gradients."""
    return engine.seq_data_parallel_group


def refusals(engine: Any) -> Iterator[tuple[bool, str, str]]:
    """(whether it is on, what it is, the nearest supported choice) for all that LENA does not support yet."""
    from deepspeed.utils import groups

    config = engine._config
    zero = config.zero_config

    def offloads(offload: Any) -> bool:
        return offload is not None and str(getattr(offload.device, "value", offload.device)) != "none"

    model_parallel_size = getattr(engine.mpu, "get_model_parallel_world_size", lambda: 1)
    autocast_fp16 = engine.torch_autocast_enabled() and engine.torch_autocast_dtype() == torch.float16
    plain_model = not isinstance(engine.module, (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel))
    in_parts = groups._get_sequence_parallel_world_size() > 1 or engine.mesh_device is not None
    sequence_parallel = in_parts or engine.seq_dp_world_size != engine.dp_world_size
    no_offload = 'remove the entry, or set its "device" to "none"'
    yield engine.fp16_enabled() or autocast_fp16, "fp16", 'use "bf16": {"enabled": true}'
    yield offloads(zero.offload_optimizer), '"offload_optimizer"', no_offload
    yield offloads(zero.offload_param), '"offload_param"', no_offload
    yield engine.zenflow, '"zenflow"', "remove the entry"
    yield engine.pipeline_parallelism, "a PipelineModule", "use ZeRO 1-3 without pipeline parallelism"
    yield engine.has_moe_layers, "mixture-of-experts layers", "use a dense model"
    yield engine.autotp_size() > 1, '"tensor_parallel"', "use ZeRO 1-3 with data parallelism only"
    yield sequence_parallel, "sequence parallelism", "use data parallelism only"
    yield model_parallel_size() > 1, "a model-parallel mpu", "use ZeRO 1-3 with data parallelism only"
    yield zero.zero_hpz_partition_size > 1, '"zero_hpz_partition_size"', "leave it at 1"
    yield zero.zero_quantized_gradients, '"zero_quantized_gradients"', "set it to false"
    yield zero.zero_quantized_weights, '"zero_quantized_weights"', "set it to false"
    yield bool(zero.elastic_checkpoint), '"elastic_checkpoint"', "set it to false"
    yield engine.load_universal_checkpoint(), '"load_universal"', "load a checkpoint of the same world size"
    yield engine.is_deepcompile_enabled(), '"deepcompile"', "use engine.compile() without it"
    yield not engine.gradient_average, '"gradient_allreduce_op": "sum"', 'use "mean"'
    # DeepSpeed 0.19.8 leaves out the multiplication after the reduction there, so the gradient is too small.
    predivide = engine.gradient_predivide_factor() if engine.postscale_gradients() else 1.0
    predivide_is_wrong = (
        engine.zero_optimization_stage() == 3 and predivide != 1.0 and predivide == engine.dp_world_size
    )
    what = f'"gradient_predivide_factor": {predivide}, the number of ranks, at ZeRO-3 (DeepSpeed scales wrongly there)'
    yield predivide_is_wrong, what, "leave it out"
    yield not plain_model, "a model wrapped by DistributedDataParallel", "give DeepSpeed the model itself"


# -- the layouts ------------------------------------------------------------------------------------------------------


class Layout(Protocol):
    """Where one kind of wrapper keeps what LENA needs. `index`, at construction: id(parameter) to its number."""

    def segments(self) -> list[tuple[Tensor, list[Segment]]]:
        """See `shards.Host.segments`."""
        ...

    def gradients(self) -> Pieces:
        """See `shards.Host.gradients`."""
        ...

    def values(self, parameter: Tensor, segment: Segment) -> Tensor:
        """The model's own values for a segment, to check that it was understood."""
        ...


class ReplicatedLayout:
    """Stage 0: every rank holds the whole averaged gradient in `p.grad` and measures its share of the parameters.

    In bf16 `FP16_UnfusedOptimizer` gives `step()` an fp32 copy of each parameter, else it gets the parameter itself.
    """

    def __init__(self, masters: list[tuple[Tensor, Tensor]], index: Mapping[int, int], rank: int, ranks: int) -> None:
        self._masters = [(index[id(parameter)], parameter, master) for parameter, master in masters]
        self._rank, self._ranks = rank, ranks

    def segments(self) -> list[tuple[Tensor, list[Segment]]]:
        return [(master, [Segment(i, 0, p.numel(), 0)]) for i, p, master in self._masters]

    def gradients(self) -> Pieces:
        for i, parameter, _ in self._masters:
            if i % self._ranks == self._rank:
                yield i, parameter.grad

    def values(self, parameter: Tensor, segment: Segment) -> Tensor:
        return _slice(parameter, segment)


class Zero12Layout:
    """Stages 1 and 2: one flat fp32 partition a group, in the optimizer's own order (`_hp_mapping` can be wrong)."""

    def __init__(self, zero: Any, index: Mapping[int, int]) -> None:
        self._zero = zero
        self._segments: list[list[Segment]] = []
        for group, parameters in enumerate(zero.round_robin_bit16_groups):
            size = int(zero.partition_size[group])
            start = torch.distributed.get_rank(zero.real_dp_process_group[group]) * size
            offsets = zero.round_robin_bit16_offsets[group]
            self._segments.append(_cut(zip(parameters, offsets, strict=True), start, size, index))

    def segments(self) -> list[tuple[Tensor, list[Segment]]]:
        return list(zip(self._zero.single_partition_of_fp32_groups, self._segments, strict=True))

    def gradients(self) -> Pieces:
        for group, segments in enumerate(self._segments):
            by_start = {segment.start: segment for segment in segments}
            position = 0
            for piece in self._zero.averaged_gradients.get(group) or ():
                segment = by_start.pop(position, None)
                if segment is not None:
                    if segment.length != piece.numel():
                        raise StateError(
                            f"LENA: DeepSpeed gave a piece of {piece.numel()} gradient elements where {segment.length} "
                            f"were expected. Install DeepSpeed {SEEN_WITH}, or report this configuration."
                        )
                    yield segment.parameter, piece
                position += piece.numel()
            for segment in by_start.values():
                yield segment.parameter, None

    def values(self, parameter: Tensor, segment: Segment) -> Tensor:
        return _slice(parameter, segment)


class Bf16Layout:
    """`BF16_Optimizer` (stage 1, bf16, fp32 accumulation): as stage 1, with gradients in a flat buffer of their own."""

    def __init__(self, wrapper: Any, index: Mapping[int, int]) -> None:
        self._wrapper = wrapper
        self._segments: list[list[Segment]] = []
        for group, parameters in enumerate(wrapper.bf16_groups):
            size = wrapper.fp32_groups_flat_partition[group].numel()
            start = torch.distributed.get_rank(wrapper.real_dp_process_group[group]) * size
            self._segments.append(_cut(_consecutive(parameters), start, size, index))

    def segments(self) -> list[tuple[Tensor, list[Segment]]]:
        return list(zip(self._wrapper.fp32_groups_flat_partition, self._segments, strict=True))

    def gradients(self) -> Pieces:
        flats = self._wrapper.fp32_groups_gradient_flat_partition
        for flat, segments in zip(flats, self._segments, strict=True):
            for segment in segments:
                yield segment.parameter, flat.narrow(0, segment.start, segment.length)

    def values(self, parameter: Tensor, segment: Segment) -> Tensor:
        return _slice(parameter, segment)


class Zero3Layout:
    """Stage 3: each parameter is cut into equal parts, one a rank; sub-groups of parts lie in flat fp32 tensors."""

    def __init__(self, zero: Any, index: Mapping[int, int]) -> None:
        self._zero = zero
        self._segments: list[list[Segment]] = []
        self._buffers: dict[int, Tensor] = {}
        buffer_start = 0
        for parameters in zero.fp16_groups:
            segments, position = [], 0
            for parameter in parameters:
                part = parameter.partition_numel()
                offset = part * torch.distributed.get_rank(parameter.ds_process_group)
                i, length = index[id(parameter)], max(0, min(part, parameter.ds_numel - offset))
                segments.append(Segment(i, position, length, offset))
                self._buffers[i] = zero.grad_partitions_flat_buffer.narrow(0, buffer_start, part)
                position += part
                buffer_start += part
            self._segments.append(segments)

    def segments(self) -> list[tuple[Tensor, list[Segment]]]:
        flats = self._zero.fp32_partitioned_groups_flat
        return [(flat, [s for s in cut if s.length]) for flat, cut in zip(flats, self._segments, strict=True)]

    def gradients(self) -> Pieces:
        for group, segments in enumerate(self._segments):
            parts = self._zero.averaged_gradients.get(group) or [None] * len(segments)
            for segment, part in zip(segments, parts, strict=True):
                if segment.length:
                    yield segment.parameter, None if part is None else part.narrow(0, 0, segment.length)

    def values(self, parameter: Tensor, segment: Segment) -> Tensor:
        part: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        return part.data.reshape(-1).narrow(0, 0, segment.length)

    def clear_gradient(self, parameter: int) -> None:
        """Zero the gradient buffer of a parameter.

        DeepSpeed never does: a parameter that a window does not use would be stepped with the gradient of the window
        before, and one first used in a later micro-step would add to it.
        """
        self._buffers[parameter].zero_()


def read_layout(engine: Any, index: Mapping[int, int]) -> Layout | None:
    """The layout of an engine's optimizer wrapper, None for a wrapper that is not known."""
    wrapper = engine.optimizer
    name = type(wrapper).__name__
    if name == "DeepSpeedZeroOptimizer":
        return Zero12Layout(wrapper, index)
    if name == "DeepSpeedZeroOptimizer_Stage3":
        return Zero3Layout(wrapper, index)
    if name == "BF16_Optimizer":
        return Bf16Layout(wrapper, index)
    if name == "FP16_UnfusedOptimizer":
        low, high = wrapper.fp16_groups, wrapper.fp32_groups
        masters = [pair for pairs in zip(low, high, strict=True) for pair in zip(*pairs, strict=True)]
    elif wrapper is basic_optimizer(engine):
        masters = [(p, p) for group in wrapper.param_groups for p in group["params"] if p.requires_grad]
    else:
        return None
    group = data_parallel_group(engine)
    return ReplicatedLayout(masters, index, torch.distributed.get_rank(group), torch.distributed.get_world_size(group))


def logical_shape(parameter: Tensor) -> torch.Size:
    """Shape of the whole parameter, also where ZeRO-3 has partitioned it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def clip_coefficient(engine: Any, norm: Tensor) -> Tensor | None:
    """What every wrapper multiplies a gradient of this norm by before `step()`; None where clipping is off."""
    largest = engine.gradient_clipping()
    return 1 / ((norm + 1e-6) / largest).clamp(min=1) if largest else None


def _consecutive(parameters: Sequence[Tensor]) -> Iterator[tuple[Tensor, int]]:
    """Parameters that lie one behind the other, with their offsets in the flat tensor."""
    offset = 0
    for parameter in parameters:
        yield parameter, offset
        offset += parameter.numel()


def _cut(laid_out: Iterable[tuple[Tensor, int]], start: int, size: int, index: Mapping[int, int]) -> list[Segment]:
    """Segments of the part [start, start + size) of a flat tensor in which parameters lie at the given offsets."""
    segments = []
    for parameter, offset in laid_out:
        begin, end = max(offset, start), min(offset + parameter.numel(), start + size)
        if begin < end:
            segments.append(Segment(index[id(parameter)], begin - start, end - begin, begin - offset))
    return segments


def _slice(parameter: Tensor, segment: Segment) -> Tensor:
    return parameter.data.reshape(-1).narrow(0, segment.offset, segment.length)
