"""Pretrain a GPT of Megatron-core, split over tensor-parallel ranks, with DeepSpeed and LENA.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_gpus 2 --num_nodes 1 examples/pretrain_gpt_megatron.py \\
        --deepspeed_config examples/ds_lena_megatron_zero1.json --vocab_size 2048 --sequence_length 64 --updates 120

On GPUs leave out DS_ACCELERATOR and OMP_NUM_THREADS. What makes it LENA's: ``import ds_lena``,
``sum_partial_gradients(model)`` and ``"type": "LENA"`` in the JSON. The output directory gets ``training.png``,
``history.jsonl`` and ``results.json``.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from common.blocks import stack, unigram_loss
from common.corpus import Corpus, DataArguments, prepare
from common.errors import InputError, give_up
from common.history import finite, write, write_whole
from common.megatron import MegatronArguments, build, data_parallel_rank
from common.options import option
from common.plot import draw
from common.results import layer_table
from megatron.core import parallel_state
from transformers import HfArgumentParser

import ds_lena
from ds_lena.integrations.megatron import sum_partial_gradients


@dataclass
class RunArguments:
    """The run."""

    deepspeed_config: str = option("examples/ds_lena_megatron_zero1.json", "DeepSpeed's JSON.")
    updates: int = option(120, "Updates of the run.")
    evaluate_every: int = option(20, "Updates between two evaluations.")
    seed: int = option(0, "Of the weights and of the order of the blocks.")
    bf16: bool = option(False, "Train in bf16.")
    output_dir: str = option("outputs/megatron", "Where results go.")
    local_rank: int = option(0, "Set by the launcher.")


def main() -> None:
    parser = HfArgumentParser((MegatronArguments, DataArguments, RunArguments))
    model_args, data, run = parser.parse_args_into_dataclasses()
    deepspeed.init_distributed()
    try:
        if dist.get_world_size() % model_args.tensor_parallel:
            raise InputError(
                f"{dist.get_world_size()} ranks cannot be split by --tensor_parallel {model_args.tensor_parallel}"
            )
        train(model_args, data, run)
    except (InputError, ds_lena.LenaError) as error:
        give_up(parser.prog, error)


def train(model_args: MegatronArguments, data: DataArguments, run: RunArguments) -> None:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=model_args.tensor_parallel)
    rank, ranks = data_parallel_rank()
    config = json.loads(Path(run.deepspeed_config).read_text())
    config["optimizer"]["params"]["total_steps"] = run.updates
    config |= {"bf16": {"enabled": run.bf16}, "steps_per_print": 10**9}
    size, accumulation = config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]
    corpus = _corpus(data, run, size * accumulation * ranks)

    torch.manual_seed(run.seed)
    model = build(model_args, len(corpus.tokenizer), data.sequence_length, run.seed, run.bf16)
    sum_partial_gradients(model)
    engine, *_ = deepspeed.initialize(
        model=model,
        mpu=parallel_state,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda update: 0.5 * (1 + math.cos(math.pi * min(update / run.updates, 1)))
        ),
        config=config,
    )
    blocks = _blocks(corpus, run.seed, rank, ranks, size)
    records = [{"update": 0, "eval_loss": evaluate(engine, corpus, rank, ranks, size)}]
    began = time.monotonic()
    for update in range(1, run.updates + 1):
        losses = []
        for _ in range(accumulation):
            loss = engine(next(blocks).to(engine.device))
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        mean = torch.stack(losses).mean()
        dist.all_reduce(mean, group=parallel_state.get_data_parallel_group())
        records.append({"update": update, "loss": float(mean) / ranks, "lena": ds_lena.report(engine)})
        if update % run.evaluate_every == 0 or update == run.updates:
            records.append({"update": update, "eval_loss": evaluate(engine, corpus, rank, ranks, size)})
            if dist.get_rank() == 0:
                print(f"update {update}: held-out loss {records[-1]['eval_loss']:.3f}", flush=True)
    if dist.get_rank() == 0:
        conclude(engine, corpus, data, run, records, (time.monotonic() - began) / run.updates)
    dist.barrier()
    time.sleep(0.2)  # on CPU, gloo's threads hold the last tensors for a moment; Python's end would abort them


def _corpus(data: DataArguments, run: RunArguments, blocks_per_update: int) -> Corpus:
    """The first rank writes the blocks, and then the others read them."""
    folder = Path(run.output_dir)
    if dist.get_rank() == 0:
        prepare(data, folder, blocks_per_update, run.seed, with_mask=False)
    dist.barrier()
    return prepare(data, folder, blocks_per_update, run.seed, with_mask=False)


def _blocks(corpus: Corpus, seed: int, rank: int, ranks: int, size: int):
    """Micro-batches of this data-parallel rank, (size, length) each, in another order every time round."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(corpus.train), generator=generator).tolist()[rank::ranks]
        for start in range(0, len(order) - size + 1, size):
            yield stack(corpus.train.select(order[start : start + size]).to_list())


@torch.no_grad()
def evaluate(engine: deepspeed.DeepSpeedEngine, corpus: Corpus, rank: int, ranks: int, size: int) -> float:
    """The held-out loss, nats per token, over the data-parallel ranks."""
    engine.eval()
    rows = corpus.held_out.select(range(rank, len(corpus.held_out), ranks)).to_list()
    total = torch.zeros(2, device=engine.device)
    for start in range(0, len(rows), size):
        batch = stack(rows[start : start + size]).to(engine.device)
        total += torch.stack((engine(batch) * len(batch), torch.full((), float(len(batch)), device=engine.device)))
    engine.train()
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return float(total[0] / total[1])


def conclude(engine, corpus: Corpus, data: DataArguments, run: RunArguments, records: list, seconds: float) -> None:
    """Print and keep what the run came to. The first rank calls it."""
    folder, report = Path(run.output_dir), ds_lena.report(engine)
    held_out = [record["eval_loss"] for record in records if "eval_loss" in record]
    labels = (stack([row])[:, 1:] for row in corpus.held_out.to_list())
    unigram = unigram_loss(corpus.seen, labels, len(corpus.tokenizer))
    print(f"\n{layer_table(report)}")
    print(f"\nheld-out loss, nats per token: {held_out[0]:.3f} before training, {held_out[-1]:.3f} at the end")
    print(f"loss of a unigram model: {unigram:.3f}")
    tokens = engine.train_batch_size() * data.sequence_length
    results = {
        "losses": {"held_out_before": held_out[0], "held_out_end": held_out[-1], "unigram": unigram},
        "updates": run.updates,
        "tokens_per_update": tokens,
        "tokens_per_second": tokens / seconds,
        "lena": report,
    }
    write(folder / "history.jsonl", [finite(record) for record in records])
    write_whole(folder / "results.json", json.dumps(finite(results), indent=2) + "\n")
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    draw(
        [finite(record) for record in records],
        unigram,
        f"Megatron GPT over {ranks} tensor-parallel ranks with LENA, {tokens:,} tokens per update",
        folder / "training.png",
    )
    print(f"\nin {folder}: training.png, history.jsonl, results.json")


if __name__ == "__main__":
    main()
