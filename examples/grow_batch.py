"""A batch that follows the noise scale, in a DeepSpeed loop, with any optimizer: a small GPT on the bytes of docs/.

deepspeed --num_gpus 2 --num_nodes 1 examples/grow_batch.py --optimizer Muon --factor 4
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import deepspeed
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import ds_lena  # noqa: E402

LENGTH, MICRO_BATCH = 64, 4
SMOOTHING = 0.95  # the first gradients are large and alike: a short average forgets them soon
PARAMS = {
    "AdamW": {"lr": 2e-3, "weight_decay": 0.01, "torch_adam": True},
    "LENA": {"lr": 2e-3, "weight_decay": 0.01, "smoothing": SMOOTHING},
    "Muon": {"lr": 1e-2, "weight_decay": 0.01},
}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=sorted(PARAMS), default="AdamW")
    parser.add_argument("--factor", type=float, default=1.0, help="the batch, in noise scales")
    parser.add_argument("--power", type=float, default=1.0, help="0.5: the root of the noise scale")
    parser.add_argument("--lr-power", type=float, default=0.0, help="0.5: the learning rate by the root of the batch")
    parser.add_argument("--smallest", type=int, default=2, help="micro-batches of the first updates, over all ranks")
    parser.add_argument("--largest", type=int, default=64, help="and at most")
    parser.add_argument("--samples", type=int, default=4096, help="the run, in samples of 64 bytes")
    parser.add_argument("--stage", type=int, default=2, help="ZeRO 0-3")
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    return parser.parse_args()


def windows_of(text: bytes, generator: torch.Generator) -> Tensor:
    """A micro-batch (4, 64) of bytes, from random places."""
    starts = torch.randint(len(text) - LENGTH, (MICRO_BATCH,), generator=generator).tolist()
    return torch.tensor([list(text[start : start + LENGTH]) for start in starts])


def main() -> None:
    given = options()
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": LENGTH, "vocab_size": 256}
    model = GPT2LMHeadModel(GPT2Config(**shape, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0))
    params = dict(PARAMS[given.optimizer])
    if given.optimizer == "LENA":  # its warm-up is planned in updates as they are at the start
        params["total_steps"] = given.samples // (given.smallest * MICRO_BATCH)
    engine, *_ = deepspeed.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": MICRO_BATCH,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1.0,
            "optimizer": {"type": given.optimizer, "params": params},
            "zero_optimization": {"stage": given.stage, "reduce_scatter": False},
            "steps_per_print": 1_000_000,
        },
    )
    growing = ds_lena.grow(
        engine,
        ds_lena.BatchGrowth(given.factor, given.smallest, given.largest, power=given.power, lr_power=given.lr_power),
        schedule=ds_lena.cosine(total=given.samples, warmup=given.samples / 20, floor=0.1),
        **({} if given.optimizer == "LENA" else {"smoothing": SMOOTHING}),
    )

    text = b"\n".join(page.read_bytes() for page in sorted((ROOT / "docs").glob("*.md")))
    rank = torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(1 + rank)
    loss_of_update, n, micros = 0.0, growing.n, 0
    while growing.samples < given.samples:
        tokens = windows_of(text, generator).to(engine.device)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        before = engine.global_steps
        engine.step()  # an update only at the end of a window, whose length follows the noise scale
        loss_of_update, micros = loss_of_update + float(loss.detach()), micros + 1
        if engine.global_steps > before:
            if rank == 0 and (growing.n != n or engine.global_steps % 10 == 0):
                scale, mean = growing.report()["noise_scale"], loss_of_update / micros
                print(
                    f"update {engine.global_steps:4d}, {growing.samples:6,} samples: loss {mean:.3f}, noise scale "
                    f"{scale:.1f}; {growing.n} micro-batches next, lr {engine.get_lr()[0]:.2e}",
                    flush=True,
                )
            loss_of_update, n, micros = 0.0, growing.n, 0
    if rank == 0:
        print(
            f"{engine.global_steps} updates, where {given.smallest} micro-batches each would take "
            f"{growing.micro_batches // given.smallest}: {growing.report()['advice']}"
        )


if __name__ == "__main__":
    main()
