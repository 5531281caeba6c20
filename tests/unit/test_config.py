"""Every key of the JSON entry: its default, what is accepted, and what is refused with which words."""

import dataclasses
import inspect
import math
import re

import numpy as np
import pytest
import torch

from ds_lena import LENA, ConfigError
from ds_lena.config import LenaConfig, check_group
from ds_lena.keys import KEYS, bases_of
from tests.unit.support import config, weights

NAN, INF = math.nan, math.inf
NOT_NUMBERS = [NAN, INF, -INF, True, "0.5", "auto", [0.5], {}]

DEFAULTS = {
    "lr": 1e-3, "base": "adamw", "weight_decay": 0.01, "betas": (0.9, 0.999), "eps": 1e-8,
    "momentum": 0.9, "nesterov": False, "trust_coefficient": None, "trust_clip": None,
    "layer": "tensor", "scaling": "gain", "gain_power": 0.85, "max_relative_gain": 4.0, "max_factor": None,
    "smoothing": None, "base_batch_size": None, "micro_batch_size": None,
    "warmup": "layer", "warmup_fraction": 0.05, "warmup_cap": 0.25, "total_steps": None,
    "exclude": (), "no_decay": (), "nonfinite": "skip", "variant": "default",
}  # fmt: skip

OF_THE_BASE = ("weight_decay", "gain_power")
"""Keys whose null is a number of the base rule's."""

GOOD = {
    "lr": [1, 1e-9, 3e-4],
    "base": ["adamw", "sgd"],
    "weight_decay": [None, 0, 0.1, 1],
    "betas": [[0, 0], [0.9, 0.95], (0.8, 0.99)],
    "eps": [0, 1e-6],
    "momentum": [0, 0.9],
    "nesterov": [True, False],
    "layer": ["tensor", "module", "block", "model"],
    "scaling": ["gain", "linear", "sqrt", "none"],
    "gain_power": [None, 0.5, 1, 2],
    "max_relative_gain": [None, 1, 3.5],
    "max_factor": [None, 1, 100],
    "smoothing": [None, 0, 0.99],
    "base_batch_size": [None, 0.5, 32],
    "micro_batch_size": [None, 1, 4.0],
    "warmup": ["layer", "fixed", "none"],
    "warmup_fraction": [1e-3, 0.1, 1],
    "warmup_cap": [None, 0.05, 1],
    "total_steps": [None, 1, 1e5],
    "exclude": [[], ["*.bias"], ("a", "b")],
    "no_decay": [[], ["*.bias"]],
    "nonfinite": ["skip", "warn"],
    "variant": ["default", "authors-code"],
}

BAD = {
    "lr": [*NOT_NUMBERS, None, 0, -1],
    "base": ["adam", "AdamW", "auto", None, 1, ["sgd"]],
    "weight_decay": [*NOT_NUMBERS, -0.1],
    "betas": [0.9, [0.9], [0.9, 0.99, 0.999], [0.9, 1], [-0.1, 0.9], [0.9, NAN], [0.9, "0.999"], [0.9, True], "auto"],
    "eps": [*NOT_NUMBERS, -1e-8],
    "momentum": [*NOT_NUMBERS, 1, -0.1],
    "nesterov": [0, 1, "true", "auto"],
    "trust_coefficient": [*NOT_NUMBERS, 0, -1],
    "trust_clip": [1, [1], [2, 1], [-1, 1], [0, NAN], [0, INF], "auto", "01"],
    "layer": ["tensors", "auto", None, 1, True],
    "scaling": ["adascale", "auto", None, 1],
    "gain_power": [*NOT_NUMBERS, 0, -1],
    "max_relative_gain": [*NOT_NUMBERS, 0.99, 0],
    "max_factor": [*NOT_NUMBERS, 0.99, -2],
    "smoothing": [*[x for x in NOT_NUMBERS if x != "0.5"], 1, -0.1, "0.9"],
    "base_batch_size": [*NOT_NUMBERS, 0, -8],
    "micro_batch_size": [*NOT_NUMBERS, 0, -8, 2.5],
    "warmup": ["linear", "auto", None, True, 0],
    "warmup_fraction": [*NOT_NUMBERS, None, 0, -0.1, 1.01],
    "warmup_cap": [*NOT_NUMBERS, 0, 1.01, -0.5],
    "total_steps": [*NOT_NUMBERS, 0, -10, 10.5, "1000"],
    "exclude": ["*.bias", None, "auto", [1], [""], [None], {}],
    "no_decay": ["*.bias", None, "auto", [1], [""]],
    "nonfinite": ["apply", True, None],
    "variant": ["authors", "auto", None],
}  # fmt: skip

SUITS_ONLY = {"momentum": "sgd", "nesterov": "sgd"}


