"""The forms in which parameters may be handed over, what a group may say, and what is refused."""

import copy
import logging

import pytest
import torch
import torch.distributed as dist
from pytest import approx
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import ds_lena
from ds_lena import LENA, ConfigError, StateError, UnsupportedError
from ds_lena.optimizer import controller_of
from tests.unit.support import backward, random_gradients, train_window, vector, weights

NO_WARMUP = {"warmup": "none", "max_relative_gain": None}


def layers(optimizer):
    return ds_lena.report(optimizer)["layers"]


def named(*names):
    return list(zip(names, weights(*[2] * len(names)), strict=True))


def only(named_parameters):
    return [parameter for _, parameter in named_parameters]


# -- names ------------------------------------------------------------------------------------------------------------


def test_without_names_a_layer_has_a_number():
    assert list(layers(LENA(weights(2, 3)))) == ["param_0", "param_1"]


def test_names_of_named_parameters():
    assert list(layers(LENA(nn.Linear(2, 2).named_parameters()))) == ["weight", "bias"]


def test_names_in_groups():
    groups = [{"params": named("a.w", "b.w"), "lr": 0.1}, {"params": named("a.b")}]
    assert list(layers(LENA(groups, layer="module"))) == ["a", "b"]


def test_a_group_may_hold_one_tensor_alone():
    assert list(layers(LENA([{"params": weights(2)[0]}]))) == ["param_0"]


def test_names_of_a_wrapped_model_are_those_of_the_model():
    model = nn.DataParallel(nn.Sequential(nn.Linear(2, 2)))
    assert list(layers(LENA(model.named_parameters()))) == ["0.weight", "0.bias"]


def test_names_for_some_parameters_only_are_refused():
    with pytest.raises(ConfigError, match="2 of 3 parameters have names"):
        LENA([*named("a", "b"), *weights(2)])


def test_a_frozen_parameter_is_not_watched_but_keeps_its_number():
    first, frozen, last = weights(2, 2, 2)
    frozen.requires_grad_(False)
    optimizer = LENA([first, frozen, last])
    assert list(layers(optimizer)) == ["param_0", "param_2"]


# -- groups -----------------------------------------------------------------------------------------------------------


def test_groups_have_their_own_learning_rate_and_decay():
    parameters = weights(2, 2)
    start = [p.detach().clone() for p in parameters]
    groups = [
        {"params": parameters[:1], "lr": 0.1, "weight_decay": 0.0},
        {"params": parameters[1:], "weight_decay": 0.5},
    ]
    optimizer = LENA(groups, lr=0.01, base="sgd", momentum=0, **NO_WARMUP)
    train_window(optimizer, parameters, [[vector(1, 0), vector(0, 0)]])
    torch.testing.assert_close(parameters[0].detach(), start[0] - 0.1 * vector(1, 0))
    torch.testing.assert_close(parameters[1].detach(), start[1] * (1 - 0.01 * 0.5))


@pytest.mark.parametrize("how", ["a group without LENA", "exclude"])
def test_a_parameter_without_lena_has_factor_one_and_no_statistics(how):
    pairs = named("body.weight", "key.bias")
    inside, outside = only(pairs)
    start = outside.detach().clone()
    keys = {"lr": 0.1, "base": "sgd", "momentum": 0, "total_steps": 100}
    if how == "exclude":
        optimizer = LENA(pairs, exclude=["key.*"], **keys)
    else:
        optimizer = LENA([{"params": pairs[:1]}, {"params": pairs[1:], "lena": False}], **keys)
    train_window(optimizer, [inside, outside], [[vector(1, 0), vector(3, 0)], [vector(0, 1), vector(1, 0)]])
    assert list(layers(optimizer)) == ["body.weight"]
    torch.testing.assert_close(outside.detach(), start - 0.1 * vector(2, 0))


def test_excluded_parameters_alone_leave_nothing_to_measure():
    pairs = named("a", "b")
    optimizer = LENA(pairs, exclude=["*"], total_steps=10)
    train_window(optimizer, only(pairs), random_gradients(only(pairs), 2, seed=0))
    assert layers(optimizer) == {}
    assert ds_lena.report(optimizer)["update"] == 1


def test_no_decay_is_a_decay_of_zero():
    pairs = named("a.weight", "a.bias")
    start = [p.detach().clone() for p in only(pairs)]
    optimizer = LENA(pairs, lr=0.1, weight_decay=0.5, no_decay=["*.bias"], **NO_WARMUP)
    train_window(optimizer, only(pairs), [[vector(0, 0), vector(0, 0)]])
    torch.testing.assert_close(pairs[0][1].detach(), start[0] * (1 - 0.1 * 0.5))
    assert torch.equal(pairs[1][1].detach(), start[1])


