"""`ds_lena.report`: one plain dict, the same on every rank, from what a user has at hand, without a collective."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ds_lena
from benchmarks.footprint import Collectives
from tests.integrations._engines import config, engine, stock_engine, train
from tests.integrations._ranks import Ranks

PLAIN = {dict, str, int, float, bool}


def types_in(value: Any) -> set[type]:
    inside = [types_in(key) | types_in(entry) for key, entry in value.items()] if isinstance(value, dict) else []
    return {type(value)}.union(*inside)


def reports_of(stage: int, precision: str) -> dict[str, dict[str, Any]]:
    with engine(config(stage, precision)) as made:
        fresh = ds_lena.report(made)
        train(made, range(3))
        return {
            "fresh": fresh,
            "engine": ds_lena.report(made),
            "wrapper": ds_lena.report(made.optimizer),
            "LENA": ds_lena.report(made.basic_optimizer),
        }


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "bf16-fp32"), (2, "fp32"), (3, "bf16")])
def test_it_is_the_same_from_everything_and_on_every_rank(ranks: Ranks, stage: int, precision: str) -> None:
    first, second = ranks.run(reports_of, stage, precision)
    assert first == second
    assert first["engine"] == first["wrapper"] == first["LENA"]
    assert first["engine"]["update"] == 3


def test_before_the_first_update_gains_are_1_and_nothing_is_known(ranks: Ranks) -> None:
    fresh = ranks.run(reports_of, 2, "fp32")[0]["fresh"]
    assert (fresh["update"], fresh["gain"], fresh["skipped"], fresh["nonfinite"]) == (0, 1.0, 0, 0)
    assert {(layer["gain"], layer["state"]) for layer in fresh["layers"].values()} == {(1.0, 0.0)}


def test_it_holds_plain_python_only(ranks: Ranks) -> None:
    for report in ranks.run(reports_of, 2, "fp32")[0].values():
        assert types_in(report) <= PLAIN
        assert json.loads(json.dumps(report)) == report


def report_on_rank_0_only() -> tuple[dict[str, Any] | None, list[str]]:
    """The report on rank 0, and the collectives until both ranks have met again."""
    with engine(config(2)) as made:
        train(made, range(2))
        with Collectives() as calls:
            report = ds_lena.report(made) if torch.distributed.get_rank() == 0 else None
        torch.distributed.barrier()
        return report, calls.names


def test_one_rank_alone_may_ask(ranks: Ranks) -> None:
    (report, calls), (nothing, _) = ranks.run(report_on_rank_0_only)
    assert report is not None and report["update"] == 2
    assert nothing is None and calls == []


def report_is_a_copy() -> bool:
    with engine(config(2)) as made:
        train(made, range(2))
        wanted = ds_lena.report(made)
        ds_lena.report(made)["layers"].clear()
        return ds_lena.report(made) == wanted


def test_changing_it_changes_nothing(ranks: Ranks) -> None:
    assert ranks.run(report_is_a_copy) == [True, True]


def report_of_adamw() -> str:
    with stock_engine(config(2)) as made:
        try:
            ds_lena.report(made)
        except ds_lena.StateError as error:
            return str(error)
    return ""


def test_an_engine_without_lena_is_named(ranks: Ranks) -> None:
    for message in ranks.run(report_of_adamw):
        assert "no LENA optimizer in DeepSpeedEngine" in message


def test_a_trainer_can_be_asked(hf_run: Callable[[str], list[dict[str, Any]]]) -> None:
    for run in hf_run("no scheduler"):
        assert run["report"] == run["report of engine"]
        assert "transformer.h.0.attn.c_attn.weight" in run["report"]["layers"]


def test_what_accelerate_prepared_can_be_asked(hf_run: Callable[[str], list[dict[str, Any]]]) -> None:
    first, second = hf_run("accelerate")
    assert first["report"] == first["report of optimizer"] == second["report"]
