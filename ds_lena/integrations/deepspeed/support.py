"""The table of what is supported, a row per feature. docs/support.md is made from it.

A feature is supported by a file of the package, or it is refused with the nearest supported choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...errors import UnsupportedError
from ._internals.facts import EngineFacts

IsOn = Callable[[EngineFacts], bool]

PRECISIONS = ("fp32", "bf16", "bf16 with fp32 accumulation", "fp16")
"""The columns of the matrix of ZeRO stages."""


_UNSUPPORTED = "tests/integrations/test_unsupported.py"


def not_a_fact(facts: EngineFacts) -> bool:
    """For a feature that an engine's facts do not show. Where it is refused, the code that meets it refuses it."""
    return False


@dataclass(frozen=True)
class Feature:
    """One row of the table.

    `what`: the name that an error uses. `is_on`: how to see that an engine uses it. `test`: the test that shows it.
    `by`: the file of the package that supports it. `instead`: the nearest supported choice, for a refused feature.
    `area`, `note`: for docs/support.md, in Markdown. An empty area is refused, or is in the matrix of ZeRO stages.
    """

    what: str
    is_on: IsOn
    by: str = ""
    instead: str = ""
    test: str = f"{_UNSUPPORTED}::test_it_is_refused_by_name_on_every_rank"
    area: str = ""
    note: str = ""


_LAYOUTS = "tests/parity/test_layouts.py"
_LOOPS = "tests/parity/test_loops.py"
_MATRIX = "tests/parity/test_matrix.py"
_PLAIN = "tests/parity/test_plain.py"
_SELECTION = "tests/integrations/test_selection.py"
_PARAMETERS = "tests/unit/test_optimizer_parameters.py"
_CHECKPOINTING = "tests/unit/test_hooks_checkpointing.py"
_MISUSE = "tests/integrations/test_misuse.py"

_WINDOWS = "tests/integrations/test_window.py"
_TILED = "tests/integrations/test_tiled_loss.py"
_TWO_ENGINES = "test_the_generators_gradients_in_the_critic_are_dropped"

_INTERNALS = "integrations/deepspeed/_internals"
_ATTACH = "integrations/deepspeed/attach.py"
_HOOKS = "grad_stats/hooks.py"
_STATISTICS = "grad_stats/statistics.py"
_WINDOW = "integrations/deepspeed/window.py"
_ZERO12 = f"{_INTERNALS}/zero12.py"
_ZERO3 = f"{_INTERNALS}/zero3.py"

_OPTIONS = "DeepSpeed options"
_LOOP = "Training loops"
_MODELS = "Models and parameters"
_WAYS = "Ways to start LENA"
_PYTORCH = "Plain PyTorch"


def _stage(stage: int, bf16: bool, accumulates_in_fp32: bool, file: str) -> Feature:
    def is_on(facts: EngineFacts) -> bool:
        in_fp32 = facts.bf16 and facts.fp32_accumulation
        return not facts.fp16 and (facts.stage, facts.bf16, in_fp32) == (stage, bf16, accumulates_in_fp32)

    what = f"ZeRO {stage}, {PRECISIONS[bf16 + accumulates_in_fp32]}"
    return Feature(what, is_on, by=f"{_INTERNALS}/{file}.py", test=_MATRIX)


def _runs(area: str, what: str, by: str, test: str, note: str = "", is_on: IsOn = not_a_fact) -> Feature:
    return Feature(what, is_on, by=by, test=test, area=area, note=note)


def _refused(what: str, instead: str, test: str) -> Feature:
    return Feature(what, not_a_fact, instead=instead, test=test)


_NO_OFFLOAD = 'remove the entry, or set its "device" to "none"'
_DATA_PARALLEL = "use ZeRO 1-3 with data parallelism only"

