"""A training script that does not know ds_lena: `unaware.py --local_rank N --my-arg X FOLDER CONFIG`.

Every rank writes what it saw into FOLDER.
"""

import argparse
import json
import sys
from pathlib import Path

import deepspeed
import torch
from beside_unaware import Model  # a module in the script's own folder

from benchmarks.command import leave

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--my-arg")
    parser.add_argument("folder", type=Path)
    parser.add_argument("config", type=Path)
    arguments = parser.parse_args()

    model = Model()
    before = model.weight.tolist()
    engine, *_ = deepspeed.initialize(args=arguments, model=model, config=str(arguments.config))
    for _ in range(2):
        engine.backward(engine(torch.randn(2, 3)))
        engine.step()
    rank = torch.distributed.get_rank()
    saw = {
        "argv": sys.argv,
        "name": __name__,
        "file": __file__,
        "my_arg": arguments.my_arg,
        "local_rank": arguments.local_rank,
        "optimizer": type(engine.basic_optimizer).__name__,
        "moved": model.weight.tolist() != before,
    }
    (arguments.folder / f"rank{rank}.json").write_text(json.dumps(saw))
    leave()
