"""Names of parameters, and which of them make a layer."""

import pytest
import torch
from torch import nn

from ds_lena.layers import (
    LayerTable,
    Member,
    build_table,
    canonical_names,
    layer_name,
    matches,
    named_parameters,
    unmatched_patterns,
)

NAMES = {
    # name: module, block
    "weight": ("root", "root"),
    "embed.weight": ("embed", "embed"),
    "transformer.h.3.weight": ("transformer.h.3", "transformer.h.3"),
    "transformer.h.3.attn.c_proj.bias": ("transformer.h.3.attn.c_proj", "transformer.h.3"),
    "encoder.layers.10.experts.2.up.weight": ("encoder.layers.10.experts.2.up", "encoder.layers.10"),
    "0.weight": ("0", "0"),
    "3.attn.c_proj.weight": ("3.attn.c_proj", "3"),
    "layer1.conv.weight": ("layer1.conv", "layer1.conv"),
    "heads.0": ("heads", "heads"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_s_layer(name):
    module, block = NAMES[name]
    assert layer_name(name, "tensor") == name
    assert layer_name(name, "module") == module
    assert layer_name(name, "block") == block
    assert layer_name(name, "model") == "model"


def test_layers_stand_in_the_order_of_their_first_parameters():
    table = build_table(
        [Member("b.weight", 6, False), Member("a.weight", 4, False), Member("b.bias", 2, False)], "module"
    )
    assert table == LayerTable(names=("b", "a"), numel=(8, 4), of_parameter=(0, 1, 0))


def test_an_excluded_parameter_belongs_to_no_layer():
    table = build_table(
        [Member("a.weight", 6, False), Member("a.bias", 2, True), Member("b.weight", 4, False)], "module"
    )
    assert table == LayerTable(names=("a", "b"), numel=(6, 4), of_parameter=(0, 2, 1))
    assert table.count == 2


def test_a_layer_of_excluded_parameters_alone_is_not_there():
    assert build_table([Member("a.weight", 6, True), Member("b.weight", 4, False)], "tensor").names == ("b.weight",)


def test_a_model_without_trained_parameters_has_no_layers():
    assert build_table([], "model") == LayerTable((), (), ())


# -- names ------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def names(model):
    return [name for name, _ in named_parameters(model)]


def test_a_tied_weight_is_listed_once_under_its_first_name():
    assert names(Tied()) == ["embed.weight"]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: torch.compile(m, backend="eager"),
        lambda m: nn.DataParallel(m),
        lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
        lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
    ],
    ids=["compile", "DataParallel", "DataParallel of compile", "compile of DataParallel"],
)
def test_wrappers_leave_no_trace_in_the_names(wrap):
    assert names(wrap(nn.Sequential(nn.Linear(2, 2)))) == ["0.weight", "0.bias"]


def test_a_compiled_part_of_a_model_leaves_no_trace_in_the_names():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1] = torch.compile(model[1], backend="eager")
    assert names(model) == ["0.weight", "1.weight"]


def test_a_module_that_a_user_called_module_keeps_its_name():
    model = nn.Module()
    model.module = nn.Linear(2, 2, bias=False)
    assert names(model) == ["module.weight"]


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        (["module.a.weight", "module.b.weight"], ["a.weight", "b.weight"]),
        (["module._orig_mod.a.weight", "module._orig_mod.b.weight"], ["a.weight", "b.weight"]),
        (["_orig_mod.module.a.weight"], ["a.weight"]),
        (["module.a.weight", "b.weight"], ["module.a.weight", "b.weight"]),
        (["modules.a"], ["modules.a"]),
        ([], []),
    ],
)
def test_names_that_a_user_passed_lose_those_of_wrappers(given, canonical):
    assert canonical_names(given) == canonical


# -- patterns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "patterns", "found"),
    [
        ("h.0.attn.key.bias", ["*.key.bias"], True),
        ("h.0.attn.key.bias", ["*norm*", "*.bias"], True),
        ("h.0.attn.key.bias", ["key.bias"], False),
        ("h.0.attn.key.bias", ["*.Bias"], False),
        ("h.10.bias", ["h.[0-9].bias"], False),
        ("bias", [], False),
    ],
)
def test_a_pattern_matches_the_whole_name(name, patterns, found):
    assert matches(name, patterns) is found


def test_patterns_that_match_nothing_are_named():
    assert unmatched_patterns(["a.bias", "b.weight"], ["*.bias", "*.biass", "c.*"]) == ["*.biass", "c.*"]
