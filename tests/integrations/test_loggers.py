"""LENA's numbers in what users already look at: HF Trainer's logs, and DeepSpeed's own monitors."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ds_lena
from ds_lena.integrations.deepspeed import write_layers
from tests.integrations._engines import MICRO_BATCH, config, engine, train
from tests.integrations._ranks import WORLD, Ranks

HfRun = Callable[[str], list[dict[str, Any]]]
MODEL = {"lena/gain", "lena/noise_scale", "lena/warmup"}
UPDATES = 3


def named(log: dict[str, Any]) -> set[str]:
    return {name for name in log if name.startswith("lena/")}


def test_a_reporter_that_was_there_before_gets_the_model_s_numbers_with_every_loss(hf_run: HfRun) -> None:
    for rank in hf_run("scheduler"):
        with_loss = [log for log in rank["logs"] if "loss" in log]
        assert len(with_loss) == rank["updates"]
        assert all({"lena/gain", "lena/warmup"} <= named(log) <= MODEL for log in with_loss)
        assert with_loss[-1]["lena/gain"] == rank["report"]["gain"]
        assert not any(named(log) for log in rank["logs"] if "loss" not in log)


def test_the_trainer_s_history_has_them_too(hf_run: HfRun) -> None:
    for rank in hf_run("scheduler"):
        history, logs = ([record for record in rank[kind] if "loss" in record] for kind in ("history", "logs"))
        assert [record["lena/gain"] for record in history] == [log["lena/gain"] for log in logs]


def test_layers_come_when_they_are_asked_for(hf_run: HfRun) -> None:
    for rank in hf_run("logged"):
        last = [log for log in rank["logs"] if "loss" in log][-1]
        for name, layer in rank["report"]["layers"].items():
            assert last[f"lena/layers/{name}/gain"] == layer["gain"]


def test_without_the_callback_nothing_is_added(hf_run: HfRun) -> None:
    assert not any(named(log) for rank in hf_run("no scheduler") for log in rank["logs"])


def monitored(folder: str, enabled: bool) -> dict[str, Any]:
    """LENA's report after some updates with DeepSpeed's CSV monitor, which gets the layers' numbers at the end."""
    entries = config(2, csv_monitor={"enabled": enabled, "output_path": folder, "job_name": "run"})
    with engine(entries) as made:
        train(made, range(UPDATES))
        write_layers(made)
        return ds_lena.report(made)


def columns(folder: Path) -> dict[str, list[list[str]]]:
    return {file.stem: list(csv.reader(file.open())) for file in folder.rglob("*.csv")}


def test_deepspeed_s_monitor_gets_the_model_s_numbers_after_every_update(ranks: Ranks, tmp_path: Path) -> None:
    report = ranks.run(monitored, str(tmp_path), True)[0]
    found = columns(tmp_path)
    (gain,) = [rows for name, rows in found.items() if name.endswith("lena_gain") and "layers" not in name]
    samples = [int(row[0]) for row in gain[1:]]
    per_update = MICRO_BATCH * 2 * WORLD
    assert samples == [per_update * update for update in range(1, UPDATES + 1)]
    assert float(gain[-1][1]) == pytest.approx(report["gain"])
    assert any("lena_warmup" in name for name in found)


def test_layers_are_written_on_demand(ranks: Ranks, tmp_path: Path) -> None:
    report = ranks.run(monitored, str(tmp_path), True)[0]
    found = columns(tmp_path)
    for name in report["layers"]:
        assert any(file.endswith(f"layers_{name}_gain") for file in found), sorted(found)


def test_a_monitor_that_is_off_gets_nothing(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(monitored, str(tmp_path), False)
    assert columns(tmp_path) == {}
