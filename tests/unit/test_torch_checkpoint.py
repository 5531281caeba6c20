"""torch.distributed.checkpoint's functions for optimizers: state is made without an update, and LENA's is kept."""

import copy
import itertools
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import ds_lena
from ds_lena import LENA, StateError

KEYS = {
    "adamw": {"total_steps": 40},
    "sgd without momentum": {"base": "sgd", "momentum": 0, "warmup": "none"},
    "lamb by module": {"base": "lamb", "layer": "module", "total_steps": 40},
    "nothing measured": {"exclude": ["*"], "warmup": "none"},
}
OPTIONS = {
    "plain": {},
    "flattened": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "full, on the CPU": {"full_state_dict": True, "cpu_offload": True},
    "flattened, on the CPU": {"flatten_optimizer_state_dict": True, "cpu_offload": True},
}
RESUMED = [
    *(("adamw", option, *updates) for option in OPTIONS for updates in itertools.product((0, 3), (0, 2))),
    *((keys, option, 3, 2) for keys in KEYS for option in ("plain", "flattened")),
    *((keys, "full", 3, 2) for keys in ("lamb by module", "nothing measured")),
]
"""Keys, options, updates before the state is taken, updates of the optimizer that it is given to.

Left out is what torch 2.13 cannot load for its own optimizers: state that is full and flattened (KeyError), and full
state without a tensor but `step`, as of SGD without momentum ("Expected device to be set").
"""


def make(lena=LENA, **keys):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    named = dict(model.named_parameters())
    decayed, rest = ([(n, p) for n, p in named.items() if (p.dim() > 1) == wide] for wide in (True, False))
    groups = [{"params": decayed, "lr": 0.02}, {"params": rest, "weight_decay": 0.0}]
    return model, lena(groups, lr=0.01, **keys)


def train(model, optimizer, updates, rank=0):
    for update in updates:
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * update + rank))
        for half in inputs.chunk(2):
            (model(half).square().sum() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()


def same(model, other):
    return all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
def test_state_is_made_without_an_update(keys):
    model, optimizer = make(**keys)
    untouched, _ = make(**keys)
    before = ds_lena.report(optimizer)
    packed = get_optimizer_state_dict(model, optimizer)
    assert set(packed["state"]) == set(dict(model.named_parameters()))
    assert all(not value.any() for state in packed["state"].values() for value in state.values())
    assert same(model, untouched)
    assert ds_lena.report(optimizer) == before
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.01]
    assert all(parameter.grad is None for parameter in model.parameters())

    steady, other = make(**keys)
    train(model, optimizer, range(3))
    train(steady, other, range(3))
    assert same(model, steady), "the run goes on as one that was never asked"


@pytest.mark.parametrize(("keys", "options", "saved_after", "loaded_after"), RESUMED)
def test_a_resumed_run_is_the_run(keys, options, saved_after, loaded_after, caplog):
    keys, options = KEYS[keys], StateDictOptions(**OPTIONS[options])
    model, optimizer = make(**keys)
    train(model, optimizer, range(saved_after))
    weights, state = copy.deepcopy(get_state_dict(model, optimizer, options=options))  # torch gives the live tensors

    resumed, other = make(**keys)
    train(resumed, other, range(50, 50 + loaded_after))
    set_state_dict(resumed, other, model_state_dict=weights, optim_state_dict=state, options=options)
    assert ds_lena.report(other) == ds_lena.report(optimizer)
    assert other.state_dict()["lena"] == optimizer.state_dict()["lena"]

    train(model, optimizer, range(3, 6))
    train(resumed, other, range(3, 6))
    assert same(model, resumed)
    assert "holds no LENA state" not in caplog.text


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
def test_through_a_checkpoint_on_disk(flat, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = make(total_steps=40)
    train(model, optimizer, range(3))
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)

    resumed, other = make(total_steps=40)
    weights, state = get_state_dict(resumed, other, options=options)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
    set_state_dict(resumed, other, model_state_dict=weights, optim_state_dict=state, options=options)
    assert ds_lena.report(other) == ds_lena.report(optimizer)
    train(model, optimizer, range(3, 6))
    train(resumed, other, range(3, 6))
    assert same(model, resumed)


def test_adamw_s_state_starts_lena_fresh(caplog):
    model, adamw = make(torch.optim.AdamW)
    train(model, adamw, range(2))
    state = get_optimizer_state_dict(model, adamw)
    other, lena = make(warmup="none")
    set_optimizer_state_dict(other, lena, state)
    assert "holds no LENA state" in caplog.text
    assert torch.equal(lena.state[other[0].weight]["exp_avg"], adamw.state[model[0].weight]["exp_avg"])


def test_state_of_another_base_is_refused_and_changes_nothing():
    model, optimizer = make(total_steps=40)
    state = get_optimizer_state_dict(model, optimizer)
    other_model, other = make(total_steps=40, base="sgd")
    train(other_model, other, range(2))
    before = ds_lena.report(other)
    with pytest.raises(StateError, match='"base": "adamw"'):
        set_optimizer_state_dict(other_model, other, state)
    assert ds_lena.report(other) == before


def test_live_groups_hold_no_copy_that_could_be_out_of_date():
    model, optimizer = make(total_steps=40)
    train(model, optimizer, range(2))
    optimizer.load_state_dict(optimizer.state_dict())
    assert [group["lena_state"] for group in optimizer.param_groups] == [None, None]


@pytest.mark.parametrize("wrong", ["a gradient", "a learning rate"])
def test_only_a_step_that_can_move_nothing_makes_state_alone(wrong):
    model, optimizer = make(warmup="none")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    if wrong == "a gradient":
        model[1].bias.grad[1] = 1e-30
    else:
        optimizer.param_groups[1]["lr"] = 1e-30
    with pytest.raises(StateError, match="no backward pass was seen"):
        optimizer.step()
    assert not optimizer.state


# -- several ranks ----------------------------------------------------------------------------------------------------


def save_and_resume(rank, folder):
    """On each of two ranks of DDP: get the full state, save it in one checkpoint, load that, and go on."""
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/store", timeout=limit, rank=rank, world_size=2)
    options = StateDictOptions(full_state_dict=True)
    model, optimizer = make(total_steps=40)
    ddp = nn.parallel.DistributedDataParallel(model)
    train(ddp, optimizer, range(3), rank)
    weights, state = get_state_dict(ddp, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)

    resumed, other = make(total_steps=40)
    ddp_resumed = nn.parallel.DistributedDataParallel(resumed)
    weights, state = get_state_dict(ddp_resumed, other, options=options)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(ddp_resumed, other, model_state_dict=weights, optim_state_dict=state, options=options)
    assert ds_lena.report(other) == ds_lena.report(optimizer)
    train(ddp, optimizer, range(3, 6), rank)
    train(ddp_resumed, other, range(3, 6), rank)
    assert same(model, resumed)
    assert ds_lena.report(other)["n"] == 4
    dist.barrier()
    dist.destroy_process_group()


def test_ddp_on_two_ranks(tmp_path):
    mp.spawn(save_and_resume, args=(tmp_path,), nprocs=2)
