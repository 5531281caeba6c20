"""What the two scripts do: prepare data, train with the HF Trainer, and leave results and a picture."""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

from ds_lena.errors import LenaError
from ds_lena.integrations.transformers import LenaCallback

from .arguments import RunArguments, parse
from .blocks import Rows, unigram_loss
from .corpus import DataArguments, prepare
from .errors import InputError, give_up
from .history import Finished, History, Stopping
from .results import conclude, optimizer_name
from .resuming import choose_checkpoint, keep_options, options_of

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
    "disable_tqdm": not sys.stderr.isatty(),
    "use_cpu": not torch.accelerator.is_available(),  # without it, CPU ranks do not see each other
}


@dataclass(frozen=True)
class Task:
    """What one kind of language model adds to the rest."""

    name: str  # of the model, for people
    output_dir: str  # where a run writes, if not told otherwise
    arguments: type  # a dataclass with the options of the model
    build: Callable[..., PreTrainedModel]  # from them, a tokenizer and the length of a block
    collate: Callable[[PreTrainedTokenizerFast, int], Collate]  # makes batches; labels: tokens to predict, or -100
    no_decay: tuple[str, ...]  # patterns of the names of parameters
    needs_mask: bool = False  # in a tokenizer that is trained


def pretrain(task: Task, description: str | None) -> None:
    """Do all that the command line asks for."""
    defaults = DEFAULTS | {"output_dir": task.output_dir}
    parser, arguments = parse(task.arguments, defaults, list(task.no_decay), description)
    try:
        _run(task, *arguments)
    except (InputError, LenaError) as error:
        give_up(parser.prog, error)


def _run(task: Task, model_args: Any, data: DataArguments, run: RunArguments, args: TrainingArguments) -> None:
    output_dir = Path(str(args.output_dir))
    options = options_of(task.name, model_args, data, args)
    checkpoint = choose_checkpoint(args, options)
    blocks_per_update = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    with args.main_process_first(local=args.save_on_each_node, desc="data"):
        corpus = prepare(data, output_dir, blocks_per_update, args.seed, task.needs_mask)
    if args.process_index == 0:
        keep_options(output_dir, options)
        blocks = "streamed" if data.streaming else f"{len(corpus.train):,}"
        print(f"{data.dataset}: {blocks} training and {len(corpus.held_out):,} held-out blocks", flush=True)
        print(f"{args.world_size} rank(s), {optimizer_name(args)}", flush=True)

    args.eval_on_start = checkpoint is None
    set_seed(args.seed)
    collate = task.collate(corpus.tokenizer, args.seed)
    trainer = Trainer(
        model=task.build(model_args, corpus.tokenizer, data.sequence_length),
        args=args,
        data_collator=collate,
        train_dataset=corpus.train,
        eval_dataset=corpus.held_out,
        processing_class=corpus.tokenizer,
    )
    LenaCallback.add_to(trainer)  # its numbers in the logs, for whatever --report_to names; all works without it
    history = History(trainer, output_dir / "history.jsonl", lena=optimizer_name(args) == "LENA")
    trainer.add_callback(history)
    trainer.add_callback(Stopping(run.target_loss))  # last: the others begin before it may end

    with suppress(Finished):
        trainer.train(resume_from_checkpoint=checkpoint)
    if args.eval_strategy == "no":
        trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        batches = torch.utils.data.DataLoader(corpus.held_out, args.eval_batch_size, collate_fn=collate)
        unigram = unigram_loss(corpus.seen, (batch["labels"] for batch in batches), len(corpus.tokenizer))
        conclude(task.name, trainer, history, run, blocks_per_update * data.sequence_length, unigram)
    trainer.accelerator.end_training()
    time.sleep(0.2)  # on CPU, gloo's threads hold the last tensors for a moment; Python's end would abort them
