"""The examples train, under either launcher, and go on after an interruption as if there had been none."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integrations._examples import PROGRAMS, SAVED_EVERY, STREAM, UPDATES, command, history, load, options
from tests.integrations._programs import EXAMPLES, accelerate, launch, started
from tests.integrations._ranks import WORLD

PATIENCE = 300.0  # seconds until a run has written its first checkpoint


def press_ctrl_c(launcher: psutil.Process) -> None:
    os.killpg(launcher.pid, signal.SIGINT)


def kill_a_rank(launcher: psutil.Process) -> None:
    ranks = [process for process in launcher.children(recursive=True) if "--local_rank=1" in process.cmdline()]
    ranks[0].kill()


def interrupt(how: Callable[[psutil.Process], None], arguments: list[str], folder: Path) -> None:
    """Start a run, and end it once it has written its first checkpoint."""
    first = folder / f"checkpoint-{SAVED_EVERY}" / "trainer_state.json"
    with started(*arguments) as process:
        deadline = time.monotonic() + PATIENCE
        while not first.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        how(psutil.Process(process.pid))
        assert process.wait(timeout=60) != 0
    assert first.exists()


RUNS = {
    "gpt": (press_ctrl_c, ("--dropout", "0.1")),
    "bert": (kill_a_rank, ("--dropout", "0.1", *STREAM)),
}


@pytest.fixture(scope="module")
def unbroken(workshop: Path) -> Callable[[str], Path]:
    """The folder of a run that nobody interrupts: of GPT-2 under `accelerate launch`, of BERT from a stream."""
    made: dict[str, Path] = {}

    def run(model: str) -> Path:
        if model not in made:
            made[model] = workshop / f"{model}-unbroken"
            arguments = options(workshop / "texts.txt", made[model], *RUNS[model][1])
            if model == "gpt":
                accelerate(EXAMPLES / "accelerate_zero2.yaml", str(EXAMPLES / PROGRAMS[model]), *arguments)
            else:
                launch(*command(model, workshop / "texts.txt", made[model], *RUNS[model][1]))
        return made[model]

    return run


@pytest.mark.parametrize("model", RUNS)
def test_a_run_learns_with_lena_and_leaves_its_results(unbroken: Callable[[str], Path], model: str) -> None:
    folder = unbroken(model)
    results = load(folder / "results.json")
    assert (results["optimizer"], results["ranks"], results["updates"]) == ("LENA", WORLD, UPDATES)
    assert results["lena"]["n"] == 2 * WORLD
    losses = results["losses"]
    assert losses["held_out_end"] < losses["held_out_before"] - 0.3
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    assert [record["update"] for record in history(folder) if "loss" in record] == list(range(1, UPDATES + 1))


def test_the_trainers_logs_have_the_gains(unbroken: Callable[[str], Path]) -> None:
    state = load(unbroken("gpt") / f"checkpoint-{UPDATES}" / "trainer_state.json")
    logged = [log for log in state["log_history"] if "loss" in log]
    assert len(logged) == UPDATES and all(log["lena/gain"] >= 1 for log in logged)


def without_speed(results: dict[str, Any]) -> dict[str, Any]:
    assert results["tokens_per_second"] > 0
    return {key: value for key, value in results.items() if key != "tokens_per_second"}


@pytest.mark.parametrize("model", RUNS)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    unbroken: Callable[[str], Path], workshop: Path, model: str
) -> None:
    """Bit for bit, dropout and masks included: the weights, the losses and the report of every update."""
    how, more = RUNS[model]
    folder, wanted = workshop / f"{model}-interrupted", unbroken(model)
    arguments = command(model, workshop / "texts.txt", folder, *more)
    interrupt(how, arguments, folder)
    assert not (folder / "results.json").exists(), "it was over before it was interrupted"
    launch(*arguments, "--resume_from_checkpoint", "latest")
    assert without_speed(load(folder / "results.json")) == without_speed(load(wanted / "results.json"))
    assert history(folder) == history(wanted)
    assert (folder / "model.safetensors").read_bytes() == (wanted / "model.safetensors").read_bytes()