STAGES: tuple[Feature, ...] = (
    _stage(0, False, False, "zero0"),
    _stage(0, True, False, "zero0"),
    _stage(1, False, False, "zero12"),
    _stage(1, True, False, "zero12"),
    _stage(1, True, True, "bf16"),
    _stage(2, False, False, "zero12"),
    _stage(2, True, False, "zero12"),
    _stage(2, True, True, "zero12"),
    _stage(3, False, False, "zero3"),
    _stage(3, True, False, "zero3"),
    _stage(3, True, True, "zero3"),
)

SUPPORTED: tuple[Feature, ...] = (
    *STAGES,
    _runs(
        _OPTIONS,
        "bf16_master_weights_and_grads (ZeRO 1-3)",
        _ZERO12,
        "tests/integrations/test_bf16_masters.py",
        "bf16 without fp32 master weights. AdamW is bit-equal to torch's. The other rules are compared with the same "
        "run that has fp32 master weights.",
    ),
    _runs(
        _OPTIONS,
        "gradient_clipping",
        f"{_INTERNALS}/engine.py",
        _MATRIX,
        "The statistics are taken before it. DeepSpeed 0.19.8 clips at a norm of 1.0 when the JSON does not set it.",
        lambda facts: facts.clips,
    ),
    _runs(
        _OPTIONS,
        "overlap_comm",
        _ZERO12,
        _LAYOUTS,
        "At ZeRO 1 with accumulation, DeepSpeed 0.19.8 loses the gradient of a parameter that only some micro-batches "
        "use. This happens with every optimizer.",
        lambda facts: facts.overlap_comm,
    ),
    _runs(_OPTIONS, "round_robin_gradients", _ZERO12, _LAYOUTS, is_on=lambda facts: facts.round_robin),
    _runs(_OPTIONS, "reduce_scatter: false", _ZERO12, _LAYOUTS, is_on=lambda facts: not facts.reduce_scatter),
    _runs(
        _OPTIONS,
        "prescale_gradients, gradient_predivide_factor",
        _STATISTICS,
        _LAYOUTS,
        is_on=lambda facts: facts.prescales or facts.predivide != 1.0,
    ),
    _runs(_OPTIONS, "contiguous_gradients, bucket sizes, communication_data_type", _ZERO12, _LAYOUTS),
    _runs(_OPTIONS, "sub_group_size, stage3_param_persistence_threshold, zero.Init", _ZERO3, _LAYOUTS),
    _runs(
        _OPTIONS,
        "set_z3_leaf_modules, leaf_module (ZeRO 3)",
        _ZERO3,
        "tests/integrations/test_leaf_modules.py",
        "Ranks may use different experts in a micro-batch.",
    ),
    _runs(
        _LOOP,
        "gradient accumulation, a short last window, set_train_batch_size, no_sync",
        _HOOKS,
        _LOOPS,
        is_on=lambda facts: facts.accumulates,
    ),
    _runs(
        _LOOP,
        "gradients thrown away by zero_grad(), a backward pass that an exception ended, load_checkpoint",
        _WINDOW,
        _WINDOWS,
        "In the middle of an update. `engine.zero_grad()` throws away the gradients at ZeRO 0 and 1. At ZeRO 2 and 3, "
        "and with BF16_Optimizer, DeepSpeed keeps them: LENA counts them, and says so once.",
    ),
    _runs(_LOOP, "two engines where one's loss goes through the other's model", _WINDOW, f"{_WINDOWS}::{_TWO_ENGINES}"),
    _runs(_LOOP, "micro-batches without backward, evaluation between micro-batches", _HOOKS, _LOOPS),
    _runs(
        _LOOP,
        "learning-rate schedulers",
        "controller.py",
        _LOOPS,
        "A scheduler that warms up gets a warning: its warm-up and LENA's multiply.",
    ),
    _runs(_LOOP, "updates that DeepSpeed skips", "schedule/schedule.py", "tests/integrations/test_skipped.py"),
    _runs(
        _LOOP,
        "saving and loading at the same world size",
        "schedule/checkpoint.py",
        "tests/integrations/test_checkpoint.py",
        "The resumed run is bit-equal to the unbroken run.",
    ),
    _runs(
        _MODELS,
        "base rules adamw, sgd, lamb and lars",
        "update/trust_ratio.py",
        "tests/parity/test_trust.py",
        "In every cell of the matrix. Trust ratios are those of whole tensors, from the clipped gradient.",
    ),
    _runs(_MODELS, "tied weights, frozen parameters", "layers.py", _LAYOUTS),
    _runs(_MODELS, "parameters unused in some or all micro-batches", _ZERO3, _LAYOUTS),
    _runs(_MODELS, "several parameter groups", "parameters.py", _MATRIX),
    _runs(
        _MODELS,
        "torch.compile, engine.compile()",
        "layers.py",
        _LAYOUTS,
        "At ZeRO 3 compile the engine. DeepSpeed does not run a model there that torch.compile has wrapped.",
    ),
    _runs(
        _MODELS,
        "activation checkpointing",
        "grad_stats/backward.py",
        _LAYOUTS,
        "use_reentrant=True is refused in two cases, see below.",
    ),
    _runs(
        _MODELS,
        "TiledFusedLogitsLoss, TiledMLP, SequenceTiledCompute; losses of your own that call backward in their forward",
        _HOOKS,
        _TILED,
        "The gradients of the tiles are added before they are measured.",
    ),
    _runs(_WAYS, "deepspeed.initialize with a JSON entry", _ATTACH, _SELECTION),
    _runs(_WAYS, "deepspeed.initialize with a client optimizer, or a callable that makes one", _ATTACH, _SELECTION),
    _runs(_WAYS, "deepspeed --module ds_lena.run with an unmodified script", "run.py", _SELECTION),
    _runs(
        _WAYS, "HF Trainer, accelerate with a DeepSpeed plugin", "integrations/_transformers_internals.py", _SELECTION
    ),
    _runs(_PYTORCH, "one process, DistributedDataParallel", "layouts/plain.py", _PLAIN),
    _runs(
        _PYTORCH,
        "clipping or changing p.grad between the last backward and step()",
        "controller.py",
        _PLAIN,
        "The statistics are those of the gradient before it.",
    ),
    _runs(
        _PYTORCH,
        "float64, float32 and bfloat16 parameters",
        "parameters.py",
        "tests/unit/test_rules.py",
        "bfloat16 has no master weights here.",
    ),
)

