"""Pretrain a GPT-2 from scratch with the HF Trainer, DeepSpeed and LENA.

    deepspeed --num_gpus 8 examples/pretrain_gpt.py --deepspeed examples/ds_lena_zero2.json \\
        --model_size base --dataset HUB_NAME_OR_PATH --sequence_length 1024 --bf16 \\
        --per_device_train_batch_size 8 --gradient_accumulation_steps 16 --max_steps 10000

All that LENA needs is ``import ds_lena`` and ``"type": "LENA"`` in the DeepSpeed config;
``--learning_rate`` is the one tuned for a single micro-batch. The output directory gets the model,
``training.png``, ``results.json``, ``history.jsonl`` and checkpoints: ``--resume_from_checkpoint
latest`` goes on from the newest.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from common.blocks import Corpus, DataArguments, collate, prepare
from common.checkpoints import find_checkpoint
from common.errors import InputError
from common.history import History, finite, optimizer_name, write_whole
from common.models import ModelArguments, build_gpt2
from common.plot import draw
from common.summary import layer_table, loss_lines, losses
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import get_model_param_count

import ds_lena

# Defaults that differ from TrainingArguments'; every one can be given on the command line.
DEFAULTS = {
    "output_dir": "outputs/gpt",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",  # no warm-up steps: LENA warms every layer up by itself
    "weight_decay": 0.1,
    "eval_strategy": "steps",
    "eval_steps": 100.0,
    "logging_steps": 10.0,
    "log_level": "warning",
    "use_cpu": not torch.accelerator.is_available(),  # without it, CPU ranks do not see each other
}


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments), description=__doc__)
    parser.set_defaults(**DEFAULTS)
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    output_dir = Path(training_args.output_dir)
    try:
        checkpoint = find_checkpoint(training_args.resume_from_checkpoint, output_dir)
        with training_args.main_process_first(local=training_args.save_on_each_node, desc="data"):
            corpus = prepare(data_args, output_dir, blocks_per_update(training_args))
    except InputError as error:
        sys.exit(f"{parser.prog}: error: {error}" if training_args.process_index == 0 else 1)

    if training_args.process_index == 0:
        sizes = f"{len(corpus.train):,} training and {len(corpus.held_out):,} held-out blocks"
        print(f"{data_args.dataset}: {sizes} of {data_args.sequence_length} tokens", flush=True)
    training_args.eval_on_start = checkpoint is None
    set_seed(training_args.seed)
    model = build_gpt2(model_args, corpus.tokenizer, data_args.sequence_length)
    trainer = Trainer(
        model=model,
        args=training_args,
        data_collator=collate,
        train_dataset=corpus.train,
        eval_dataset=corpus.held_out,
        processing_class=corpus.tokenizer,
    )
    history = History(trainer, output_dir / "history.jsonl")
    trainer.add_callback(history)  # it prints a line per log, so the Trainer's own printing goes
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)

    trainer.train(resume_from_checkpoint=checkpoint)
    if training_args.eval_strategy == "no":
        trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        conclude(trainer, history.records, corpus)
    trainer.accelerator.end_training()


def blocks_per_update(args: TrainingArguments) -> int:
    """Blocks of tokens that one update averages over, on all ranks."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def conclude(trainer: Trainer, history: list[dict[str, Any]], corpus: Corpus) -> None:
    """Print the losses and the layers, and write ``results.json`` and ``training.png``."""
    args, output_dir = trainer.args, Path(str(trainer.args.output_dir))
    results = {
        "optimizer": optimizer_name(args),
        "learning_rate": args.learning_rate,
        "parameters": get_model_param_count(trainer.model),
        "ranks": args.world_size,
        "updates": trainer.state.global_step,
        "tokens_per_update": blocks_per_update(args) * len(corpus.train[0]["input_ids"]),
        "losses": losses(trainer.state.log_history, corpus.unigram_loss),
    }
    if results["optimizer"] == "LENA":
        results["lena"] = ds_lena.report(trainer)
        print(f"\n{layer_table(results['lena'])}")
    print(f"\n{loss_lines(results['losses'])}")
    write_whole(output_dir / "results.json", json.dumps(finite(results), indent=2) + "\n")
    title = (
        f"GPT-2 of {results['parameters'] / 1e6:.1f} M parameters with {results['optimizer']}, "
        f"{results['tokens_per_update']:,} tokens per update"
    )
    draw(history, corpus.unigram_loss, title, output_dir / "training.png")
    print(f"\nin {output_dir}: training.png, history.jsonl, results.json, the model")


if __name__ == "__main__":
    main()
