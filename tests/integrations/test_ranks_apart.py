"""Plain PyTorch on ranks that do not train as DDP does: the same error on every rank, at the first update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import ds_lena
from ds_lena.grad_stats import reduce
from tests.integrations._engines import Net, batch, said
from tests.integrations._ranks import Ranks

KEYS = {"lr": 0.01, "warmup": "none"}


def backward(model: nn.Module, update: int) -> None:
    model(*batch(update, 0)).backward()


def average(parameters: Iterator[nn.Parameter]) -> None:
    for parameter in parameters:
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def by_hand() -> None:
    model = Net()
    optimizer = ds_lena.LENA(model.named_parameters(), **KEYS)
    backward(model, 0)
    average(model.parameters())
    optimizer.step()


def by_hand_with_equal_norms(inputs: list[list[float]]) -> None:
    """The micro-gradients are the inputs themselves."""
    model = nn.Linear(3, 1, bias=False)
    optimizer = ds_lena.LENA(model.named_parameters(), **KEYS)
    model(torch.tensor(inputs[dist.get_rank()])).sum().backward()
    average(model.parameters())
    optimizer.step()


def not_at_all() -> None:
    model = Net()
    optimizer = ds_lena.LENA(model.named_parameters(), **KEYS)
    backward(model, 0)
    optimizer.step()


def local_sgd() -> None:
    from accelerate import Accelerator
    from accelerate.local_sgd import LocalSGD

    accelerator, model = Accelerator(cpu=True), Net()
    model, optimizer = accelerator.prepare(model, ds_lena.LENA(model.parameters(), **KEYS))
    with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=2, enabled=True) as local:
        accelerator.backward(model(*batch(0, 0)))
        optimizer.step()
        local.step()


def sharded(widths: list[int]) -> None:
    """torch's ZeRO 1 on one layer of each width. It gives every rank some of the tensors."""
    model = nn.Sequential(*(nn.Linear(4, width, bias=False) for width in widths))
    wrapped = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(wrapped.parameters(), optimizer_class=ds_lena.LENA, lr=0.01)
    x, _ = batch(0, 0)
    (sum(layer(x).square().mean() for layer in model) + 0 * wrapped.module[0](x).sum()).backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    optimizer.step()


def summed_by_ddp() -> None:
    """A communication hook that adds up and does not divide."""
    model = DistributedDataParallel(Net())
    model.register_comm_hook(
        None,
        lambda _, bucket: dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0]),
    )
    optimizer = ds_lena.LENA(model.named_parameters(), **KEYS)
    backward(model, 0)
    optimizer.step()


def two_models() -> None:
    model = Net() if dist.get_rank() else Net(width=6)
    optimizer = ds_lena.LENA(model.named_parameters(), **KEYS)
    backward(model, 0)
    optimizer.step()


def other_keys() -> None:
    model = DistributedDataParallel(Net())
    keys = KEYS | ({"max_factor": 2.0} if dist.get_rank() else {})
    optimizer = ds_lena.LENA(model.named_parameters(), **keys)
    backward(model, 0)
    optimizer.step()


def no_gradient_on_one() -> None:
    model = Net()
    optimizer = ds_lena.LENA(model.named_parameters(), **KEYS)
    if dist.get_rank() == 0:
        backward(model, 0)
    optimizer.step()


def error_of(run: Callable[..., None], *arguments: object) -> str:
    try:
        run(*arguments)
    except ds_lena.StateError as error:
        return str(error)
    finally:
        dist.barrier()
    return ""


NOT_AVERAGED, OTHER_PARAMETERS = (
    "the gradients are not the same on every rank",
    "are not the same on every rank: the number",
)

