"""The examples train, stop where they should, and go on after an interruption as if there had been none."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integrations._programs import EXAMPLES, accelerate, launch, python, started
from tests.integrations._ranks import WORLD

UPDATES, SAVED_EVERY = 12, 2
PATIENCE = 300.0  # seconds until a run has written its first checkpoint

SCRIPTS = {"gpt": "pretrain_gpt.py", "bert": "pretrain_bert.py"}
CONFIGS = {"gpt": "ds_lena_zero2.json", "bert": "ds_lena_bert_zero2.json"}
STREAM = ("--streaming", "--held_out_texts", "20", "--sample_texts", "60", "--shuffle_texts", "30")


def write_texts(path: Path, paragraphs: int = 120) -> Path:
    """Paragraphs of words that repeat, so that there is something to learn."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(60)]
    lines = (" ".join(draw.choices(words, k=draw.randint(20, 60))) for _ in range(paragraphs))
    path.write_text("\n\n".join(lines) + "\n")
    return path


def options(texts: Path, folder: Path, *more: str) -> list[str]:
    small = ["--model_size", "tiny", "--vocab_size", "300", "--sequence_length", "32"]
    batch = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    times = ["--max_steps", str(UPDATES), "--logging_steps", "1", "--eval_steps", "6", "--save_steps", str(SAVED_EVERY)]
    return [*small, *batch, *times, "--use_cpu", "--dataset", str(texts), "--output_dir", str(folder), *more]


def command(model: str, texts: Path, folder: Path, *more: str) -> list[str]:
    config = ["--deepspeed", str(EXAMPLES / CONFIGS[model])]
    return [str(EXAMPLES / SCRIPTS[model]), *config, *options(texts, folder, *more)]


def load(file: Path) -> Any:
    return json.loads(file.read_text())


def history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts; what the data libraries keep of them goes there too."""
    folder = tmp_path_factory.mktemp("examples")
    write_texts(folder / "texts.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        yield folder


# -- what a run leaves, and how it goes on -----------------------------------------------------------------------------


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
                accelerate(EXAMPLES / "accelerate_zero2.yaml", str(EXAMPLES / SCRIPTS[model]), *arguments)
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
    assert load(folder / "results.json") == load(wanted / "results.json")
    assert history(folder) == history(wanted)
    assert (folder / "model.safetensors").read_bytes() == (wanted / "model.safetensors").read_bytes()


# -- targets and presets -----------------------------------------------------------------------------------------------


def test_a_target_ends_the_run_at_the_first_evaluation_that_reaches_it(workshop: Path) -> None:
    """With the options spelled with dashes, in one process, with a rival of LENA."""
    folder = workshop / "target"
    arguments = command("gpt", workshop / "texts.txt", folder, "--target-loss", "5.5", "--optimizer-preset", "adamw")
    python(*arguments, "--eval_steps", "1")
    results, records = load(folder / "results.json"), history(folder)
    reached = results["target"]["reached_at"]
    held_out = [record["eval_loss"] for record in records if "eval_loss" in record]
    assert 1 <= reached == results["updates"] < UPDATES
    assert held_out[-1] <= 5.5 < min(held_out[:-1])
    assert (results["optimizer"], results["preset"]) == ("AdamW", "adamw") and "lena" not in results
