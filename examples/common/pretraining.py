"""What the two scripts do: prepare data, train with the HF Trainer, and leave results and a picture."""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import get_model_param_count

import ds_lena
from ds_lena.errors import LenaError
from ds_lena.integrations.callback import LenaCallback

from . import same_run
from .arguments import RunArguments, parse
from .blocks import Rows
from .checkpoints import choose_checkpoint
from .checks import tell_mismatches
from .corpus import Corpus, DataArguments, prepare
from .errors import InputError, give_up
from .history import History, finite, optimizer_name, write_whole
from .plot import draw
from .stopping import Finished, Stopping, reached_at
from .summary import layer_table, loss_lines, losses

Batch = dict[str, torch.Tensor]
Collate = Callable[[Rows], Batch]

# Defaults that differ from TrainingArguments'; every one can be given on the command line.
DEFAULTS = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",  # no warm-up steps: LENA warms every layer up by itself
    "weight_decay": 0.1,
    "eval_strategy": "steps",
    "eval_steps": 100.0,
    "logging_steps": 10.0,
    "log_level": "warning",
    "use_cpu": not torch.accelerator.is_available(),  # without it, CPU ranks do not see each other
}


# Seconds. On CPU, threads of gloo hold the last tensors for a moment; if Python ends before they let go, it aborts.
LETTING_GO = 0.2


@dataclass(frozen=True)
class Task:
    """What one kind of language model adds to the rest.

    Args:
        name: of the model, for people.
        arguments: a dataclass with the options of the model.
        build: makes the model from them, a tokenizer and the length of a block.
        collate: makes, from a tokenizer and a seed, what makes a batch from blocks.
        predicted: the tokens of a batch that the model is asked for, (tokens,).
        no_decay: patterns of the names of parameters that are not decayed.
        needs_mask: whether the tokenizer must have a mask token.
        defaults: of the command line.
    """

    name: str
    arguments: type
    build: Callable[[Any, PreTrainedTokenizerFast, int], PreTrainedModel]
    collate: Callable[[PreTrainedTokenizerFast, int], Collate]
    predicted: Callable[[Batch], torch.Tensor]
    no_decay: tuple[str, ...]
    needs_mask: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


def pretrain(task: Task, description: str | None) -> None:
    """Do all that the command line asks for."""
    parser, arguments = parse(task.arguments, DEFAULTS | task.defaults, task.no_decay, description)
    try:
        _run(task, *arguments)
    except (InputError, LenaError) as error:
        give_up(parser.prog, error)
    except ValueError as error:
        if told := tell_mismatches(str(error)):  # HF's, where it depends on the number of updates
            give_up(parser.prog, told)
        raise


def _run(
    task: Task, model_args: Any, data_args: DataArguments, run_args: RunArguments, args: TrainingArguments
) -> None:
    output_dir = Path(str(args.output_dir))
    options = same_run.options_of(task.name, model_args, data_args, args)
    checkpoint = choose_checkpoint(args, options)
    with args.main_process_first(local=args.save_on_each_node, desc="data"):
        corpus = prepare(data_args, output_dir, blocks_per_update(args), args.seed, task.needs_mask)
    if args.process_index == 0:
        blocks = "streamed" if data_args.streaming else f"{len(corpus.train):,}"
        sizes = f"{blocks} training and {len(corpus.held_out):,} held-out blocks"
        print(f"{data_args.dataset}: {sizes} of {data_args.sequence_length} tokens", flush=True)
        print(f"{args.world_size} rank(s), {optimizer_name(args)}", flush=True)

    args.eval_on_start = checkpoint is None
    set_seed(args.seed)
    collate = task.collate(corpus.tokenizer, args.seed)
    trainer = Trainer(
        model=task.build(model_args, corpus.tokenizer, data_args.sequence_length),
        args=args,
        data_collator=collate,
        train_dataset=corpus.train,
        eval_dataset=corpus.held_out,
        processing_class=corpus.tokenizer,
    )
    LenaCallback.add_to(trainer)  # its numbers in the logs, for whatever --report_to names; all works without it
    history = History(trainer, output_dir / "history.jsonl")
    trainer.add_callback(history)  # it prints a line per log, so the Trainer's own printing goes
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(same_run.Writer(options))
    trainer.add_callback(Stopping(run_args.target_loss))  # last: the others begin before it may end

    with suppress(Finished):
        trainer.train(resume_from_checkpoint=checkpoint)
    if args.eval_strategy == "no":
        trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        unigram = unigram_loss(task, corpus, collate, args.eval_batch_size)
        results = _results(trainer, run_args, data_args.sequence_length, unigram, history.seconds)
        _conclude(task, results, history.records, output_dir)
    trainer.accelerator.end_training()
    time.sleep(LETTING_GO)


def blocks_per_update(args: TrainingArguments) -> int:
    """Blocks of tokens that one update averages over, on all ranks."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def unigram_loss(task: Task, corpus: Corpus, collate: Collate, batch_size: int) -> float:
    """What a unigram model loses on the held-out tokens that the model is asked for, in nats per token.

    In batches as the Trainer makes them for an evaluation, since masks depend on the batch.
    """
    starts = range(0, len(corpus.held_out), batch_size)
    batches = (corpus.held_out[start : start + batch_size]["input_ids"] for start in starts)
    asked = [task.predicted(collate([{"input_ids": ids} for ids in batch])).numpy() for batch in batches]
    return float(corpus.nats[np.concatenate(asked)].mean())


def _results(
    trainer: Trainer, run_args: RunArguments, sequence_length: int, unigram: float, seconds: list[float]
) -> dict[str, Any]:
    args, logs = trainer.args, trainer.state.log_history
    tokens_per_update = blocks_per_update(args) * sequence_length
    results = {
        "optimizer": optimizer_name(args),
        "preset": run_args.optimizer_preset,
        "learning_rate": args.learning_rate,
        "parameters": get_model_param_count(trainer.model),
        "ranks": args.world_size,
        "updates": trainer.state.global_step,
        "tokens_per_update": tokens_per_update,
        "tokens_per_second": tokens_per_update / median(seconds) if seconds else None,
        "losses": losses(logs, unigram),
    }
    if (target := run_args.target_loss) is not None:
        results["target"] = {"loss": target, "reached_at": reached_at(logs, target)}
    if results["optimizer"] == "LENA":
        results["lena"] = ds_lena.report(trainer)
    return results


def _conclude(task: Task, results: dict[str, Any], history: list[dict[str, Any]], output_dir: Path) -> None:
    """Print the losses and the layers, and write ``results.json`` and ``training.png``."""
    if "lena" in results:
        print(f"\n{layer_table(results['lena'])}")
    print(f"\n{loss_lines(results['losses'])}")
    if "target" in results:
        update = results["target"]["reached_at"]
        reached = "not reached" if update is None else f"reached at update {update}"
        print(f"target of {results['target']['loss']:g} {reached}")
    write_whole(output_dir / "results.json", json.dumps(finite(results), indent=2) + "\n")
    title = (
        f"{task.name} of {results['parameters'] / 1e6:.1f} M parameters with "
        f"{results['preset'] or results['optimizer']}, {results['tokens_per_update']:,} tokens per update"
    )
    draw(history, results["losses"]["unigram"], title, output_dir / "training.png")
    print(f"\nin {output_dir}: training.png, history.jsonl, results.json, the model")
