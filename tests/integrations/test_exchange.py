"""What ranks tell each other when LENA is attached: an error of one, keys that differ, and names that differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_lena
from ds_lena.config import LenaConfig
from ds_lena.integrations.deepspeed.exchange import from_all, from_some, members_of_all, require_same_keys, together
from ds_lena.integrations.megatron import wrap
from ds_lena.layers import Member
from tests.helpers.case import Case
from tests.helpers.megatron_gpt import megatrons_groups
from tests.helpers.megatron_run import AsOnGpu, made
from tests.helpers.split_run import split_model
from tests.integrations._engines import LENA, Net, config, refusal, without_optimizer
from tests.integrations._ranks import Ranks
from tests.integrations._split import TwoParts


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("four_ranks"), world=4)
    yield started
    started.stop()


# -- an error of one rank ---------------------------------------------------------------------------------------------


def exchanged(failing: dict[int, int]) -> tuple[str, list[int]]:
    """The error of three exchanges, if rank r fails before exchange `failing[r]`, and what a later exchange gives."""
    rank, everything = dist.get_rank(), dist.group.WORLD
    alone = [dist.new_group([other]) for other in range(dist.get_world_size())][rank]

    def action() -> tuple[list[int], list[str], list[int]]:
        found: list[Any] = []
        for number, exchange in enumerate((from_all, from_some, from_all)):
            if failing.get(rank) == number:
                raise ds_lena.UnsupportedError(f"rank {rank} failed before exchange {number}")
            groups = (everything, alone) if exchange is from_some else (everything,)
            found.append(exchange(*groups, f"{number} of rank {rank}"))
        if failing.get(rank) == 3:
            raise ds_lena.UnsupportedError(f"rank {rank} failed before exchange 3")
        return tuple(found)

    try:
        message = repr(together(everything, action))
    except ds_lena.UnsupportedError as error:
        message = str(error)
    return message, together(everything, lambda: from_all(everything, rank))


@pytest.mark.parametrize("number", range(4))
def test_an_error_before_any_exchange_is_the_error_of_all_ranks(ranks: Ranks, number: int) -> None:
    for failing in ({1: number}, {0: number}):
        (rank,) = failing
        assert ranks.run(exchanged, failing) == [(f"rank {rank} failed before exchange {number}", [0, 1])] * 2


def test_of_two_errors_all_ranks_raise_the_first(ranks: Ranks) -> None:
    assert ranks.run(exchanged, {0: 1, 1: 1}) == [("rank 0 failed before exchange 1", [0, 1])] * 2
    assert ranks.run(exchanged, {0: 2, 1: 1}) == [("rank 1 failed before exchange 1", [0, 1])] * 2


def test_without_an_error_each_exchange_gives_what_its_group_said(ranks: Ranks) -> None:
    for rank, (message, later) in enumerate(ranks.run(exchanged, {})):
        both = [[f"{number} of rank 0", f"{number} of rank 1"] for number in (0, 2)]
        assert message == repr((both[0], [f"1 of rank {rank}"], both[1])) and later == [0, 1]


def refused_on_the_last_stage() -> str:
    """Two stages of two parts. The second stage alone holds a parameter that is refused."""
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    with megatrons_groups(tensor_model_parallel_size=2, pipeline_model_parallel_size=2):
        model = PipelineModule(
            [nn.Linear(4, 4), nn.Linear(4, 4)],
            topology=PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=1),
            loss_fn=nn.MSELoss(),
            partition_method="uniform",
        )
        for name, parameter in model.named_parameters():
            parameter.sequence_parallel = name == "1.bias"
        return refusal(config(1), model)


@pytest.mark.full
def test_an_error_of_one_stage_of_split_layers_is_raised_on_all_ranks(four_ranks: Ranks) -> None:
    first, *others = four_ranks.run(refused_on_the_last_stage)
    assert others == [first] * 3 and first.startswith("UnsupportedError") and '"1.bias"' in first


# -- keys that differ -------------------------------------------------------------------------------------------------


def refusal_of_keys(split: bool, differing: dict[str, Any]) -> str:
    """Rank 1 has these keys, too."""
    given = {"mpu": TwoParts()} if split else {}
    return refusal(config(1, lena=differing if dist.get_rank() == 1 else {}), Net(), **given)


@pytest.mark.parametrize("split", [False, True], ids=["copies", "parts"])
def test_keys_that_differ_are_refused_on_every_rank(ranks: Ranks, split: bool) -> None:
    for key, other, told in [
        ("gain_power", 0.5, "0.85 on rank 0, 0.5 on rank 1"),
        ("layer", "model", "'tensor' on rank 0, 'model' on rank 1"),
        ("exclude", ["left.*"], "() on rank 0, ('left.*',) on rank 1"),
    ]:
        first, second = ranks.run(refusal_of_keys, split, {key: other})
        assert first == second
        assert first.startswith(f'ConfigError: LENA: "{key}" is not the same on all ranks: {told}. Give all ranks the')
    assert ranks.run(refusal_of_keys, split, {"gain_power": 0.85}) == ["", ""]  # given, and the default


@pytest.mark.parametrize("split", [False, True], ids=["copies", "parts"])
def test_a_wrong_key_on_one_rank_is_refused_on_every_rank(ranks: Ranks, split: bool) -> None:
    first, second = ranks.run(refusal_of_keys, split, {"gain_pwer": 0.5})
    assert first == second and 'unknown key "gain_pwer"' in first


def refusal_of_an_optimizer(kind: str, powers: tuple[float, float]) -> str:
    """The ranks' own LENAs, with these values of `gain_power`; a tensor for lr is compared by its value."""
    model, power = Net(), powers[dist.get_rank()]
    keys: dict[str, Any] = LENA | {"lr": torch.tensor(0.01), "gain_power": power}
    if kind == "callable":
        optimizer: Any = lambda parameters: ds_lena.LENA(parameters, **keys)  # noqa: E731
    else:
        optimizer = ds_lena.LENA(model.parameters(), **keys)
    return refusal(without_optimizer(config(1)), model, optimizer=optimizer)


