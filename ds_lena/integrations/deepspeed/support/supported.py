"""What LENA supports, and what shows it."""

from __future__ import annotations

from .._internals.facts import EngineFacts
from .feature import PRECISIONS, Feature, IsOn, Keys, not_a_fact

_LAYOUTS = "tests/parity/test_layouts.py"
_IN_FP16 = "tests/parity/test_fp16.py"
_OFFLOAD = "tests/parity/test_offload.py"
_NVME = ("nvme_path", "buffer_count", "pipeline_read", "pipeline_write", "fast_init")
_LOOPS = "tests/parity/test_loops.py"
_MATRIX = "tests/parity/test_matrix.py"
_PLAIN = "tests/parity/test_plain.py"
_SELECTION = "tests/integrations/test_selection.py"
_EXPERTS = "tests/parity/test_experts.py"
_PARAMETERS = "tests/unit/test_optimizer_parameters.py"

_ADAPTERS = "tests/integrations/test_adapters.py"
_CHANGED_WEIGHTS = "tests/integrations/test_changed_weights.py"
_WINDOWS = "tests/integrations/test_window.py"
_TILED = "tests/integrations/test_tiled_loss.py"
_TWO_ENGINES = "test_the_generators_gradients_in_the_critic_are_dropped"

_AXES = "integrations/deepspeed/axes"
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
_PARALLEL = "Parallel layouts"
_WAYS = "Ways to start LENA"
_PYTORCH = "Plain PyTorch"


_STALE = (
    "DeepSpeed 0.19.8 keeps gradients on the CPU: it moves a parameter that an update does not use by an old one, and "
    "loses that of a parameter that the last micro-batch does not use. Under LENA both are mended."
)


def _zero(*names: str) -> Keys:
    return tuple(f"zero_optimization.{name}" for name in names)


_PRECISION = (*_zero("stage"), "zero_optimization", "bf16", "bf16.enabled", "data_types", "data_types.grad_accum_dtype")
_FP16 = (
    *("fp16", "fp16.enabled", "fp16.auto_cast", "fp16.loss_scale", "fp16.min_loss_scale"),
    *("fp16.initial_scale_power", "fp16.loss_scale_window", "fp16.hysteresis", "fp16.consecutive_hysteresis"),
)


def _stage(stage: int, bf16: bool, accumulates_in_fp32: bool, file: str) -> Feature:
    def is_on(facts: EngineFacts) -> bool:
        in_fp32 = facts.bf16 and facts.fp32_accumulation
        return not facts.fp16 and (facts.stage, facts.bf16, in_fp32) == (stage, bf16, accumulates_in_fp32)

    what = f"ZeRO {stage}, {PRECISIONS[bf16 + accumulates_in_fp32]}"
    return Feature(what, is_on, by=f"{_INTERNALS}/{file}.py", test=_MATRIX, keys=_PRECISION)


def _fp16(stage: int, file: str) -> Feature:
    return Feature(
        f"ZeRO {stage}, fp16",
        lambda facts: facts.fp16 and facts.stage == stage,
        by=f"{_INTERNALS}/{file}.py",
        test=_IN_FP16,
        keys=_FP16,
    )


def _runs(
    area: str, what: str, by: str, test: str, note: str = "", is_on: IsOn = not_a_fact, keys: Keys = ()
) -> Feature:
    return Feature(what, is_on, by=by, test=test, keys=keys, area=area, note=note)


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
    _fp16(1, "zero12"),
    _fp16(2, "zero12"),
    _fp16(3, "zero3"),
)

