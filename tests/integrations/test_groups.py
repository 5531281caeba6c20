"""Parameters and groups of unusual form under an engine: right, or one clear error on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_lena
from tests.integrations._engines import LENA, Net, config, engine, moved, refusal, said, train, without_optimizer
from tests.integrations._ranks import Ranks


def weights_of(engine: Any) -> list[Tensor]:
    """The model's weights, the frozen ones too. Every rank calls it."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return [parameter.detach().clone() for parameter in engine.module.parameters()]


def sliced(model: Net) -> Net:
    """The model with weights that are columns of wider matrices."""
    for layer in (model.left[0], model.right[-1]):
        wide = torch.cat([layer.weight.detach(), torch.ones_like(layer.weight)], dim=1)
        layer.weight = nn.Parameter(wide[:, : layer.weight.shape[1]])
    return model


def columns(stage: int, precision: str, base: str) -> bool:
    """Whether a model with weights of columns trains as the same model with whole matrices does."""
    results = []
    for model in (Net(), sliced(Net())):
        with engine(config(stage, precision, {"base": base}), model) as made:
            train(made, range(3))
            results.append(weights_of(made))
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("base", ["adamw", "lars"])
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "fp32"), (3, "fp32")])
def test_parameters_with_gaps_in_memory(ranks: Ranks, stage: int, precision: str, base: str) -> None:
    assert ranks.run(columns, stage, precision, base) == [True] * 2


# -- groups as they are at the step -----------------------------------------------------------------------------------


def in_groups(model: Net, with_empty: bool) -> list[dict[str, Any]]:
    towers = [
        {"params": list(tower.parameters()), "lr": lr} for tower, lr in ((model.left, 0.005), (model.right, 0.01))
    ]
    return [{"params": []}, *towers] if with_empty else towers


def with_an_empty_group(stage: int, base: str, client: bool) -> tuple[bool, list[str]]:
    """Whether an empty first group changes nothing, and what was said."""
    results = []
    with said() as messages:
        for with_empty in (True, False):
            model, keys = Net(), LENA | {"base": base}
            groups = in_groups(model, with_empty)
            entries = config(stage, lena=keys)
            if client:
                made = engine(without_optimizer(entries), model, optimizer=ds_lena.LENA(groups, **keys))
            else:
                made = engine(entries, model, model_parameters=groups)
            with made as running:
                train(running, range(3))
                results.append((moved(running), ds_lena.report(running)))
    (weights, report), (wanted, wanted_report) = results
    return report == wanted_report and all(torch.equal(a, b) for a, b in zip(weights, wanted, strict=True)), messages


@pytest.mark.parametrize(
    ("stage", "base", "client"), [(0, "lars", False), (1, "lamb", True), (1, "adamw", False), (3, "lamb", False)]
)
def test_an_empty_group_changes_nothing(ranks: Ranks, stage: int, base: str, client: bool) -> None:
    assert ranks.run(with_an_empty_group, stage, base, client) == [(True, [])] * 2


def changed_before_initialize(stage: int, precision: str, frozen_at_construction: bool) -> tuple[bool, list[str]]:
    """Whether a client LENA trains as one made after a weight was frozen or unfrozen, and the layers of its report."""
    results = []
    for is_late in (True, False):
        model = Net()
        weight = model.left[0].weight
        weight.requires_grad_(not frozen_at_construction)
        optimizer = ds_lena.LENA(model.named_parameters(), **LENA)
        weight.requires_grad_(frozen_at_construction)
        if not is_late:
            optimizer = ds_lena.LENA(model.named_parameters(), **LENA)
        with engine(without_optimizer(config(stage, precision)), model, optimizer=optimizer) as made:
            train(made, range(3))
            results.append((weights_of(made), ds_lena.report(made)))
    (weights, report), (wanted, wanted_report) = results
    is_same = report == wanted_report and all(torch.equal(a, b) for a, b in zip(weights, wanted, strict=True))
    return is_same, list(report["layers"])