REFUSED: tuple[Feature, ...] = (
    Feature("fp16", lambda facts: facts.fp16, instead='use "bf16": {"enabled": true}'),
    Feature('"offload_optimizer"', lambda facts: facts.offload_optimizer, instead=_NO_OFFLOAD),
    Feature('"offload_param"', lambda facts: facts.offload_param, instead=_NO_OFFLOAD),
    Feature(
        '"zenflow"',
        lambda facts: facts.zenflow,
        instead="remove the entry",
        test=f"{_UNSUPPORTED}::test_zenflow_is_refused_too_though_it_cannot_start_here",
    ),
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
    _refused(
        "several backward passes for one micro-batch (under DeepSpeed)",
        "engine.backward(loss_1 + loss_2)",
        f"{_WINDOWS}::test_several_backward_passes_for_one_micro_batch_are_refused",
    ),
    _refused(
        "a loss that calls backward in its forward, at ZeRO 1 in bf16 with fp32 accumulation (DeepSpeed loses its "
        "gradient)",
        'use ZeRO 2 or 3, or "immediate_grad_update": true in the entry "bf16"',
        f"{_TILED}::test_a_gradient_that_deepspeed_loses_is_refused",
    ),
    _refused(
        "going on after an exception in a backward pass, at ZeRO 2 and 3, and with overlap_comm",
        "make a new engine and load a checkpoint",
        f"{_WINDOWS}::test_where_deepspeed_cannot_go_on_the_error_says_so",
    ),
    _refused(
        "a parameter that another DeepSpeed engine with LENA trains",
        "call destroy() on the first engine, or give each engine its own parameters",
        f"{_MISUSE}::test_two_engines_cannot_share_a_parameter",
    ),
    _refused(
        "a client optimizer of an engine that was destroyed",
        "make a new LENA",
        f"{_MISUSE}::test_an_optimizer_of_a_destroyed_engine_says_that_it_sees_nothing",
    ),
    _refused(
        "lamb or lars with gradient_clipping at ZeRO 0 in fp32, where LENA does not hold all trained parameters",
        "freeze the others, use ZeRO 1-3, or switch clipping off",
        f"{_UNSUPPORTED}::test_a_clipping_norm_that_trust_ratios_cannot_know_is_refused",
    ),
    _refused(
        "a weight that is shared by segments under activation checkpointing with use_reentrant=True",
        "use_reentrant=False, or exclude the weight",
        f"{_CHECKPOINTING}::test_a_weight_shared_by_reentrant_segments_is_refused_by_name",
    ),
    _refused(
        "a last layer inside activation checkpointing with use_reentrant=True",
        "use_reentrant=False, or keep the last layer outside",
        f"{_CHECKPOINTING}::test_a_model_inside_of_reentrant_segments_as_a_whole_is_refused",
    ),
    _refused(
        "FSDP, DTensor",
        "use DeepSpeed ZeRO 1-3, or DistributedDataParallel",
        f"{_PARAMETERS}::test_parameters_that_torch_shards_are_refused",
    ),
    _refused(
        "float16 or complex parameters",
        "use bfloat16, float32 or float64",
        f"{_PARAMETERS}::test_a_type_of_number_in_which_lena_would_not_be_exact_is_refused",
    ),
    _refused(
        "torch.amp.GradScaler",
        "use bfloat16, which needs no loss scaling",
        f"{_PARAMETERS}::test_a_gradient_scaler_is_refused",
    ),
    _refused(
        "one process with parameters on several devices",
        "use DeepSpeed ZeRO to spread the model",
        f"{_PARAMETERS}::test_a_model_on_two_devices_is_refused",
    ),
    _refused(
        "sparse gradients", "build the embedding with sparse=False", f"{_PARAMETERS}::test_a_sparse_gradient_is_refused"
    ),
    _refused(
        "plain PyTorch on several ranks without DDP's averaging: averaged by hand, LocalSGD, ZeroRedundancyOptimizer",
        "DistributedDataParallel, or DeepSpeed ZeRO 1; a model of some ranks only: their process_group",
        "tests/integrations/test_ranks_apart.py::test_it_is_one_error_on_every_rank",
    ),
    _refused(
        "parameters that are replaced or unfrozen after construction in plain PyTorch",
        "construct LENA after that, and load the old state_dict() into it",
        f"{_PARAMETERS}::test_a_parameter_that_is_unfrozen_after_construction_is_refused",
    ),
    _refused(
        "add_param_group() after construction",
        "give all parameters to a new LENA, and load the old state_dict() into it",
        f"{_PARAMETERS}::test_a_group_that_is_added_later_is_refused",
    ),
)

FEATURES = SUPPORTED + REFUSED


def in_use(facts: EngineFacts) -> list[str]:
    """The supported features that an engine uses: its ZeRO stage and precision first."""
    return [feature.what for feature in SUPPORTED if feature.is_on(facts)]


def refuse_unsupported(facts: EngineFacts) -> None:
    """Raise `UnsupportedError` for the first refused feature that is on, or for a stage that is not in the table."""
    for feature in REFUSED:
        if feature.is_on(facts):
            what = feature.what.format(predivide=facts.predivide)
            raise UnsupportedError(f"LENA does not support {what} yet. Nearest supported choice: {feature.instead}.")
    if not any(feature.is_on(facts) for feature in STAGES):
        raise UnsupportedError(
            f"LENA does not support ZeRO {facts.stage} with these types of weights and gradients. Nearest supported "
            f"choice: one of {', '.join(feature.what for feature in STAGES)}."
        )