@pytest.mark.parametrize("key", ["exclude", "no_decay"])
def test_a_pattern_that_matches_nothing_is_warned_of(key, caplog):
    LENA(named("a.weight", "a.bias"), **{key: ["*.bias", "*.biass"]})
    (record,) = caplog.records
    assert f'"{key}"' in record.getMessage()
    assert '"*.biass" matches no parameter. The nearest name is "a.bias"' in record.getMessage()


def test_a_bad_value_in_a_group_is_refused():
    with pytest.raises(ConfigError, match='parameter group has "lr": -1'):
        LENA([{"params": weights(2), "lr": -1}])


def test_an_unknown_key_is_refused():
    with pytest.raises(ConfigError, match='unknown key "momentun"'):
        LENA(weights(2), base="sgd", momentun=0.9)


def test_a_schedule_that_warms_up_too_is_warned_of_once(caplog):
    parameters = weights(2)
    optimizer = LENA(parameters, lr=0.1, total_steps=10)
    torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1)
    for seed in range(3):
        train_window(optimizer, parameters, random_gradients(parameters, 2, seed))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "starts at lr 0.01, below the given 0.1" in caplog.text


@pytest.mark.parametrize("keys", [{"total_steps": 10}, {"warmup": "none"}], ids=str)
def test_a_schedule_that_begins_at_the_given_learning_rate_is_not_warned_of(keys, caplog):
    parameters = weights(2)
    optimizer = LENA(parameters, **keys)
    torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0 if "total_steps" in keys else 0.1)
    train_window(optimizer, parameters, random_gradients(parameters, 2, seed=0))
    assert caplog.text == ""


# -- refused ----------------------------------------------------------------------------------------------------------


def test_a_group_that_is_added_later_is_refused():
    optimizer = LENA(weights(2))
    with pytest.raises(UnsupportedError, match="add_param_group"):
        optimizer.add_param_group({"params": weights(3)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.complex64], ids=str)
def test_a_type_of_number_in_which_lena_would_not_be_exact_is_refused(dtype):
    with pytest.raises(UnsupportedError, match=f"of type {dtype}.*bfloat16, float32 and float64"):
        LENA([nn.Parameter(torch.ones(2, dtype=dtype))])


def test_a_model_on_two_devices_is_refused():
    with pytest.raises(UnsupportedError, match="on 2 devices: cpu, meta"):
        LENA([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))])


def test_they_follow_torch_distributed_that_is_started_after_construction():
    parameters = weights(2)
    optimizer = LENA(parameters, warmup="none")
    assert controller_of(optimizer).binding.group is None
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        backward(parameters, [torch.ones(2)])
        assert controller_of(optimizer).binding.group is dist.group.WORLD
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


SHARDED = {
    "FSDP2": lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (1,))),
    "FSDP": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
    "FSDP with the original parameters": lambda model: FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), use_orig_params=True
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shard", SHARDED.values(), ids=SHARDED)
def test_parameters_that_torch_shards_are_refused(shard, process_group):
    model = nn.Linear(3, 2)
    with pytest.raises(UnsupportedError, match=r"DTensor|FSDP"):
        LENA((shard(model) or model).parameters())


def test_a_gradient_scaler_is_refused():
    parameters = weights(2, dtype=torch.float32)
    optimizer = LENA(parameters, **NO_WARMUP)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(parameters[0].sum()).backward()
    with pytest.raises(UnsupportedError, match=r"GradScaler.*bfloat16"):
        scaler.step(optimizer)


def test_a_gradient_scaler_that_is_switched_off_is_not_refused():
    parameters = weights(2, dtype=torch.float32)
    optimizer = LENA(parameters, **NO_WARMUP)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(parameters[0].sum()).backward()
    scaler.step(optimizer)
    assert controller_of(optimizer).schedule.updates == 1


def test_a_sparse_gradient_is_refused():
    embed = nn.Embedding(5, 2, sparse=True)
    optimizer = LENA(embed.parameters(), **NO_WARMUP)
    with pytest.raises(UnsupportedError, match="sparse=False"):
        embed(torch.tensor([1, 2])).sum().backward()
    assert controller_of(optimizer).schedule.updates == 0


def test_parameters_that_are_replaced_after_construction_are_refused():
    parameters = weights(2, 2)
    optimizer = LENA(parameters, **NO_WARMUP)
    other = weights(2)[0]
    optimizer.param_groups[0]["params"][1] = other
    backward([*parameters, other], [vector(1, 1)] * 3)
    with pytest.raises(StateError, match=r"parameter 1 of group 0, of shape .*Construct LENA after"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(parameters, weights(2, 2), strict=True))


@pytest.mark.filterwarnings("ignore")
def test_sharding_after_construction_is_told_or_refused(process_group, caplog):
    """accelerate swaps the parameters in the groups; without that no gradient comes."""
    model = nn.Linear(3, 2)
    optimizer = LENA(model.named_parameters(), **NO_WARMUP)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert caplog.text.count("found no gradient in any of its parameters") == 1
    optimizer.param_groups[0]["params"] = list(model.parameters())
    with pytest.raises(StateError, match=r'"weight".*has a gradient and was not there'):
        optimizer.step()


