"""Pretrain a GPT-2 from scratch with the HF Trainer, DeepSpeed and LENA.

    deepspeed --num_gpus 8 examples/pretrain_gpt.py --deepspeed examples/ds_lena_zero2.json \\
        --model_size base --dataset HUB_NAME_OR_PATH --sequence_length 1024 --bf16 \\
        --per_device_train_batch_size 8 --gradient_accumulation_steps 16 --max_steps 10000

All that LENA needs is ``import ds_lena`` and ``"type": "LENA"`` in the DeepSpeed config;
``--learning_rate`` is the one tuned for a single micro-batch. The output directory gets the model,
``training.png``, ``results.json``, ``history.jsonl`` and checkpoints: ``--resume_from_checkpoint
latest`` goes on from the newest.
"""

from common.blocks import Rows, stack
from common.models import GPT2Arguments, build_gpt2
from common.pretraining import Batch, Collate, Task, pretrain
from transformers import PreTrainedTokenizerFast

import ds_lena  # noqa: F401  # makes "type": "LENA" known


def collate(rows: Rows) -> Batch:
    """Blocks as they are: the model shifts the labels itself, so nothing predicts the first token of a block."""
    input_ids = stack(rows)
    labels = input_ids.clone()
    labels[:, 0] = -100
    return {"input_ids": input_ids, "labels": labels}


def collate_for(tokenizer: PreTrainedTokenizerFast, seed: int) -> Collate:
    return collate


TASK = Task(
    name="GPT-2",
    output_dir="outputs/gpt",
    arguments=GPT2Arguments,
    build=build_gpt2,
    collate=collate_for,
    no_decay=("*.bias", "*ln_*"),
)

if __name__ == "__main__":
    pretrain(TASK, __doc__)