@pytest.mark.parametrize("kind", ["callable", "optimizer"])
def test_keys_of_a_clients_optimizer_are_compared_too(ranks: Ranks, kind: str) -> None:
    first, second = ranks.run(refusal_of_an_optimizer, kind, (0.85, 0.5))
    assert first == second and '"gain_power" is not the same on all ranks' in first
    assert ranks.run(refusal_of_an_optimizer, kind, (0.5, 0.5)) == ["", ""]


def refusals_by_wrap() -> list[str]:
    found = []
    with AsOnGpu(), split_model(case := Case("", stage=None, split="megatron", groups="flat", tensor=2)) as (model, _):
        chunk, optimizer = made(case, model)
        for key, value in (("gain_power", 0.5), ("layer", "model")):
            keys = case.keys | ({key: value} if dist.get_rank() == 1 else {})
            with pytest.raises(ds_lena.ConfigError) as raised:
                wrap(optimizer, chunk, **keys)
            found.append(str(raised.value))
        wrap(optimizer, chunk, **case.keys)
    return found


def test_wrap_compares_the_keys(ranks: Ranks) -> None:
    first, second = ranks.run(refusals_by_wrap)
    assert first == second
    assert '"gain_power" is not the same on all ranks: ' in first[0] and '"layer" is not the same on all' in first[1]


def refusal_of_groups(stage: int, kind: str, differing: dict[str, Any]) -> str:
    """The second of two groups has these options on rank 1, too."""
    model, mine = Net(), differing if dist.get_rank() == 1 else {}
    first, *others = model.parameters()
    groups: list[dict[str, Any]] = [{"params": [first]}, {"params": others, "weight_decay": 0.2} | mine]
    if kind == "json":
        return refusal(config(stage), model, model_parameters=groups)
    return refusal(without_optimizer(config(stage)), model, optimizer=ds_lena.LENA(groups, **LENA))


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_groups_that_differ_are_refused_on_every_rank(ranks: Ranks, stage: int) -> None:
    for kind in ("json", "client"):
        first, second = ranks.run(refusal_of_groups, stage, kind, {"weight_decay": 0.1})
        assert first == second
        told = '"weight_decay" of parameter group 1 is not the same on all ranks: 0.2 on rank 0, 0.1 on rank 1. Give'
        assert told in first
    first, second = ranks.run(refusal_of_groups, stage, "json", {"lena": False})
    assert first == second and 'the ranks of one model disagree on "' in first
    assert ranks.run(refusal_of_groups, stage, "json", {"betas": [0.9, 0.999]}) == ["", ""]  # given, and the default


def test_other_parameters_on_a_rank_are_refused(ranks: Ranks) -> None:
    names = [("a", "b"), ("a",)]
    first, second = ranks.run(members_that_differ, names)
    assert first == second and first.startswith('LENA: rank 1 does not train "b", and another rank does. Give all')
    assert ranks.run(members_that_differ, [("a", "b"), ("b", "a")]) == ["a b", "a b"]


def members_that_differ(names: list[tuple[str, ...]]) -> str:
    mine = [Member(name, 4, left_out=False) for name in names[dist.get_rank()]]
    group = dist.group.WORLD
    try:
        return " ".join(member.name for member in members_of_all(group, False, mine))
    except ds_lena.ConfigError as error:
        return str(error)


def refusal_of_many() -> str:
    """As `require_same_keys` says it for 20 ranks, of which the odd ones have another value."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_world_size", lambda _: 20)
        patch.setattr(dist, "get_process_group_ranks", lambda _: list(range(20)))

        def gather(found: list[Any], mine: Any, group: Any) -> None:
            found[:] = [mine | {'"layer"': "model"} if rank % 2 else mine for rank in range(20)]

        patch.setattr(dist, "all_gather_object", gather)
        with pytest.raises(ds_lena.ConfigError) as raised:
            require_same_keys(None, LenaConfig.from_keys({}).compared())  # type: ignore[arg-type]
    return str(raised.value)


def test_of_many_ranks_some_are_named() -> None:
    assert "'tensor' on 10 ranks (0, 2, 4, 6, 8, 10, 12, 14, …), 'model' on 10 ranks (1, 3," in refusal_of_many()


# -- names that differ ------------------------------------------------------------------------------------------------


class Towers(nn.Module):
    """Two layers. `names`: of the modules."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x.square().mean()


def refusal_of_names(names: tuple[tuple[str, ...], tuple[str, ...]]) -> str:
    return refusal(config(1), Towers(*names[dist.get_rank()]), mpu=TwoParts())


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ((("a", "b"), ("a", "c")), 'Parameter 2 of the optimizer is "b.weight" on tensor-parallel rank 0, and "c.wei'),
        (
            (("a",), ("a", "b")),
            'Parameter 2 of the optimizer is none on tensor-parallel rank 0, and "b.weight" on',
        ),
        (
            (("a", "b"), ("a",)),
            'Parameter 2 of the optimizer is "b.weight" on tensor-parallel rank 0, and none on',
        ),
    ],
)
def test_other_names_on_a_tensor_parallel_rank_are_refused(ranks: Ranks, names: Any, told: str) -> None:
    first, second = ranks.run(refusal_of_names, names)
    assert first == second and first.startswith("ConfigError") and told in first