def pairs(table):
    return [pytest.param(key, value, id=f"{key}={value!r}") for key, values in table.items() for value in values]


def with_base(key, value):
    base = {"base": SUITS_ONLY[key]} if key in SUITS_ONLY else {}
    return base | {key: value}


def as_stored(value):
    return tuple(value) if isinstance(value, list) else value


def test_this_file_knows_every_key():
    assert set(DEFAULTS) == set(KEYS) == set(BAD)
    assert set(GOOD) == set(KEYS) - {"trust_coefficient", "trust_clip"}, "keys of base rules that are not there yet"


@pytest.mark.parametrize(("key", "value"), DEFAULTS.items(), ids=DEFAULTS)
def test_default(key, value):
    assert getattr(config(), key) == value


@pytest.mark.parametrize(("key", "value"), pairs(GOOD))
def test_good_value(key, value):
    expected = DEFAULTS[key] if key in OF_THE_BASE and value is None else as_stored(value)
    assert getattr(config(**with_base(key, value)), key) == expected


@pytest.mark.parametrize(("key", "value"), pairs(BAD))
def test_a_bad_value_is_refused_with_the_key_the_value_and_what_is_allowed(key, value):
    with pytest.raises(ConfigError) as refused:
        config(**with_base(key, value))
    message = str(refused.value)
    assert f'"{key}"' in message
    assert repr(value) in message
    assert KEYS[key].allowed in message


@pytest.mark.parametrize("value", [np.array([0.9, 0.99]), torch.tensor([0.9, 0.99])], ids=["array", "tensor"])
def test_an_array_is_refused_as_any_other_wrong_type(value):
    with pytest.raises(ConfigError, match="two numbers"):
        config(betas=value)


@pytest.mark.parametrize("key", ["total_steps", "micro_batch_size"])
def test_whole_numbers_are_stored_as_integers(key):
    assert isinstance(getattr(config(**{key: 100.0}), key), int)


@pytest.mark.parametrize(
    ("base", "decay", "power"), [("adamw", 0.01, 0.85), ("sgd", 0.0, 1.0), ("lars", 0.0, 1.0), ("lamb", 0.01, 0.85)]
)
def test_a_null_weight_decay_or_gain_power_is_that_of_the_base_rule(base, decay, power):
    nulls = config(base=base, weight_decay=None, gain_power=None)
    assert config(base=base).weight_decay == nulls.weight_decay == decay
    assert config(base=base).gain_power == nulls.gain_power == power


@pytest.mark.parametrize(("value", "hint"), [("0.001", "without quotes"), ("auto", "HF Trainer"), ("fast", None)])
def test_text_in_place_of_a_number_gets_a_hint(value, hint):
    with pytest.raises(ConfigError) as refused:
        config(lr=value)
    hints = {known for known in ("without quotes", "HF Trainer") if known in str(refused.value)}
    assert hints == ({hint} if hint else set())


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("warmup_frac", "warmup_fraction"), ("weightdecay", "weight_decay"), ("beta", "betas"), ("layers", "layer"),
     ("max_gain", "max_relative_gain"), ("total_step", "total_steps"), ("LR", "lr"),
     ("learning_rate", None), ("amsgrad", None)],
)  # fmt: skip
def test_an_unknown_key_is_refused_with_the_nearest_known_one(wrong, nearest):
    with pytest.raises(ConfigError) as refused:
        config(**{wrong: 7})
    message = str(refused.value)
    assert f'"{wrong}"' in message
    assert "7" in message
    assert all(key in message for key in KEYS)
    found = re.search(r'Did you mean "(\w+)"', message)
    assert (found and found[1]) == nearest


@pytest.mark.parametrize(
    ("base", "key", "value"),
    [("adamw", "momentum", 0.9), ("adamw", "nesterov", False), ("sgd", "betas", [0.9, 0.99]), ("sgd", "eps", 1e-8),
     ("adamw", "trust_coefficient", 1e-3), ("sgd", "trust_clip", [0, 1])],
)  # fmt: skip
def test_a_key_of_another_base_rule_is_refused(base, key, value):
    with pytest.raises(ConfigError, match=rf'"{key}" belongs to .* but "base" is "{base}"'):
        config(base=base, **{key: value})


@pytest.mark.parametrize("key", [key for key in KEYS if bases_of(key)])
@pytest.mark.parametrize("base", ["adamw", "sgd"])
def test_a_null_for_a_key_of_any_base_rule_counts_as_not_given(base, key):
    assert getattr(config(base=base, **{key: None}), key) == DEFAULTS[key]


# -- keys that depend on each other -----------------------------------------------------------------------------------


def test_the_cap_follows_a_longer_warm_up_where_it_is_not_given():
    assert config(warmup_fraction=0.4).warmup_cap == 0.4
    assert config(warmup_fraction=0.1).warmup_cap == 0.25


