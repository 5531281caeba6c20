"""A whole update with sequence parallelism: all ranks share each micro-batch, by Ulysses in an HF Llama.

    python -m benchmarks.sequence                          starts its own ranks
    python -m benchmarks.sequence --tokens 512 4096        sequences of these lengths

"forward_backward" contains what LENA adds for it: in each micro-batch the ranks add the parts of all gradients up.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks import command, contestants, engines
from benchmarks.contestants import ADAMW, LENA
from benchmarks.timing import HEAD, Lap, Update, measure, table, versus, warm_up

QUICK = {"model": "tiny", "tokens": [64], "stages": [2], "accumulation": [1], "seconds": 1.0}


def main() -> int:
    parser = command.parser(__doc__, seconds=25)
    engines.add_training(parser)
    add = parser.add_argument
    add("--stages", type=int, nargs="+", choices=range(4), default=[2, 3], help="ZeRO stages; default: 2 3")
    add("--accumulation", type=int, nargs="+", default=[1, 4], help="micro-batches per update; default: 1 4")
    add("--tokens", type=int, nargs="+", default=[1024], help="of a whole sequence; default: 1024")
    args = command.parse(parser, QUICK)
    return command.run_on_ranks("benchmarks.sequence", args, lambda: run(args))


def run(args: argparse.Namespace) -> tuple[str, Any]:
    """All cases one after the other; every rank returns the same tables and samples."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    device = engines.join(args.threads)
    mpu = UlyssesSPAttentionHF.register_with_transformers(build(args.model), "sdpa", args.ranks, args.micro_batch)
    rows, found = [], []
    for accumulation, tokens, stage in itertools.product(args.accumulation, args.tokens, args.stages):
        layout = {"stage": stage, "accumulation": accumulation, "tokens": tokens}
        made = {name: _engine(name, args, stage, accumulation, mpu) for name in (ADAMW, LENA["adamw"])}
        batches = contestants.random_tokens(args.model, (accumulation, args.micro_batch, tokens), seed=0).to(device)
        updates = {name: _trainer(engine, batches, args.ranks) for name, engine in made.items()}
        warm_up(updates, 2)
        seen = engines.slowest(measure(updates, args.seconds, device, engines.meet))
        cells = [str(value) for value in layout.values()]
        rows += [row for phase in engines.PHASES for row in versus([phase, *cells], seen, ADAMW, phase)]
        found.append(layout | {"seen": seen})
        if engines.rank() == 0:
            print(f"{layout}: done", file=sys.stderr)
        del updates
        engines.end(made)
    torch.distributed.destroy_process_group()
    return table(["phase", *engines.LAYOUT, *HEAD], rows), found


def build(name: str) -> Any:
    """A Llama of this size, from scratch."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width, heads, vocabulary = contestants.SIZES[name]
    shape = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 4 * width}
    config = LlamaConfig(
        **shape,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def _engine(optimizer: str, args: argparse.Namespace, stage: int, accumulation: int, mpu: Any) -> Any:
    import deepspeed

    torch.manual_seed(0)
    model = build(args.model)
    config = engines.entries(args, stage, accumulation)
    return deepspeed.initialize(
        model=model, optimizer=contestants.make(optimizer, model.parameters()), config=config, mpu=mpu
    )[0]


def _trainer(engine: Any, batches: Tensor, ranks: int) -> Update:
    """The function that trains for one update. `batches` (accumulation, micro-batch, tokens): the same on all ranks."""
    places = torch.arange(batches.shape[2], device=batches.device).expand(batches.shape[1], -1)
    rank = engines.rank()

    def update(lap: Lap) -> None:
        for tokens in batches:
            part, place = (whole.chunk(ranks, dim=1)[rank].contiguous() for whole in (tokens, places))
            engine.backward(engine(input_ids=part, position_ids=place, labels=part, shift_labels=part).loss / ranks)
            lap("forward_backward")
            engine.step()
            lap("step")

    return update


if __name__ == "__main__":
    sys.exit(main())
