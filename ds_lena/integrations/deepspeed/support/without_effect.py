"""Keys of DeepSpeed's JSON that have no effect on LENA."""

from __future__ import annotations

from .feature import WithoutEffect

WITHOUT_EFFECT: tuple[WithoutEffect, ...] = (
    WithoutEffect(
        ("optimizer.legacy_fusion", "zero_optimization.save_muon_momentum_buffer_in_memory"),
        "For optimizers of DeepSpeed's own.",
    ),
    WithoutEffect(
        ("zero_allow_untested_optimizer",),
        "LENA is on the list of optimizers that DeepSpeed allows with ZeRO.",
    ),
    WithoutEffect(
        ("data_types.param_dtype",),
        "DeepSpeed refuses a type other than that of the weights.",
    ),
    WithoutEffect(
        ("data_types.buffer_dtype", "data_types.keep_in_fp32_modules"),
        "The types of a model's buffers, which are not trained.",
    ),
    WithoutEffect(
        ("disable_allgather", "vocabulary_size", "zero_optimization.legacy_stage1", "datastates_ckpt*"),
        "DeepSpeed 0.19.8 reads the key and does nothing with it in training, or refuses it.",
    ),
    WithoutEffect(
        ("zero_optimization.ignore_unused_parameters", "zero_optimization.enable_sanity_checks"),
        "DeepSpeed's own checks.",
    ),
    WithoutEffect(
        (
            "zero_optimization.load_from_fp32_weights",
            "zero_optimization.pipeline_loading_checkpoint",
            "zero_optimization.stage3_gather_16bit_weights_on_model_save",
            "zero_optimization.stage3_gather_fp16_weights_on_model_save",
            "checkpoint.tag_validation",
            "checkpoint.writer*",
            "checkpoint.use_node_local_storage",
            "checkpoint.parallel_write*",
            "checkpoint.checkpoint_serialization",
        ),
        "How a checkpoint's files are written and read. LENA's state is part of the optimizer's, and a copy.",
    ),
    WithoutEffect(
        (
            "data_efficiency",
            "data_efficiency.enabled",
            "data_efficiency.seed",
            "data_efficiency.data_sampling",
            "data_efficiency.data_sampling.enabled",
            "data_efficiency.data_sampling.num_epochs",
            "data_efficiency.data_sampling.num_workers",
            "data_efficiency.data_sampling.pin_memory",
            "data_efficiency.data_sampling.curriculum_learning*",
            "data_efficiency.data_routing*",
            "dataloader_drop_last",
        ),
        "Which samples and tokens a micro-batch has. LENA measures the gradients that they give.",
    ),
    WithoutEffect(
        (
            "steps_per_print",
            "dump_state",
            "log_level",
            "wall_clock_breakdown",
            "memory_breakdown",
            "timers*",
            "flops_profiler*",
            "comms_logger*",
            "zero_optimization.log_trace_cache_warnings",
        ),
        "What DeepSpeed prints and times.",
    ),
    WithoutEffect(
        ("tensorboard*", "wandb*", "csv_monitor*", "comet*"),
        "Where DeepSpeed writes figures. LENA writes its own beside them, see guide.md.",
    ),
    WithoutEffect(("disable_python_gc",), "When Python collects garbage."),
    WithoutEffect(
        ("autotuning*",),
        "The autotuner starts the script again and again, with another configuration each time.",
    ),
    WithoutEffect(
        (
            "amp",
            "compression_training",
            "curriculum_learning",
            "eigenvalue",
            "elasticity",
            "graph_harvesting",
            "nebula",
            "progressive_layer_drop",
            "quantize_training",
            "sparse_attention",
            "sparse_gradients",
            "zero_optimization.mics_*",
            "zero_optimization.zeropp_loco_param",
        ),
        "DeepSpeed 0.19.8 has removed it, and refuses the key.",
    ),
)