CASES = {
    "added up": ("larger than any average", summed_by_ddp),
    "averaged by hand": (NOT_AVERAGED, by_hand),
    "averaged by hand, equal norms": (NOT_AVERAGED, by_hand_with_equal_norms, [[1.0, 0.0, 2.0], [2.0, 0.0, 1.0]]),
    "averaged by hand, opposite": (NOT_AVERAGED, by_hand_with_equal_norms, [[1.0, -1.0, 2.0], [-1.0, 1.0, -2.0]]),
    "not averaged": (NOT_AVERAGED, not_at_all),
    "LocalSGD": (NOT_AVERAGED, local_sgd),
    "other keys on one rank": (OTHER_PARAMETERS, other_keys),
    "no gradient on one rank": (NOT_AVERAGED, no_gradient_on_one),
    "another model on each rank": (OTHER_PARAMETERS, two_models),
    "sharded, as many tensors": (NOT_AVERAGED, sharded, [3, 3, 3, 3]),
    "sharded, more tensors": (OTHER_PARAMETERS, sharded, [3, 3, 3]),
    "sharded, none for one rank": (OTHER_PARAMETERS, sharded, [3]),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_one_error_on_every_rank(ranks: Ranks, case: tuple) -> None:
    reason, *call = case
    first, second = ranks.run(error_of, *call)
    assert reason in first and "DistributedDataParallel" in first and "process_group" in first
    assert first == second


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    before, reduce.PATIENCE = reduce.PATIENCE, seconds
    try:
        yield
    finally:
        reduce.PATIENCE = before


def first_rank_alone(gives_its_group: bool) -> tuple[str, list[str], int]:
    """The error on rank 0, which trains alone, what was said meanwhile, and its updates."""
    alone = dist.new_group([0])
    dist.barrier()
    everybody = dist.new_group(timeout=timedelta(seconds=10))
    message, updates = "", 0
    with said() as messages, patience(1.0):
        if dist.get_rank() == 0:
            model = Net()
            group = alone if gives_its_group else everybody
            optimizer = ds_lena.LENA(model.named_parameters(), process_group=group, **KEYS)
            for update in range(2):
                backward(model, update)
                try:
                    optimizer.step()
                except ds_lena.StateError as error:
                    message = str(error)
                    break
                optimizer.zero_grad()
            updates = ds_lena.report(optimizer)["update"]
    dist.barrier()
    return message, messages, updates


def test_a_model_that_one_rank_trains_needs_its_group(ranks: Ranks) -> None:
    message, said_meanwhile, updates = ranks.run(first_rank_alone, False)[0]
    assert "not every rank of LENA's process group took part" in message and "new_group([rank])" in message
    assert ["waiting at the first step()" in line for line in said_meanwhile] == [True]
    assert updates == 0
    ranks.stop()  # the group that timed out is of no more use
    assert ranks.run(first_rank_alone, True)[0] == ("", [], 2)


def compressed_by_ddp(is_compressed: bool) -> dict:
    """Rounding to fp16 leaves an average."""
    model = DistributedDataParallel(Net())
    if is_compressed:
        model.register_comm_hook(None, fp16_compress_hook)
    optimizer = ds_lena.LENA(model.named_parameters(), **KEYS)
    for update in range(3):
        backward(model, update)
        optimizer.step()
        optimizer.zero_grad()
    return {name: layer["gain"] for name, layer in ds_lena.report(optimizer)["layers"].items()}


def test_a_communication_hook_that_averages_is_welcome(ranks: Ranks) -> None:
    exact, rounded = ranks.run(compressed_by_ddp, False)[0], ranks.run(compressed_by_ddp, True)[0]
    assert rounded == pytest.approx(exact, rel=0.01) and rounded != exact


def by_ddp() -> tuple[str, list[str]]:
    """A DDP run with windows of two passes, the first without synchronization: nothing to complain of."""
    model = DistributedDataParallel(Net())
    optimizer = ds_lena.LENA(model.named_parameters(), **KEYS)
    with said() as messages:
        for update in range(3):
            with model.no_sync():
                (model(*batch(update, 0)) / 2).backward()
            (model(*batch(update, 1)) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
    return ds_lena.report(optimizer)["n"], messages


def test_ddp_is_as_it_should_be(ranks: Ranks) -> None:
    assert ranks.run(by_ddp) == [(4, [])] * 2
