"""BERT from a stream, under `accelerate launch`: it trains, and goes on after a kill as if nothing had happened."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integrations._examples import (
    CONFIGS,
    PROGRAMS,
    SAVED_EVERY,
    STREAM,
    UPDATES,
    command,
    history,
    load,
    options,
)
from tests.integrations._programs import EXAMPLES, accelerate, launch, started
from tests.integrations._ranks import WORLD

PATIENCE = 300.0  # seconds until a run has written its first checkpoint
MORE = ("--dropout", "0.1", *STREAM)


@pytest.fixture(scope="module")
def unbroken(workshop: Path) -> Path:
    """The folder of a run that nobody interrupts."""
    folder = workshop / "unbroken"
    config = ["--deepspeed_config_file", str(CONFIGS["bert"])]
    script = [str(EXAMPLES / PROGRAMS["bert"]), *options(workshop / "texts.txt", folder, *MORE)]
    accelerate(EXAMPLES / "accelerate_zero2.yaml", *config, *script)
    return folder


def test_a_run_learns_with_lena_and_leaves_its_results(unbroken: Path) -> None:
    results = load(unbroken / "results.json")
    assert (results["optimizer"], results["ranks"], results["updates"]) == ("LENA", WORLD, UPDATES)
    assert results["lena"]["n"] == 2 * WORLD
    assert results["losses"]["held_out_end"] < results["losses"]["held_out_before"] - 0.3
    assert (unbroken / "training.png").read_bytes().startswith(b"\x89PNG")
    assert [record["update"] for record in history(unbroken) if "loss" in record] == list(range(1, UPDATES + 1))


def test_the_trainers_logs_have_the_gains(unbroken: Path) -> None:
    state = load(unbroken / f"checkpoint-{UPDATES}" / "trainer_state.json")
    logged = [log for log in state["log_history"] if "loss" in log]
    assert len(logged) == UPDATES and all(log["lena/gain"] >= 1 for log in logged)


def kill_a_rank(arguments: list[str], folder: Path) -> None:
    """Start a run, and kill its second rank once the update after its first checkpoint is over."""
    with started(*arguments) as process:
        deadline = time.monotonic() + PATIENCE
        while updates(folder) <= SAVED_EVERY and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        for child in psutil.Process(process.pid).children(recursive=True):
            if "--local_rank=1" in child.cmdline():
                child.kill()
        assert process.wait(timeout=60) != 0


def updates(folder: Path) -> int:
    """How many updates are in the history so far."""
    file = folder / "history.jsonl"
    return file.read_text().count('"loss"') if file.exists() else 0


def without_speed(results: dict[str, Any]) -> dict[str, Any]:
    assert results["tokens_per_second"] > 0
    return {key: value for key, value in results.items() if key != "tokens_per_second"}


def test_a_killed_run_goes_on_as_if_it_had_not_been(unbroken: Path, workshop: Path) -> None:
    """Bit for bit, dropout, masks and stream included: the weights, the losses and the report of every update."""
    folder = workshop / "killed"
    arguments = command("bert", workshop / "texts.txt", folder, *MORE)
    kill_a_rank(arguments, folder)
    assert not (folder / "results.json").exists(), "it was over before it was killed"
    launch(*arguments, "--resume_from_checkpoint", "latest")
    assert without_speed(load(folder / "results.json")) == without_speed(load(unbroken / "results.json"))
    assert history(folder) == history(unbroken)
    assert (folder / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()