def test_parameters_of_another_model_in_all_groups_are_refused():
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = LENA(model.named_parameters(), **NO_WARMUP)
    for group in optimizer.param_groups:
        group["params"] = list(other.parameters())
    other(torch.ones(1, 3)).sum().backward()
    with pytest.raises(StateError, match=r'"weight", of shape \(2, 3\), has a gradient and was not there'):
        optimizer.step()


@pytest.mark.parametrize("others_have_gradients", [True, False])
def test_a_parameter_that_is_unfrozen_after_construction_is_refused(others_have_gradients):
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    optimizer = LENA([{"params": [("w", model.weight)]}, {"params": [("b", model.bias)]}], **NO_WARMUP)
    model.bias.requires_grad_(True)
    model.weight.requires_grad_(others_have_gradients)
    model(torch.ones(1, 3)).sum().backward()
    start = model.weight.detach().clone()
    with pytest.raises(StateError, match=r'"b", of shape .*was frozen'):
        optimizer.step()
    assert torch.equal(model.weight, start)


def test_layers_may_be_coarser_than_tensors():
    pairs = named("h.0.weight", "h.0.bias", "h.1.weight")
    optimizer = LENA(pairs, layer="block", **NO_WARMUP)
    train_window(optimizer, only(pairs), random_gradients(only(pairs), 4, seed=0))
    assert list(layers(optimizer)) == ["h.0", "h.1"]
    assert layers(optimizer)["h.0"]["noise"] == approx(
        sum(fine["noise"] for fine in by_tensor(pairs, ["h.0.weight", "h.0.bias"]))
    )


@pytest.mark.parametrize("layer", ["module", "block"])
def test_layers_of_modules_need_names(layer):
    parameters = weights(2, 3)
    optimizer = LENA(parameters, layer=layer, **NO_WARMUP)
    start = [p.detach().clone() for p in parameters]
    with pytest.raises(ConfigError, match=rf'"layer": "{layer}" needs the names.*named_parameters\(\)'):
        train_window(optimizer, parameters, random_gradients(parameters, 2, seed=0))
    assert all(torch.equal(p, before) for p, before in zip(parameters, start, strict=True))


def by_tensor(pairs, names):
    fresh = [(name, nn.Parameter(p.detach().clone())) for name, p in pairs]
    optimizer = LENA(fresh, **NO_WARMUP)
    train_window(optimizer, only(fresh), random_gradients(only(fresh), 4, seed=0))
    return [layers(optimizer)[name] for name in names]


def test_patterns_on_parameters_without_names_get_a_warning_at_the_first_step(caplog):
    parameters = weights(2)
    optimizer = LENA(parameters, no_decay=["*.bias"], warmup="none")
    assert caplog.messages == []
    backward(parameters, [torch.ones(2)])
    optimizer.step()
    assert any("*.bias" in message and "param_0" in message for message in caplog.messages)


def test_a_name_that_is_given_twice_is_refused():
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r'"(bias|weight)" is given to several parameters'):
        LENA([{"params": one.named_parameters()}, {"params": other.named_parameters()}], total_steps=10)


def test_a_copy_is_refused():
    with pytest.raises(StateError, match="cannot be copied or pickled"):
        copy.deepcopy(LENA(weights(2), total_steps=10))


def test_the_statistics_follow_a_model_that_is_moved_after_construction(monkeypatch):
    parameters = weights(2)
    optimizer = LENA(parameters, warmup="none")
    backward(parameters, [torch.ones(2)])
    optimizer.step()
    optimizer.zero_grad()
    meter = controller_of(optimizer).meter
    monkeypatch.setattr(meter, "device", torch.device("meta"))  # as if it had been made elsewhere
    backward(parameters, [torch.ones(2)])
    assert meter.device == parameters[0].device
    optimizer.step()
    report = ds_lena.report(optimizer)
    assert (report["n"], report["update"]) == (1, 2), "the updates before are not forgotten"


@pytest.mark.parametrize("warmup", ["layer", "none"])
def test_an_update_past_the_planned_end_is_warned_of_once(warmup, caplog):
    parameters = weights(2)
    optimizer = LENA(parameters, total_steps=2, warmup=warmup)
    for seed in range(5):
        train_window(optimizer, parameters, random_gradients(parameters, 2, seed))
        said = ["update 3 is past the end" in message for message in caplog.messages]
        assert said == ([True] if seed >= 2 and warmup == "layer" else [])


def test_other_ranks_leave_warnings_to_the_first(caplog, monkeypatch):
    monkeypatch.setattr("ds_lena._registration.is_first_rank", lambda: False)
    LENA(named("a.weight"), exclude=["*.biass"])
    assert caplog.messages == []
