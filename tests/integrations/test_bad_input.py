"""Keys and values that are not allowed: one clear error from deepspeed.initialize, on every rank, and nothing hangs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import ds_lena
from tests.integrations._engines import LENA, Net, config, refusal, without_optimizer
from tests.integrations._ranks import Ranks

WRONG: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "an unknown key": ({"gain_powr": 0.5}, ('unknown key "gain_powr"', "0.5", 'Did you mean "gain_power"?')),
    "a key of torch's AdamW that LENA lacks": ({"amsgrad": True}, ('unknown key "amsgrad"', "Known keys: base, ")),
    "a number written as text": ({"lr": "1e-3"}, ('"lr"', "'1e-3'", "a number > 0", "without quotes")),
    "a list where a number belongs": ({"eps": [1e-8]}, ('"eps"', "[1e-08]", "a number >= 0")),
    "a truth value where a number belongs": ({"gain_power": True}, ('"gain_power"', "True", "a number > 0")),
    "a number that is too large": ({"warmup_fraction": 1.5}, ('"warmup_fraction"', "1.5", "(0, 1]")),
    "a number that is too small": ({"max_relative_gain": 0.5}, ('"max_relative_gain"', "0.5", "a number >= 1")),
    "a part of an update": ({"total_steps": 10.5}, ('"total_steps"', "10.5", "a whole number of updates")),
    "a word that is no choice": (
        {"layer": "tensors"},
        ('"layer"', "'tensors'", '"tensor", "module", "block"'),
    ),
    "an auto that nobody fills": ({"warmup_cap": "auto"}, ('"warmup_cap"', '"auto"', "write null")),
    "a key of another base": ({"momentum": 0.9}, ('"momentum"', "sgd", '"base" is "adamw"')),
    "a cap below the fraction": ({"warmup_fraction": 0.3, "warmup_cap": 0.2}, ("0.2", '"warmup_fraction": 0.3')),
    "a base that does not exist": ({"base": "adam"}, ('"base"', "'adam'", '"adamw", "sgd", "lars", "lamb"')),
    "a trust ratio without a rule that has one": (
        {"trust_coefficient": 0.01},
        ('"trust_coefficient"', "lars and lamb", '"base" is "adamw"'),
    ),
    "a length that nobody knows": ({"total_steps": None}, ('"total_steps"', "total_num_steps", '"warmup": "none"')),
    "another micro-batch than DeepSpeed's": (
        {"micro_batch_size": 3},
        ('"micro_batch_size": 3', '"train_micro_batch_size_per_gpu": 2'),
    ),
}


def refusal_of_keys(stage: int, keys: dict[str, Any], **more: Any) -> str:
    return refusal(config(stage, lena=keys, **more))


@pytest.mark.parametrize("wrong", WRONG)
def test_every_rank_is_told_what_is_wrong_and_what_is_allowed(ranks: Ranks, wrong: str) -> None:
    keys, words = WRONG[wrong]
    for message in ranks.run(refusal_of_keys, 2, keys):
        assert message.startswith("ConfigError: LENA: ")
        assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_length_of_a_run_is_asked_for_at_every_stage(ranks: Ranks, stage: int) -> None:
    for message in ranks.run(refusal_of_keys, stage, {"total_steps": None}):
        assert '"total_steps" is not known' in message


def test_a_scheduler_without_an_end_does_not_know_the_length(ranks: Ranks) -> None:
    for message in ranks.run(refusal_of_keys, 2, {"total_steps": None}, scheduler={"type": "WarmupLR", "params": {}}):
        assert '"total_steps" is not known' in message


def test_a_run_without_warm_up_needs_no_length(ranks: Ranks) -> None:
    assert ranks.run(refusal_of_keys, 2, {"total_steps": None, "warmup": "none"}) == ["", ""]


def test_the_same_micro_batch_as_deepspeeds_is_welcome(ranks: Ranks) -> None:
    assert ranks.run(refusal_of_keys, 2, {"micro_batch_size": 2}) == ["", ""]


def refusal_of_group(entry: dict[str, Any]) -> str:
    model = Net()
    groups = [{"params": model.left.parameters()}, {"params": model.right.parameters(), **entry}]
    return refusal(config(2), model, model_parameters=groups)


@pytest.mark.parametrize(
    ("entry", "words"),
    [({"lr": -1.0}, '"lr": -1.0'), ({"lena": "no"}, "\"lena\": 'no'"), ({"betas": (0.9, 1.0)}, '"betas": (0.9, 1.0)')],
)
def test_the_values_of_parameter_groups_are_checked_too(ranks: Ranks, entry: dict[str, Any], words: str) -> None:
    for message in ranks.run(refusal_of_group, entry):
        assert message.startswith("ConfigError: LENA: a parameter group has ") and words in message


def refusal_of_client(keys: dict[str, Any]) -> str:
    model = Net()
    optimizer = ds_lena.LENA(model.parameters(), **(LENA | keys))
    return refusal(without_optimizer(config(2)), model, optimizer=optimizer)


def test_a_client_optimizer_is_asked_for_the_length_by_the_engine(ranks: Ranks) -> None:
    for message in ranks.run(refusal_of_client, {"total_steps": None}):
        assert '"total_steps" is not known' in message


def refusal_by_hf_trainer(given: int | None, planned: int) -> str:
    """Of a Trainer that plans so many updates."""
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    entries = HfTrainerDeepSpeedConfig(config(2, lena={"total_steps": given}))
    try:
        entries.trainer_config_finalize(SimpleNamespace(get_warmup_steps=lambda updates: 0), Net(), planned)
    except ds_lena.ConfigError as error:
        return str(error)
    return ""


def test_another_length_than_the_trainers_is_refused_before_there_is_an_engine(ranks: Ranks) -> None:
    for message in ranks.run(refusal_by_hf_trainer, 20, 12):
        assert '"total_steps": 20' in message and "HF Trainer plans 12 updates" in message and "Leave" in message


@pytest.mark.parametrize("given", [None, 12])
def test_the_trainers_length_or_none_is_welcome(ranks: Ranks, given: int | None) -> None:
    assert ranks.run(refusal_by_hf_trainer, given, 12) == ["", ""]


def test_an_evaluation_without_training_has_no_length_to_contradict(ranks: Ranks) -> None:
    assert ranks.run(refusal_by_hf_trainer, 20, 0) == ["", ""]
