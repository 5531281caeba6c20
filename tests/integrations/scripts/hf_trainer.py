"""HF Trainer and accelerate with a DeepSpeed configuration that names LENA; started by the deepspeed launcher.

`hf_trainer.py FOLDER` writes what each run and rank came to into FOLDER, one JSON file for each.
"""

import json
import logging
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DeepSpeedPlugin, DummyOptim, DummyScheduler
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import ds_lena
from benchmarks.command import leave
from ds_lena.integrations.transformers import LenaCallback, NoiseScaleCallback
from ds_lena.reporting import find_lena

SAMPLES, BATCH, ACCUMULATION, EPOCHS = 28, 2, 2, 2  # on 2 ranks: 7 micro-batches an epoch, the last window has 1
SAVED_AFTER = 3
LENA = {"type": "LENA", "params": {"lr": "auto", "weight_decay": "auto", "smoothing": 0.5}}
ADAMW = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}}
DECAY = {
    "type": "WarmupDecayLR",
    "params": {"total_num_steps": "auto", "warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
}


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return SAMPLES

    def __getitem__(self, number):
        tokens = torch.randint(32, (8,), generator=torch.Generator().manual_seed(number))
        return {"input_ids": tokens, "labels": tokens}


class Remember(TrainerCallback):
    """The number of micro-gradients of every update."""

    def __init__(self):
        self.trainer, self.n = None, []

    def on_step_end(self, args, state, control, **kwargs):
        self.n.append(ds_lena.report(self.trainer)["n"])


class Reporter(TrainerCallback):
    """As TensorBoard's and the like: what it is given in each log."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def model(seed):
    torch.manual_seed(seed)
    size = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 8, "vocab_size": 32}
    return GPT2LMHeadModel(GPT2Config(**size, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0))


def config(**more):
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": 2},
        "optimizer": LENA,
        **more,
    }


def train(folder, seed=0, resume=None, layers=None, **more):
    """Run a Trainer to its end and tell of it."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    arguments = TrainingArguments(
        output_dir=str(folder),
        deepspeed=config(**more),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=3e-3,
        weight_decay=0.02,
        save_steps=SAVED_AFTER,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
    )
    remember, reporter = Remember(), Reporter()
    trainer = Trainer(model=model(seed), args=arguments, train_dataset=Tokens(), callbacks=[remember, reporter])
    if layers is not None:
        LenaCallback.add_to(trainer, layers)
    remember.trainer = trainer
    trainer.train(resume_from_checkpoint=resume)
    lena = find_lena(trainer)
    return {
        "updates": trainer.state.global_step,
        "n": remember.n,
        "logs": reporter.logs,
        "history": trainer.state.log_history,
        "report": ds_lena.report(trainer),
        "report of engine": ds_lena.report(trainer.deepspeed),
        "total_steps": lena.state_dict()["lena"]["total_steps"],
        "weight_decay": lena.param_groups[0]["weight_decay"],
        "lr": [lena.defaults["lr"], lena.param_groups[0]["lr"]],
        "weights": {name: p.flatten().tolist() for name, p in trainer.model.named_parameters()},
    }


def train_watched(folder, **more):
    """Run a Trainer with an optimizer of others to its end, with and without a watch."""
    os.environ.pop(
        "ACCELERATE_USE_DEEPSPEED", None
    )  # a Trainer before has set it, and it makes any other one DeepSpeed's
    results = []
    for is_watched in (True, False):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        arguments = TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=ACCUMULATION,
            save_strategy="no",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_steps=1,
            **more,
        )
        reporter = Reporter()
        trainer = Trainer(model=model(0), args=arguments, train_dataset=Tokens(), callbacks=[reporter])
        if is_watched:
            NoiseScaleCallback.add_to(trainer, tokens_per_sample=8, smoothing=0.5)
        trainer.train()
        results.append(
            {
                "weights": {name: p.flatten().tolist() for name, p in trainer.model.named_parameters()},
                "report": ds_lena.report(trainer) if is_watched else None,
                "logs": reporter.logs,
            }
        )
    return results


def train_with_accelerate():
    """Three updates in a loop of one's own, with the placeholders of accelerate."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    entries = config(train_micro_batch_size_per_gpu=BATCH, gradient_accumulation_steps=ACCUMULATION, scheduler=DECAY)
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=entries))
    net = model(0)
    optimizer = DummyOptim(net.parameters(), lr=3e-3, weight_decay=0.02)
    scheduler = DummyScheduler(optimizer, total_num_steps=6, warmup_num_steps=1)
    data = torch.utils.data.DataLoader(Tokens(), batch_size=BATCH)
    net, optimizer, data, scheduler = accelerator.prepare(net, optimizer, data, scheduler)
    for _, batch in zip(range(3 * ACCUMULATION), data, strict=False):
        with accelerator.accumulate(net):
            accelerator.backward(net(**batch).loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    lena = find_lena(net)
    return {
        "report": ds_lena.report(net),
        "report of optimizer": ds_lena.report(optimizer),
        "total_steps": lena.state_dict()["lena"]["total_steps"],
    }


def main(folder):
    logging.disable(logging.INFO)
    runs = {
        "no scheduler": lambda: train(folder / "run"),
        "resumed": lambda: train(folder / "resumed", seed=1, resume=str(folder / "run" / f"checkpoint-{SAVED_AFTER}")),
        "scheduler": lambda: train(folder / "scheduler", scheduler=DECAY, layers=False),
        "logged": lambda: train(folder / "logged", layers=True),
        "accelerate": train_with_accelerate,
        "watched": lambda: train_watched(folder / "watched", deepspeed=config(optimizer=ADAMW)),
        "watched in DDP": lambda: train_watched(folder / "watched", ddp_backend="gloo"),
    }
    for name, run in runs.items():
        result = run()
        (folder / f"{name}.rank{torch.distributed.get_rank()}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(next(argument for argument in sys.argv[1:] if not argument.startswith("--"))))
    leave()
