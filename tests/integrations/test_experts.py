"""Layers of `deepspeed.moe`: what is refused with them, their checkpoints, and what stock DeepSpeed does wrong."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_lena
from benchmarks.footprint import Collectives
from ds_lena.integrations.deepspeed._internals import SEEN_WITH
from ds_lena.integrations.deepspeed._internals.facts import read_facts
from ds_lena.integrations.deepspeed.axes.expert import require_one_order
from ds_lena.integrations.deepspeed.support import REFUSED
from tests.helpers.grids import one_grid
from tests.integrations._engines import LENA, config, engine, refusal, without_optimizer
from tests.integrations._ranks import WORLD, Ranks
from tests.integrations._truth import numbers

EXPERTS = 4
HERE = "moe.deepspeed_moe.experts.deepspeed_experts"


class Mixture(nn.Module):
    """`model(x)` is the loss."""

    def __init__(self, ep_size: int = WORLD) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(torch.distributed.get_rank() if ep_size > 1 else 0)
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
            self.moe = MoE(8, nn.Linear(8, 8), EXPERTS, ep_size, drop_tokens=False, use_rts=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x.to(self.first.weight.dtype)))
        out, aux, _ = self.moe(x)
        return (self.last(x + 4 * out) - 1).square().mean().float() + 0.01 * aux


def train(made: Any, updates: range) -> None:
    rank = torch.distributed.get_rank()
    for update in updates:
        for micro in range(2):
            made.backward(made(numbers(update, micro, rank, shape=(6, 8))))
            made.step()


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """As a user makes them for a client optimizer."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    return split({"params": list(model.parameters()), "name": "all"})


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(stage: int, precision: str, ep_size: int, clipping: float, **lena: Any) -> str:
    with one_grid():
        return refusal(config(stage, precision, lena=lena, gradient_clipping=clipping), Mixture(ep_size))


def test_the_authors_code_is_refused(ranks: Ranks) -> None:
    first, second = ranks.run(refused, 2, "fp32", WORLD, 0.0, variant="authors-code", smoothing=None)
    assert first == second and '"variant": "authors-code" in a model with experts' in first
    assert 'Nearest supported choice: "variant": "default"' in first


@pytest.mark.parametrize(("precision", "ep_size"), [("fp32", WORLD), ("bf16", 1)])
def test_trust_ratios_with_clipping_at_zero_0_are_refused(ranks: Ranks, precision: str, ep_size: int) -> None:
    first, second = ranks.run(refused, 0, precision, ep_size, 1.0, base="lamb")
    assert first == second and "in a model with experts, at ZeRO 0" in first and "Use ZeRO 1" in first


@pytest.mark.parametrize(
    ("stage", "precision", "ep_size", "base", "clipping"),
    [(0, "fp32", 1, "lamb", 1.0), (0, "bf16", WORLD, "lamb", 0.0), (0, "fp32", WORLD, "adamw", 1.0)],
)
def test_other_models_with_experts_are_welcome(
    ranks: Ranks, stage: int, precision: str, ep_size: int, base: str, clipping: float
) -> None:
    assert ranks.run(refused, stage, precision, ep_size, clipping, base=base) == ["", ""]


class TwoRanksWide:
    """An mpu as Megatron's, of one tensor-parallel group."""

    def __init__(self) -> None:
        self.all, *alone = [torch.distributed.new_group(r) for r in ([0, 1], [0], [1])]
        self.own = alone[torch.distributed.get_rank()]

    def __getattr__(self, name: str) -> Any:
        group = self.own if "data" in name or "pipe" in name else self.all
        ask = {"rank": torch.distributed.get_rank, "size": torch.distributed.get_world_size}.get(name.split("_")[-1])
        return lambda: group if ask is None else ask(group)


def pipelined_experts() -> nn.Module:
    from deepspeed.moe.layer import MoE
    from deepspeed.pipe import PipelineModule

    class Layer(MoE):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0]

    return PipelineModule(
        [Layer(8, nn.Linear(8, 8)), Layer(8, nn.Linear(8, 8))], num_stages=WORLD, loss_fn=nn.MSELoss()
    )


def refusal_with(axis: str) -> str:
    with one_grid():
        if axis == "pipeline":
            return refusal(config(1), pipelined_experts())
        if axis == "sequence":
            return refusal(config(1, sequence_parallel_size=WORLD, data_parallel_size=1), Mixture(1))
        return refusal(config(1), Mixture(1), mpu=TwoRanksWide())


@pytest.mark.parametrize("axis", ["tensor", "pipeline", "sequence"])
def test_experts_with_another_axis_are_refused(ranks: Ranks, axis: str) -> None:
    first, second = ranks.run(refusal_with, axis)
    assert first == second and first.startswith("UnsupportedError: ")
    assert "LENA does not support layers of deepspeed.moe with tensor, pipeline or sequence parallelism" in first


