"""The speed of examples/pretrain_gpt.py with LENA and with stock AdamW, launched in turns.

    python -m benchmarks.example --rounds 6

Each launch trains for some updates and gives its tokens per second: tokens of an update over the median of their
seconds. What is compared is the same script under the same launcher, which includes the Trainer and its callbacks.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.timing import table

PRESETS = ("adamw", "lena")
QUICK = {"rounds": 1, "updates": 3, "model": "tiny", "tokens": 64}


def main() -> int:
    parser = command.parser(__doc__)
    add = parser.add_argument
    add("--ranks", type=int, help="default: the number of GPUs; 2 without one")
    add("--rounds", type=int, default=6, help="launches of each; default: 6")
    add("--updates", type=int, default=20, help="of one launch; default: 20")
    add("--model", default="mini", help="--model_size of the script; default: mini")
    add("--tokens", type=int, default=512, help="of a micro-batch of one sequence; default: 512")
    add("--accumulation", type=int, default=4, help="micro-batches of a rank in an update; default: 4")
    args = command.parse(parser, QUICK)
    machine = command.describe()
    speeds: dict[str, list[float]] = {preset: [] for preset in PRESETS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for preset in PRESETS[:: -1 if number % 2 else 1]:
                speeds[preset].append(launch(preset, args, Path(folder)))
                print(f"round {number + 1} {preset}: {speeds[preset][-1]:.0f} tokens/s", file=sys.stderr)
    command.present("benchmarks.example", args, machine, as_table(speeds), speeds)
    return 0


def launch(preset: str, args: Any, folder: Path) -> float:
    """Tokens per second of one run of the script; its data is made once and kept in `folder`."""
    port = command.free_port()
    words = command.launcher(args.ranks, port)
    words += ["examples/pretrain_gpt.py", "--deepspeed", "examples/ds_lena_zero2.json"]
    words += ["--optimizer-preset", preset, "--output_dir", str(folder), "--save_strategy", "no"]
    words += ["--model_size", args.model, "--sequence_length", str(args.tokens), "--max_held_out_blocks", "2"]
    words += ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", str(args.accumulation)]
    words += ["--max_steps", str(args.updates), "--eval_steps", str(args.updates)]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": str(command.ROOT)}
    try:
        subprocess.run(words, cwd=command.ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    finally:
        command.remove_buffers(port)
    return float(json.loads((folder / "results.json").read_text())["tokens_per_second"])


def as_table(speeds: Mapping[str, list[float]]) -> str:
    stock, rows = speeds["adamw"], []
    for preset, own in speeds.items():
        paired = [mine / theirs for mine, theirs in zip(own, stock, strict=True)]
        ratios = [statistics.median(own) / statistics.median(stock), max(own) / max(stock), min(paired), max(paired)]
        rows.append([preset, str(len(own)), f"{statistics.median(own):.0f}", *(f"{ratio:.3f}" for ratio in ratios)])
    head = ["optimizer", "launches", "tokens/s", "ratio of medians", "of the best", "within rounds, from", "to"]
    return f"LENA is faster where a ratio is above 1.\n\n{table(head, rows)}"


if __name__ == "__main__":
    sys.exit(main())
