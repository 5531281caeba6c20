"""Pretrain a BERT from scratch, as a masked language model, with the HF Trainer, DeepSpeed and LENA.

    deepspeed --num_gpus 8 examples/pretrain_bert.py --deepspeed examples/ds_lena_bert_zero2.json \\
        --model_size base --dataset HUB_NAME_OR_PATH --sequence_length 512 --bf16 \\
        --per_device_train_batch_size 16 --gradient_accumulation_steps 16 --max_steps 10000

Everything else is as in ``pretrain_gpt.py``. Of BERT's two tasks this is the first, in which 15% of the tokens are to
be found again; losses are over those tokens.
"""

from common.blocks import Rows, stack
from common.masking import Masking
from common.models import BertArguments, build_bert
from common.pretraining import Batch, Collate, Task, pretrain
from transformers import PreTrainedTokenizerFast

import ds_lena  # noqa: F401  # makes "type": "LENA" known


def collate_for(tokenizer: PreTrainedTokenizerFast, seed: int) -> Collate:
    """Blocks with masks that depend on ``seed`` and the batch alone: every evaluation has the same ones."""
    mask = Masking(tokenizer, seed)

    def collate(rows: Rows) -> Batch:
        return mask(stack(rows))

    return collate


TASK = Task(
    name="BERT",
    output_dir="outputs/bert",
    arguments=BertArguments,
    build=build_bert,
    collate=collate_for,
    no_decay=("*bias", "*[Nn]orm*"),
    needs_mask=True,
)

if __name__ == "__main__":
    pretrain(TASK, __doc__)
