"""HF Trainer with a batch that grows; started by the deepspeed launcher.

`hf_growth.py FOLDER` writes what each run and rank came to into FOLDER, one JSON file for each. On one rank it goes on
with what two have trained there.
"""

import json
import logging
import os
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState
from transformers import Trainer, TrainerCallback, TrainingArguments

import ds_lena
from benchmarks.command import leave
from ds_lena.integrations.transformers_growth import BatchGrowthCallback
from tests.integrations._hf_growth import ACCUMULATION, BATCH, BUDGET, LR, SPOILED, Endless, Tokens, model

ADAMW = {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.0, "torch_adam": True}}
LENA = {"type": "LENA", "params": {"lr": LR, "smoothing": 0.5}}
GROWTH = {"factor": 100.0, "smallest": 4, "largest": 16, "every": 2}
DECAY = {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_num_steps": "auto"}}
TOTAL = 200


class Remember(TrainerCallback):
    """The windows of the updates, and what the Trainer says of its length."""

    def __init__(self):
        self.windows, self.passes, self.lr, self.max_steps, self.saved = [], 0, [], [], []

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        self.lr.append(optimizer.param_groups[0]["lr"])

    def on_substep_end(self, args, state, control, **kwargs):
        self.passes += 1

    def on_step_end(self, args, state, control, **kwargs):
        self.windows.append(self.passes + 1)
        self.passes = 0
        self.max_steps.append(state.max_steps)

    def on_save(self, args, state, control, **kwargs):
        self.saved.append(state.global_step)


def train(
    folder,
    resume=None,
    optimizer=ADAMW,
    stage=2,
    data=None,
    restore=False,
    accumulation=ACCUMULATION,
    growth=None,
    scheduler=None,
    nan_at=None,
):
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # a Trainer before has set it
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    deepspeed = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "optimizer": optimizer,
    } | ({} if scheduler is None else {"scheduler": scheduler})
    length = {"max_steps": 9} if data is not None else {}
    arguments = TrainingArguments(
        output_dir=str(folder),
        deepspeed=deepspeed if stage is not None else None,
        ddp_backend=None if os.environ["WORLD_SIZE"] == "1" else "gloo",
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=accumulation,
        learning_rate=LR,
        max_grad_norm=0.0,
        save_steps=3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=False,
        logging_steps=1,
        restore_callback_states_from_checkpoint=restore,
        lr_scheduler_type="linear" if scheduler is None else "constant",
        **length,
    )
    net = model(seed=0 if resume is None else 1)
    seen = []
    net.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"][:, 0].tolist()), with_kwargs=True
    )
    if nan_at is not None:
        net.register_forward_hook(lambda _, __, output: spoil(output) if len(seen) == nan_at else None)
    remember = Remember()
    trainer = Trainer(model=net, args=arguments, train_dataset=data or Tokens(), callbacks=[remember])
    keys = {"smoothing": 0.5} if optimizer is ADAMW else {}
    callback = BatchGrowthCallback.add_to(
        trainer,
        ds_lena.BatchGrowth(**GROWTH | (growth or {})),
        budget_samples=BUDGET,
        schedule=ds_lena.cosine(total=TOTAL) if scheduler is None else None,
        **keys,
    )
    result = trainer.train(resume_from_checkpoint=resume)
    return {
        "windows": remember.windows,
        "lr": remember.lr,
        "seen": seen,
        "max_steps": [remember.max_steps, trainer.state.max_steps, trainer.state.global_step],
        "saved": remember.saved,
        "epoch": trainer.state.epoch,
        "samples": result.metrics["train_samples_per_second"] * result.metrics["train_runtime"],
        "logs": trainer.state.log_history,
        "clock": callback.growing.samples,
        "report": callback.watch.report(),
        "accumulation": [arguments.gradient_accumulation_steps, callback.growing.accumulation],
        "weights": {name: p.flatten().tolist() for name, p in trainer.model.named_parameters()},
    }


def spoil(output):
    if os.environ["RANK"] == "0":
        output["loss"] = output["loss"] * float("nan")


def refused(folder):
    try:
        train(folder, scheduler=DECAY)
    except ds_lena.ConfigError as error:
        return str(error)


def main(folder):
    logging.disable(logging.WARNING)
    runs = {
        "zero2": lambda: train(folder / "zero2"),
        "zero2 in epoch 0": lambda: train(folder / "a", str(folder / "zero2" / "checkpoint-3")),
        "zero2 in epoch 1": lambda: train(folder / "b", str(folder / "zero2" / "checkpoint-6"), restore=True),
        "lena": lambda: train(folder / "lena", optimizer=LENA, stage=1),
        "lena resumed": lambda: train(folder / "c", str(folder / "lena" / "checkpoint-6"), optimizer=LENA, stage=1),
        "ddp": lambda: train(folder / "ddp", stage=None),
        "ddp resumed": lambda: train(folder / "d", str(folder / "ddp" / "checkpoint-6"), stage=None),
        "endless": lambda: train(folder / "endless", data=Endless()),
        "lr follows": lambda: train(folder / "f", stage=None, growth={"lr_power": 0.5}),
        "ended": lambda: train(folder / "ended", data=Endless(60)),
        "skipped": lambda: train(folder / "skipped", nan_at=SPOILED),
        "refused": lambda: refused(folder / "refused"),
    }
    alone = {
        "one rank": lambda: train(
            folder / "e", str(folder / "ddp" / "checkpoint-6"), stage=None, accumulation=2 * ACCUMULATION
        )
    }
    for name, run in (alone if os.environ["WORLD_SIZE"] == "1" else runs).items():
        result = run()
        (folder / f"{name}.rank{os.environ['RANK']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(next(argument for argument in sys.argv[1:] if not argument.startswith("--"))))
    leave()