@pytest.mark.parametrize("frozen_at_construction", [True, False])
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (1, "bf16-fp32"), (3, "fp32")])
def test_a_weight_may_be_frozen_or_unfrozen_until_initialize(
    ranks: Ranks, stage: int, precision: str, frozen_at_construction: bool
) -> None:
    for is_same, layers in ranks.run(changed_before_initialize, stage, precision, frozen_at_construction):
        assert is_same
        assert ("left.0.weight" in layers) == frozen_at_construction


def given_twice(stage: int) -> str:
    model = Net()
    optimizer = ds_lena.LENA(model.parameters(), **LENA)
    with engine(without_optimizer(config(stage)), model, optimizer=optimizer) as made:
        train(made, range(1))
    return refusal(without_optimizer(config(stage)), Net(), optimizer=optimizer)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_an_optimizer_of_an_engine_before_is_refused(ranks: Ranks, stage: int) -> None:
    for message in ranks.run(given_twice, stage):
        assert message.startswith("StateError") and "Make a new LENA for the new engine" in message


def unfrozen_later(stage: int) -> tuple[list[str], bool]:
    """What was said, and whether the parameter that was unfrozen after initialize has moved."""
    model = Net()
    model.left[0].bias.requires_grad_(False)
    start = model.left[0].bias.detach().clone()
    with said() as messages, engine(config(stage), model) as made:
        train(made, range(1))
        model.left[0].bias.requires_grad_(True)
        try:
            train(made, range(1, 3))
        except ds_lena.StateError as error:
            messages.append(str(error))
        return messages, bool((model.left[0].bias != start).any())


@pytest.mark.parametrize(("stage", "ending"), [(0, "is not now. To train it"), (1, "This engine does not train it")])
def test_a_weight_that_is_unfrozen_after_initialize_is_refused_or_told(ranks: Ranks, stage: int, ending: str) -> None:
    messages, has_moved = ranks.run(unfrozen_later, stage)[0]
    assert len(messages) == 1 and not has_moved
    assert '"left.0.bias" was frozen at deepspeed.initialize' in messages[0] and ending in messages[0]


# -- what the engine says of the run ----------------------------------------------------------------------------------


def clipped_by(folder: str, stage: int, precision: str, base: str) -> bool:
    """Whether a run saved with one bound and resumed with another goes on by the bound that DeepSpeed takes then."""
    entries = {clip: config(stage, precision, {"base": base}, gradient_clipping=clip) for clip in (0.05, 5.0)}
    with engine(entries[0.05]) as first:
        train(first, range(2))
        first.save_checkpoint(folder, tag="saved")
    weights = []
    for clip in (0.05, 5.0):
        with engine(entries[clip], Net(seed=1)) as made:
            made.load_checkpoint(folder, tag="saved")
            train(made, range(2, 4))
            weights.append(moved(made))
    return all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("base", ["lars", "lamb"])
@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (1, "bf16-fp32"), (2, "fp32")])
def test_trust_ratios_use_the_bound_that_deepspeed_clips_by(
    ranks: Ranks, tmp_path: Path, stage: int, precision: str, base: str
) -> None:
    """A checkpoint of ZeRO 1 and 2 brings its own."""
    assert ranks.run(clipped_by, str(tmp_path), stage, precision, base) == [True] * 2


def planned(total_num_steps: float) -> float | str:
    scheduler = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 2, "total_num_steps": total_num_steps}}
    try:
        with engine(config(1, lena={"total_steps": None}, scheduler=scheduler)) as made:
            train(made, range(1))
            return made.basic_optimizer.state_dict()["lena"]["total_steps"]
    except ds_lena.LenaError as error:
        return str(error)


def test_the_length_of_a_schedule_may_be_written_as_a_float(ranks: Ranks) -> None:
    assert ranks.run(planned, 1e2) == [100, 100]