SUPPORTED: tuple[Feature, ...] = (
    *STAGES,
    _runs(
        _OPTIONS,
        "static and dynamic loss scale (fp16, ZeRO 1-3)",
        f"{_INTERNALS}/loss_scale.py",
        _IN_FP16,
        "DeepSpeed 0.19.8 raises the loss scale before it divides the gradients by it, which halves them in that "
        "update. Under LENA it raises it after.",
        lambda facts: facts.fp16,
    ),
    _runs(
        _OPTIONS,
        "offload_optimizer to the CPU (ZeRO 1, 2)",
        f"{_INTERNALS}/zero12_offload.py",
        _OFFLOAD,
        _STALE,
        lambda facts: facts.offload_optimizer == "cpu" and facts.stage in (1, 2),
        (
            *_zero("offload_optimizer", "offload_optimizer.device", "offload_optimizer.pin_memory"),
            *_zero("cpu_offload", "cpu_offload_use_pin_memory"),
            "zero_force_ds_cpu_optimizer",
        ),
    ),
    _runs(
        _OPTIONS,
        "offload_optimizer to the CPU (ZeRO 3)",
        f"{_INTERNALS}/zero3_offload.py",
        _OFFLOAD,
        _STALE,
        lambda facts: facts.offload_optimizer == "cpu" and facts.stage == 3,
    ),
    _runs(
        _OPTIONS,
        "offload_optimizer to NVMe (ZeRO 3), with base adamw or sgd",
        f"{_INTERNALS}/zero3_nvme.py",
        "tests/parity/test_nvme.py",
        _STALE,
        lambda facts: facts.offload_optimizer == "nvme",
        (*_zero(*(f"offload_optimizer.{name}" for name in _NVME)), "aio*"),
    ),
    _runs(
        _OPTIONS,
        "DeepSpeed's AdamW kernel for the CPU, with offload_optimizer and base adamw",
        f"{_INTERNALS}/cpu_adam.py",
        "tests/integrations/test_cpu_adam.py",
        "Its bias correction is done in float64. torch's kernel is used where DeepSpeed's cannot be compiled.",
    ),
    _runs(
        _OPTIONS,
        "offload_param to the CPU (ZeRO 3)",
        _ZERO3,
        _OFFLOAD,
        is_on=lambda facts: facts.offload_param == "cpu",
        keys=_zero("offload_param", "offload_param.device", "offload_param.pin_memory", "cpu_offload_param"),
    ),
    _runs(
        _OPTIONS,
        "zero_hpz_partition_size (ZeRO 3)",
        _ZERO3,
        _LAYOUTS,
        is_on=lambda facts: facts.hpz,
        keys=_zero("zero_hpz_partition_size"),
    ),
    _runs(
        _OPTIONS,
        "bf16_master_weights_and_grads (ZeRO 1-3)",
        _ZERO12,
        "tests/integrations/test_bf16_masters.py",
        "bf16 without fp32 master weights. AdamW is bit-equal to torch's. The other rules are compared with the same "
        "run that has fp32 master weights.",
        keys=("bf16.bf16_master_weights_and_grads", "bf16.bf16_optimizer_states"),
    ),
    _runs(
        _OPTIONS,
        "immediate_grad_update, check_grad_overflow, the old name bfloat16",
        f"{_INTERNALS}/bf16.py",
        _LAYOUTS,
        keys=("bf16.immediate_grad_update", "bf16.check_grad_overflow", "bfloat16*"),
    ),
    _runs(
        _OPTIONS,
        "torch_autocast with bf16",
        _ZERO12,
        _LAYOUTS,
        "The reference computes in float64, so this is compared to the rounding of bf16.",
        lambda facts: facts.autocasts,
        ("torch_autocast*",),
    ),
    _runs(
        _OPTIONS,
        "gradient_clipping",
        f"{_INTERNALS}/engine.py",
        _MATRIX,
        "The statistics are taken before it. DeepSpeed 0.19.8 clips at a norm of 1.0 when the JSON does not set it.",
        lambda facts: facts.clips,
        ("gradient_clipping", *_zero("compute_grad_norm")),
    ),
    _runs(
        _OPTIONS,
        "overlap_comm",
        _ZERO12,
        _LAYOUTS,
        "At ZeRO 1 with accumulation, DeepSpeed 0.19.8 loses the gradient of a parameter that only some micro-batches "
        "use. This happens with every optimizer.",
        lambda facts: facts.overlap_comm,
        _zero("overlap_comm"),
    ),
    _runs(
        _OPTIONS,
        "round_robin_gradients",
        _ZERO12,
        _LAYOUTS,
        is_on=lambda facts: facts.round_robin,
        keys=_zero("round_robin_gradients"),
    ),
    _runs(
        _OPTIONS,
        "reduce_scatter: false",
        _ZERO12,
        _LAYOUTS,
        is_on=lambda facts: not facts.reduce_scatter,
        keys=_zero("reduce_scatter"),
    ),
    _runs(
        _OPTIONS,
        "prescale_gradients, gradient_predivide_factor",
        _STATISTICS,
        _LAYOUTS,
        is_on=lambda facts: facts.prescales or facts.predivide != 1.0,
        keys=("prescale_gradients", "gradient_predivide_factor"),
    ),
    _runs(
        _OPTIONS,
        "communication_data_type",
        _STATISTICS,
        _LAYOUTS,
        "Where it rounds the averaged gradient, LENA measures the rounded one, by which DeepSpeed moves the weights.",
        keys=("communication_data_type",),
    ),
    _runs(
        _OPTIONS,
        "contiguous_gradients, parameter_alignment, bucket sizes (ZeRO 1-3)",
        _ZERO12,
        _LAYOUTS,
        keys=_zero(
            "contiguous_gradients",
            "parameter_alignment",
            "reduce_bucket_size",
            "allgather_bucket_size",
            "allgather_partitions",
            "use_multi_rank_bucket_allreduce",
        ),
    ),
    _runs(
        _OPTIONS,
        "sub_group_size, thresholds of sizes, how weights are fetched, zero.Init (ZeRO 3)",
        _ZERO3,
        _LAYOUTS,
        keys=_zero(
            "sub_group_size",
            "stage3_param_persistence_threshold",
            "stage3_model_persistence_threshold",
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
            "stage3_prefetch_bucket_size",
            "stage3_use_all_reduce_for_fetch_params",
            "stage3_allgather_sequential",
            "memory_efficient_linear",
            "override_module_apply",
        ),
    ),
    _runs(
        _OPTIONS,
        "hybrid_engine",
        _ATTACH,
        _LAYOUTS,
        "Training with it. The tests generate no text.",
        keys=("hybrid_engine*",),
    ),
    _runs(
        _OPTIONS,
        "set_z3_leaf_modules, leaf_module (ZeRO 3)",
        _ZERO3,
        "tests/integrations/test_leaf_modules.py",
        "Ranks may use different experts in a micro-batch.",
        keys=_zero("leaf_module*"),
    ),
    _runs(
        _OPTIONS,
        "stage3_module_granularity_threshold",
        _ZERO3,
        _LAYOUTS,
        "If the whole model becomes a leaf module by it, DeepSpeed 0.19.8 cannot train, with any optimizer.",
        keys=_zero("stage3_module_granularity_threshold"),
    ),
    _runs(
        _LOOP,
        "gradient accumulation, a short last window, set_train_batch_size, no_sync",
        _HOOKS,
        _LOOPS,
        is_on=lambda facts: facts.accumulates,
        keys=(
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "managed_gradient_accumulation",
        ),
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
        "a gradient that is changed between the last backward and step(): safe_set_full_grad(), or p.grad at ZeRO 0",
        _WINDOW,
        "tests/integrations/test_changed_gradient.py",
        "The statistics are those of the gradient before it. Where DeepSpeed reduces only at the end of "
        "coalesce_grad_reduction() or in step() (managed_gradient_accumulation: false), they are those after it.",
    ),
    _runs(
        _LOOP,
        "weights that are changed between updates, by zero.GatheredParameters (ZeRO 3)",
        _ZERO3,
        _CHANGED_WEIGHTS,
        "Change the master weight, too, by safe_set_full_fp32_param(). Otherwise DeepSpeed 0.19.8 undoes the change in "
        "the next update, with any optimizer.",
    ),
    _runs(
        _LOOP,
        "engine.offload_states(), reload_states() between updates (ZeRO 1, 2)",
        _ZERO12,
        _LOOPS,
        "At ZeRO 3 DeepSpeed allows it to its own FusedAdam only, and says so.",
    ),
    _runs(
        _LOOP,
        "learning-rate schedulers",
        "controller.py",
        _LOOPS,
        "A scheduler that warms up gets a warning: its warm-up and LENA's multiply.",
        keys=("scheduler*",),
    ),
    _runs(_LOOP, "updates that DeepSpeed skips", "schedule/schedule.py", "tests/integrations/test_skipped.py"),
    _runs(
        _LOOP,
        "saving and loading at the same world size",
        "schedule/checkpoint.py",
        "tests/integrations/test_checkpoint.py",
        "The resumed run is bit-equal to the unbroken run.",
        keys=("checkpoint",),
    ),
    _runs(
        _LOOP,
        "loading at another world size, ZeRO stage, sub_group_size or round_robin_gradients",
        "integrations/deepspeed/reshard.py",
        "tests/integrations/test_reshard.py",
        "`engine.load_checkpoint` of the ordinary checkpoint; master weights and the base rule's state are bit-equal. "
        "Tensor parallelism: with as many parts. Pipelines and experts: in the layout that was saved, else refused. "
        "See [checkpoints](checkpoints.md).",
    ),
    _runs(
        _MODELS,
        "base rules adamw, sgd, lamb and lars",
        "update/trust_ratio.py",
        "tests/parity/test_trust.py",
        "In every cell of the matrix. Trust ratios are those of whole tensors, from the clipped gradient.",
    ),
    _runs(
        _MODELS,
        "deepspeed.linear.OptimizedLinear with a LoRAConfig (ZeRO 0-2)",
        _HOOKS,
        _ADAPTERS,
        "Tried without quantization and without base_weight_sharding.",
    ),
    _runs(_MODELS, "PEFT's LoRA (ZeRO 2, 3)", _HOOKS, _ADAPTERS, "Tried with a module that is built as PEFT's."),
    _runs(
        _MODELS,
        "layers that are unfrozen in the middle of a run, by a new engine",
        _ATTACH,
        _CHANGED_WEIGHTS,
        "Call destroy() on the old one, and give the model to a new one. Its averages, its warm-up and the base rule's "
        "state start anew: DeepSpeed 0.19.8 does not load a checkpoint with other trained parameters.",
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
        "activation checkpointing, by torch or by deepspeed.checkpointing",
        "grad_stats/backward.py",
        _LAYOUTS,
        "use_reentrant=True is refused in two cases, see below. DeepSpeed's own checkpointing is of that kind.",
        keys=("activation_checkpointing*",),
    ),
    _runs(
        _MODELS,
        "TiledFusedLogitsLoss, TiledMLP, SequenceTiledCompute; losses of your own that call backward in their forward",
        _HOOKS,
        _TILED,
        "The gradients of the tiles are added before they are measured.",
    ),
    _runs(_WAYS, "deepspeed.initialize with a JSON entry", _ATTACH, _SELECTION, keys=("optimizer", "optimizer.type")),
    _runs(
        _WAYS,
        "ds_lena.watch: the noise scale of any optimizer, in each layout of this page",
        "integrations/deepspeed/watch.py",
        "tests/parity/test_watch.py",
        "It mends nothing that this page says LENA mends: see noise_scale.md.",
        keys=("noise_scale",),
    ),
    _runs(
        _WAYS,
        "ds_lena.grow: a batch that follows the noise scale, in each layout of this page",
        "integrations/deepspeed/growth.py",
        "tests/integrations/test_growth.py",
        "No scheduler that counts updates: see growth.md.",
        keys=("batch_growth",),
    ),
    _runs(_WAYS, "deepspeed.initialize with a client optimizer, or a callable that makes one", _ATTACH, _SELECTION),
    _runs(
        _PARALLEL,
        "tensor parallelism by an mpu, as Megatron-core's parallel_state (ZeRO 0-3)",
        f"{_AXES}/tensor.py",
        "tests/parity/test_tensor_parallel.py",
        "Norms are those of whole tensors. `sequence_parallel` and `qk_layernorm` need `sum_partial_gradients(model)`.",
        lambda facts: facts.tensor_ranks > 1,
    ),
    _runs(
        _PARALLEL,
        "pipeline parallelism by a PipelineModule, tied layers too (ZeRO 0, 1)",
        f"{_AXES}/pipeline.py",
        "tests/parity/test_pipeline.py",
        "At ZeRO 0 in fp32 DeepSpeed 0.19.8 clips by the norm of the first stage alone, with any optimizer.",
        lambda facts: facts.stages > 1,
        ("pipeline*",),
    ),
    _runs(
        _PARALLEL,
        "sequence parallelism by DeepSpeed's parallel_state_sp as mpu: Ulysses, and ALST of HF Trainer (ZeRO 0-3)",
        f"{_AXES}/sequence.py",
        "tests/parity/test_sequence_parallel.py",
        "The ranks that share a micro-batch add their parts of each gradient up: see layouts.md for what it costs.",
        lambda facts: facts.sequence_ranks > 1,
        ("seq_parallel_communication_data_type",),
    ),
    _runs(
        _PARALLEL,
        "tensor and pipeline parallelism together: a PipelineModule of split layers (ZeRO 0, 1)",
        f"{_AXES}/__init__.py",
        "tests/parity/test_pipeline.py",
        "With a PipeModelDataParallelTopology. Tried with 2 stages x 2 tensor-parallel ranks, and 2 replicas of that.",
        lambda facts: facts.stages > 1 and facts.tensor_ranks > 1,
    ),
    _runs(
        _PARALLEL,
        "AutoTP: the entry tensor_parallel (ZeRO 0-3)",
        f"{_AXES}/tensor.py",
        "tests/parity/test_tensor_parallel.py",
        keys=("tensor_parallel*",),
    ),
    _runs(
        _PARALLEL,
        "expert parallelism: layers of deepspeed.moe (ZeRO 0-2)",
        f"{_AXES}/expert.py",
        _EXPERTS,
        "Each expert is a layer of its own. At ZeRO 0 DeepSpeed 0.19.8 clips by a wrong norm, with any optimizer.",
        lambda facts: facts.experts,
        ("use_data_before_expert_parallelism",),
    ),
    _runs(
        _MODELS,
        "Mixtral and Qwen-MoE of transformers (ZeRO 0-3; at ZeRO 3 with set_z3_leaf_modules)",
        _HOOKS,
        _EXPERTS,
        "All experts of a layer are one tensor there, and one layer of LENA.",
    ),
    _runs(_WAYS, "deepspeed --module ds_lena.run with an unmodified script", "run.py", _SELECTION),
    _runs(
        _WAYS, "HF Trainer, accelerate with a DeepSpeed plugin", "integrations/_transformers_internals.py", _SELECTION
    ),
    _runs(
        _PYTORCH,
        "one process, DistributedDataParallel with no_sync, static_graph or find_unused_parameters",
        "layouts/plain.py",
        _PLAIN,
        "Not with join(), nor with PowerSGD, which LENA cannot see: see guide.md.",
    ),
    _runs(
        _PYTORCH,
        "communication hooks of DDP that average, such as fp16_compress_hook",
        "grad_stats/agreement.py",
        "tests/integrations/test_ranks_apart.py",
        "A hook that adds up and does not divide is refused where the gradients' norms show it.",
    ),
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
