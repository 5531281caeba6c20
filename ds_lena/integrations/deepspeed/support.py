"""The table of what is supported under DeepSpeed, a row per feature. `docs/support.md` is made from it.

A feature is supported by a class, or refused with the nearest supported choice; nothing is quietly wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...errors import UnsupportedError
from ._internals.facts import EngineFacts

_PARITY = "tests/parity/"
_REFUSED = "tests/integrations/test_unsupported.py::test_it_is_refused_by_name_on_every_rank"


@dataclass(frozen=True)
class Feature:
    """One row. `what`: as an error calls it. `is_on`: how to see it. `test`: what shows it.

    Supported `by` a file of the package, or, where that is empty, refused with `instead`.
    """

    what: str
    is_on: Callable[[EngineFacts], bool]
    by: str = ""
    instead: str = ""
    test: str = _REFUSED


def _wrapper(stage: int, bf16: bool, precision: str, by: str) -> Feature:
    return Feature(
        f"ZeRO {stage}, {precision}",
        lambda facts: facts.stage == stage and facts.bf16 == bf16 and not facts.fp16,
        by=f"integrations/deepspeed/_internals/{by}.py",
        test=f"{_PARITY}test_matrix.py",
    )


_NO_OFFLOAD = 'remove the entry, or set its "device" to "none"'
_DATA_PARALLEL = "use ZeRO 1-3 with data parallelism only"


FEATURES: tuple[Feature, ...] = (
    _wrapper(0, False, "fp32", "zero0"),
    _wrapper(0, True, "bf16", "zero0"),
    _wrapper(1, False, "fp32", "zero12"),
    _wrapper(1, True, "bf16", "zero12"),
    Feature(
        "ZeRO 1, bf16 with fp32 accumulation",
        lambda facts: facts.stage == 1 and facts.bf16 and facts.fp32_accumulation,
        by="integrations/deepspeed/_internals/bf16.py",
        test=f"{_PARITY}test_matrix.py",
    ),
    _wrapper(2, False, "fp32", "zero12"),
    _wrapper(2, True, "bf16", "zero12"),
    _wrapper(3, False, "fp32", "zero3"),
    _wrapper(3, True, "bf16", "zero3"),
    Feature(
        "gradient accumulation, a short last window, set_train_batch_size, no_sync",
        lambda facts: facts.accumulates,
        by="grad_stats/hooks.py",
        test=f"{_PARITY}test_loops.py",
    ),
    Feature(
        "gradient_clipping",
        lambda facts: facts.clips,
        by="integrations/deepspeed/_internals/engine.py",
        test=f"{_PARITY}test_matrix.py",
    ),
    Feature(
        "overlap_comm",
        lambda facts: facts.overlap_comm,
        by="integrations/deepspeed/_internals/zero12.py",
        test=f"{_PARITY}test_layouts.py",
    ),
    Feature(
        "round_robin_gradients",
        lambda facts: facts.round_robin,
        by="integrations/deepspeed/_internals/zero12.py",
        test=f"{_PARITY}test_layouts.py",
    ),
    Feature(
        "reduce_scatter: false",
        lambda facts: not facts.reduce_scatter,
        by="integrations/deepspeed/_internals/zero12.py",
        test=f"{_PARITY}test_layouts.py",
    ),
    Feature(
        "prescale_gradients, gradient_predivide_factor",
        lambda facts: facts.prescales or facts.predivide != 1.0,
        by="grad_stats/statistics.py",
        test=f"{_PARITY}test_layouts.py",
    ),
    Feature("fp16", lambda facts: facts.fp16, instead='use "bf16": {"enabled": true}'),
    Feature('"offload_optimizer"', lambda facts: facts.offload_optimizer, instead=_NO_OFFLOAD),
    Feature('"offload_param"', lambda facts: facts.offload_param, instead=_NO_OFFLOAD),
    Feature('"zenflow"', lambda facts: facts.zenflow, instead="remove the entry"),
    Feature("a PipelineModule", lambda facts: facts.pipeline, instead="use ZeRO 1-3 without pipeline parallelism"),
    Feature("mixture-of-experts layers", lambda facts: facts.experts, instead="use a dense model"),
    Feature('"tensor_parallel"', lambda facts: facts.tensor_parallel, instead=_DATA_PARALLEL),
    Feature("sequence parallelism", lambda facts: facts.sequence_parallel, instead="use data parallelism only"),
    Feature("a model-parallel mpu", lambda facts: facts.model_parallel, instead=_DATA_PARALLEL),
    Feature('"zero_hpz_partition_size"', lambda facts: facts.hpz, instead="leave it at 1"),
    Feature('"zero_quantized_gradients"', lambda facts: facts.quantized_gradients, instead="set it to false"),
    Feature('"zero_quantized_weights"', lambda facts: facts.quantized_weights, instead="set it to false"),
    Feature('"elastic_checkpoint"', lambda facts: facts.elastic_checkpoint, instead="set it to false"),
    Feature(
        '"load_universal"',
        lambda facts: facts.universal_checkpoint,
        instead="load a checkpoint of the same world size",
    ),
    Feature('"deepcompile"', lambda facts: facts.deepcompile, instead="use engine.compile() without it"),
    Feature('"gradient_allreduce_op": "sum"', lambda facts: facts.sums_gradients, instead='use "mean"'),
    # DeepSpeed 0.19.8 leaves out the multiplication after the reduction there, so the gradient is too small.
    Feature(
        '"gradient_predivide_factor": {predivide}, the number of ranks, at ZeRO-3 (DeepSpeed scales wrongly there)',
        lambda facts: facts.stage == 3 and facts.predivide != 1.0 and facts.predivide == facts.ranks,
        instead="leave it out",
    ),
    Feature(
        "a model wrapped by DistributedDataParallel",
        lambda facts: facts.in_data_parallel,
        instead="give DeepSpeed the model itself",
    ),
)


def refuse_unsupported(facts: EngineFacts) -> None:
    """Raise `UnsupportedError` for the first feature that is on and refused."""
    for feature in FEATURES:
        if not feature.by and feature.is_on(facts):
            what = feature.what.format(predivide=facts.predivide)
            raise UnsupportedError(f"LENA does not support {what} yet. Nearest supported choice: {feature.instead}.")
