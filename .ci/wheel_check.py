"""A user's training script: LENA from a DeepSpeed JSON, a few updates, the report.

`make wheel-check` launches it where the wheel and DeepSpeed are installed, and nothing else.
"""

import argparse
import importlib.util
import math
import os
import sys
from pathlib import Path

import deepspeed
import torch

import ds_lena

UPDATES = 3


def main(config: str) -> None:
    installed = Path(ds_lena.__file__).parent
    assert installed.is_relative_to(sys.prefix), f"not the installed wheel: {installed}"
    assert (installed / "py.typed").exists(), "the wheel has no py.typed"
    assert importlib.util.find_spec("transformers") is None, "transformers is installed: not a bare environment"

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    layers = set(dict(model.named_parameters()))
    before = torch.cat([weight.detach().flatten().clone() for weight in model.parameters()])
    engine, *_ = deepspeed.initialize(model=model, config=config)
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    torch.manual_seed(rank)
    accumulation = engine.gradient_accumulation_steps()
    for _ in range(UPDATES * accumulation):
        inputs = torch.randn(engine.train_micro_batch_size_per_gpu(), 8)
        engine.backward((engine(inputs) - inputs.sum(1, keepdim=True)).square().mean())
        engine.step()

    report = ds_lena.report(engine)
    assert report["update"] == UPDATES and report["n"] == ranks * accumulation, report
    assert set(report["layers"]) == layers, report["layers"].keys()
    for layer in report["layers"].values():
        assert 1 <= layer["gain"] <= report["n"] and 0 < layer["factor"] < math.inf, layer
    after = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    assert not torch.equal(before, after), "the weights did not move"
    first = after.clone()
    torch.distributed.broadcast(first, 0)
    assert torch.equal(first, after), "the ranks' weights differ"
    if rank == 0:
        print(f"wheel-check: {UPDATES} updates by ds_lena {ds_lena.__version__} of {installed}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", help="the launcher's")
    parser.add_argument("config")
    main(parser.parse_args().config)
    sys.stdout.flush()
    os._exit(0)  # without the interpreter's clean-up, which threads of gloo may not survive