def test_a_cap_below_the_warm_up_fraction_is_refused():
    with pytest.raises(ConfigError, match=r'"warmup_cap": 0\.1 is below "warmup_fraction": 0\.2'):
        config(warmup_fraction=0.2, warmup_cap=0.1)


def test_no_cap_is_possible_with_any_warm_up_fraction():
    assert config(warmup_fraction=0.8, warmup_cap=None).warmup_cap is None


def test_nesterov_needs_momentum():
    with pytest.raises(ConfigError, match=r'"nesterov": true needs "momentum" > 0'):
        config(base="sgd", nesterov=True, momentum=0)


@pytest.mark.parametrize(
    ("key", "value"),
    [("scaling", "linear"), ("gain_power", 0.5), ("max_factor", 4), ("base_batch_size", 8), ("smoothing", 0.9),
     ("max_relative_gain", 2.0), ("warmup_cap", 0.25), ("warmup", "fixed")],
)  # fmt: skip
def test_the_authors_code_has_no_keys_of_ours(key, value):
    with pytest.raises(ConfigError, match=rf'"authors-code" has (no )?"{key}"'):
        config(variant="authors-code", **{key: value})


@pytest.mark.parametrize("key", ["max_relative_gain", "warmup_cap", "smoothing", "max_factor", "gain_power"])
def test_a_null_is_what_the_authors_code_has(key):
    assert config(variant="authors-code", **{key: None}).variant == "authors-code"


# -- the object, and parameter groups ---------------------------------------------------------------------------------


def test_a_configuration_never_changes():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().lr = 1


def test_the_user_s_dictionary_is_left_as_it_is():
    keys = {"betas": [0.9, 0.99], "weight_decay": None, "warmup_fraction": 0.5}
    LenaConfig.from_keys(keys)
    assert keys == {"betas": [0.9, 0.99], "weight_decay": None, "warmup_fraction": 0.5}


@pytest.mark.parametrize(
    ("key", "value"),
    [("lr", -1), ("lr", "0.1"), ("lr", NAN), ("lr", True), ("weight_decay", -1), ("betas", [0.9]), ("eps", -1),
     ("lena", 0), ("lena", "false"), ("lena", None)],
)  # fmt: skip
def test_a_bad_value_in_a_parameter_group_is_refused(key, value):
    with pytest.raises(ConfigError) as refused:
        check_group({key: value}, config())
    assert f'"{key}": {value!r}' in str(refused.value)


@pytest.mark.parametrize(
    "group",
    [{"lr": 0}, {"lr": 0.5, "weight_decay": 0}, {"lena": False}, {"name": "head", "initial_lr": "mine"}],
    ids=str,
)  # fmt: skip
def test_a_good_parameter_group_is_accepted(group):
    check_group(group, config())


@pytest.mark.parametrize("group", [{"momentum": 0.5}, {"gain_power": 0.5}, {"exclude": ["*"]}], ids=str)
def test_a_key_that_a_group_cannot_have_is_refused(group):
    with pytest.raises(ConfigError, match=r"not a key of a group.*lr, weight_decay, betas, eps"):
        check_group(group, config())


@pytest.mark.parametrize("lr", [torch.tensor(-1.0), torch.tensor(math.nan), torch.ones(2)], ids=str)
def test_a_tensor_learning_rate_of_a_group_is_checked_as_a_number(lr):
    with pytest.raises(ConfigError, match='a parameter group has "lr"'):
        check_group({"lr": lr}, config())


# -- as arguments of the class ----------------------------------------------------------------------------------------

ARGUMENTS = inspect.signature(LENA).parameters


def test_the_arguments_of_the_class_are_the_keys_with_their_defaults():
    keys = {name: argument.default for name, argument in ARGUMENTS.items() if name not in ("params", "process_group")}
    assert keys == {name: key.default for name, key in KEYS.items()}
    assert list(keys) == list(KEYS)


@pytest.mark.parametrize("name", KEYS)
def test_an_argument_allows_null_where_the_key_does(name):
    null_is_allowed = KEYS[name].accepts(None) or bool(bases_of(name))
    assert ARGUMENTS[name].annotation.endswith("| None") == null_is_allowed


def test_an_argument_at_its_default_is_given_all_the_same():
    with pytest.raises(ConfigError, match='"betas" belongs to'):
        LENA(weights(2), base="sgd", betas=(0.9, 0.999))


def test_the_learning_rate_may_stand_second_as_in_torch():
    assert LENA(weights(2), 0.5).param_groups[0]["lr"] == 0.5
    with pytest.raises(ConfigError, match='"lr": 0 is not allowed'):
        LENA(weights(2), 0)