def not_contiguous(stage: int) -> str:
    with one_grid():
        return refusal(config(stage, zero={"contiguous_gradients": False}), Mixture())


def test_gradients_that_are_not_contiguous_are_refused(ranks: Ranks) -> None:
    first, second = ranks.run(not_contiguous, 1)
    assert first == second and '"contiguous_gradients": false' in first
    assert ranks.run(not_contiguous, 0) == ["", ""]


def refusal_of_a_foreign_expert() -> str:
    with one_grid():
        model = Mixture()
        model.last.weight.allreduce, model.last.weight.group_name = False, f"ep_size_{WORLD}"
        return refusal(config(0), model)


def test_an_expert_that_is_in_no_layer_of_deepspeed_is_refused(ranks: Ranks) -> None:
    first, second = ranks.run(refusal_of_a_foreign_expert)
    assert first == second and '"last.weight" is marked as an expert' in first


def refusal_of_orders(apart: bool) -> str:
    rank = torch.distributed.get_rank()
    try:
        require_one_order(torch.distributed.group.WORLD, [1, 2] if rank == 0 or not apart else [2, 1])
    except ds_lena.ConfigError as error:
        return str(error)
    return ""


def test_groups_of_experts_in_another_order_on_another_rank_are_refused(ranks: Ranks) -> None:
    first, second = ranks.run(refusal_of_orders, True)
    assert first == second and "[[1, 2], [2, 1]]" in first and "PYTHONHASHSEED" in first
    assert ranks.run(refusal_of_orders, False) == ["", ""]


# -- what LENA does ----------------------------------------------------------------------------------------------------


def collectives(stage: int, base: str, lena: bool) -> Counter[str]:
    with one_grid():
        model = Mixture()
        entries = without_optimizer(config(stage), zero_allow_untested_optimizer=True)
        given = groups(model)
        optimizer = ds_lena.LENA(given, base=base, **LENA) if lena else torch.optim.AdamW(given, lr=LENA["lr"])
        with engine(entries, model, optimizer=optimizer) as made:
            train(made, range(2))
            with Collectives() as calls:
                train(made, range(2, 4))
            return Counter(calls.names)


@pytest.mark.parametrize(("stage", "base", "more"), [(0, "adamw", 1), (2, "adamw", 1), (2, "lamb", 2)])
def test_an_update_has_one_more_all_reduce_than_adamws(ranks: Ranks, stage: int, base: str, more: int) -> None:
    both = (ranks.run(collectives, stage, base, lena) for lena in (True, False))
    for ours, stock in zip(*both, strict=True):
        assert ours - stock == {"allreduce_": 2 * more}
        assert not stock - ours


def one_pass() -> Any:
    """A report after updates of one backward pass per rank: each expert has one micro-gradient, and no noise."""
    with one_grid(), engine(config(2, gradient_accumulation_steps=1), Mixture()) as made:
        train(made, range(2))
        return ds_lena.report(made)


def test_an_expert_with_one_micro_gradient_has_no_value(ranks: Ranks) -> None:
    first, second = ranks.run(one_pass)
    assert first == second and first["n"] == WORLD
    names = {f"{HERE}.{number}.{kind}" for number in range(EXPERTS) for kind in ("weight", "bias")}
    assert names < set(first["layers"])
    for name, layer in first["layers"].items():
        assert (layer["noise"] == layer["signal"] == 0) == (name in names)
        assert layer["gain"] == 1 or name not in names


def resumed(stage: int, precision: str, folder: Path) -> tuple[Any, list[Tensor], Any, list[Tensor]]:
    """Reports and weights of a run that goes on, and of one that starts from its checkpoint."""

    def end(made: Any) -> tuple[Any, list[Tensor]]:
        train(made, range(2, 4))
        return ds_lena.report(made), [p.detach().clone() for p in made.module.parameters()]

    with one_grid():
        with engine(config(stage, precision), Mixture()) as made:
            train(made, range(2))
            made.save_checkpoint(folder)
            ours = end(made)
        with engine(config(stage, precision), Mixture()) as made:
            train(made, range(1))
            made.load_checkpoint(folder)
            return (*ours, *end(made))


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16-fp32"), (2, "fp32")])
def test_a_resumed_run_is_the_unbroken_run(ranks: Ranks, tmp_path: Path, stage: int, precision: str) -> None:
    reports = []
    for report, weights, again, weights_again in ranks.run(resumed, stage, precision, tmp_path):
        assert report == again
        assert all(map(torch.equal, weights, weights_again))
        reports.append(report)
    assert reports[0] == reports[1]


# -- what DeepSpeed does -----------------------------------------------------------------------------------------------


def clipped_way(stage: int, precision: str) -> float:
    """How far an update of stock SGD moves the whole model, in terms of the length that gradients are clipped to."""
    with one_grid():
        model = Mixture()
        entries = config(stage, precision, gradient_clipping=0.1, zero_allow_untested_optimizer=True)
        optimizer = torch.optim.SGD(groups(model), lr=100.0)
        with engine(without_optimizer(entries), model, optimizer=optimizer) as made:
            before = [p.detach().double() for p in made.module.parameters()]
            train(made, range(1))
            squares = torch.zeros(2, dtype=torch.float64)  # of dense parameters, of experts
            for p, start in zip(made.module.parameters(), before, strict=True):
                squares[int(hasattr(p, "group_name"))] += (p.double() - start).square().sum()
            torch.distributed.all_reduce(squares[1:])
            return float(squares.sum().sqrt()) / (100.0 * 0.1)


def test_at_zero_0_gradients_are_clipped_by_another_norm_than_the_models(ranks: Ranks) -> None:
    assert ranks.run(clipped_way, 2, "fp32") == pytest.approx([1.0, 1.0], rel=1e-3)
    for precision in ("fp32", "bf16"):
        assert all(way > 1.02 for way in ranks.run(clipped_way, 0, precision)), f"seen with DeepSpeed {SEEN_WITH}"


def ways_of_experts(contiguous: bool) -> list[Tensor]:
    """How stock SGD moves the experts of this rank in one update at ZeRO 1."""
    with one_grid():
        model = Mixture()
        entries = without_optimizer(
            config(1, zero={"contiguous_gradients": contiguous}), zero_allow_untested_optimizer=True
        )
        before = [p.detach().clone() for p in model.moe.deepspeed_moe.experts.parameters()]
        with engine(entries, model, optimizer=torch.optim.SGD(groups(model), lr=0.1)) as made:
            train(made, range(1))
            after = made.module.moe.deepspeed_moe.experts.parameters()
            return [p.detach() - start for p, start in zip(after, before, strict=True)]


def test_gradients_that_are_not_contiguous_are_those_of_other_experts_too(ranks: Ranks) -> None:
    right, mixed = (ranks.run(ways_of_experts, contiguous) for contiguous in (True, False))
    for one, other, wrong, wrong_other in zip(*right, *mixed, strict=True):
        assert not torch.allclose(one, other)
        torch.testing.assert_close(wrong, one + other, msg=f"seen with DeepSpeed {SEEN_WITH}")
        torch.testing.assert_close(wrong, wrong_other)


class Name(str):
    """With a hash of its own."""

    place = 0

    def __hash__(self) -> int:
        return self.place


def test_the_order_of_the_groups_of_experts_is_that_of_a_hash() -> None:
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    orders = set()
    for places in ((1, 2), (2, 1)):
        parameters = [nn.Parameter(torch.zeros(1)) for _ in places]
        for parameter, name, place in zip(parameters, ("ep_size_1", "ep_size_2"), places, strict=True):
            parameter.allreduce, parameter.group_name = False, Name(name)
            parameter.group_name.place = place
        orders.add(tuple(group["name"] for group in split({"params": parameters, "name": "all"}) if "moe" in group))
    assert len(orders) == 2, f"seen with DeepSpeed {SEEN_WITH}"


def at_zero_3() -> str:
    with one_grid():
        try:
            with engine(config(3), Mixture()):
                return ""
        except AssertionError as error:
            return str(error)


def test_deepspeed_itself_refuses_its_layers_at_zero_3(ranks: Ranks) -> None:
    for message in ranks.run(at_zero_3):
        assert "Native DeepSpeed MoE is not supported with ZeRO Stage 3" in message


def auto_ep(named: bool) -> tuple[str, list[str]]:
    """How an engine with AutoEP ends, and what LENA would refuse if it started."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4))
    entries = config(2, expert_parallel={"enabled": True, "autoep_size": WORLD, "preset_model": "mixtral"})
    with one_grid():
        try:
            with engine(entries if named else without_optimizer(entries), model):
                told = ""
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
        torch.distributed.barrier()
        with engine(config(2), Mixture()) as made:
            made._config.expert_parallel_config.enabled = True
            facts = read_facts(made)
    return told, [feature.what for feature in REFUSED if feature.is_on(facts)]


def test_auto_ep_does_not_start(ranks: Ranks) -> None:
    for told, names in ranks.run(auto_ep, True):
        assert told.startswith("TypeError"), f"seen with DeepSpeed {SEEN_WITH}: {told}"
        assert names == ["AutoEP: the entry expert_parallel"]
