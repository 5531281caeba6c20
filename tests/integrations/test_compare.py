"""The comparison as it is used: tiny studies, killed on the way and gone on with, tables and pictures."""

import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from optuna.trial import TrialState

from examples.compare.__main__ import main
from examples.compare.plan import read
from examples.compare.runs import Runs, stages

ROOT = Path(__file__).parents[2]
OPTIONS = ["--studies", "studies.py", "--results", "results"]
STUDIES = """
from optuna.distributions import CategoricalDistribution, FloatDistribution
from examples.compare.images import Images
from examples.compare.language import Language
from examples.compare.plan import Method, Study

SMALL = {"layers": 1, "width": 16, "heads": 2, "sequence_length": 16, "blocks_per_micro_batch": 2}
LENGTH = {"micro_batches": 16, "evaluations": 4, "settings": {"weight_decay": 0.1, "clip": 1.0}}
WORDS = Language(name="words", architecture="modernbert", evaluation_blocks=16, **SMALL, **LENGTH)
IMAGES = Images(name="images", width=4, depths=(1, 1), rows_per_micro_batch=8, **LENGTH)
SPACE = {"lr": FloatDistribution(0.001, 0.01, log=True), "beta2": CategoricalDistribution([0.95, 0.99])}
TOO_FAST = Method("too-fast", "adamw", {"lr": 1e30})
GROWS = Method("grows-1", "adamw", {"growth_factor": 1})
SGD = Method("lena-sgd", "lena", {"base": "sgd", "lr": 0.02})
WORDS_1 = Study(name="words-1", task=WORDS, n=1, methods=(Method("single", "adamw", {}, SPACE),), trials=3, seeds=(1,))
STUDIES = [
    WORDS_1,
    Study(
        name="words-4", task=WORDS, n=4, base=WORDS_1, methods=(Method("lena", "lena"), TOO_FAST, GROWS), seeds=(1, 2),
        picture=True,
    ),
    Study(name="images-4", task=IMAGES, n=4, methods=(SGD,), seeds=(1,)),
]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With the studies, and random images."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "studies.py").write_text(STUDIES)
    random = np.random.default_rng(0)
    for name, rows in (("train", 50_016), ("t10k", 64)):
        for kind, header, size in (("images-idx3", 16, 784), ("labels-idx1", 8, 1)):
            values = random.integers(0, 10, rows * size, dtype=np.uint8)
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(bytes(header) + values.tobytes(), 1))
    return folder


@pytest.fixture(autouse=True)
def environment(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    monkeypatch.setenv("FASHION_MNIST", str(folder))


def compare(monkeypatch, *arguments: str) -> None:
    """The command, in this process; its runs are in processes of their own."""
    monkeypatch.setattr(sys, "argv", ["compare", *OPTIONS, *arguments])
    main()


def test_killed_studies_go_on_and_every_run_is_there_once(monkeypatch, capfd):
    command = [sys.executable, "-m", "examples.compare", *OPTIONS, "run", "words-4"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert running.stdout.readline() == "10 runs to go\n"
    ended = [running.stdout.readline()]
    running.kill()
    ended += running.stdout.readlines()  # until its workers are gone, too
    journal = Path("results/words-1.jsonl")
    journal.write_text(journal.read_text() + '{"op_code": 4, "worker')

    compare(monkeypatch, "run")
    assert f"{11 - len(ended)} runs to go" in capfd.readouterr().out
    studies, runs = read(Path("studies.py")), Runs(Path("results"))
    found = {(stage.study.name, stage.name): runs.of(stage) for stage in stages(studies.values())}
    assert {name: [run.user_attrs.get("seed", 0) for run in own] for name, own in found.items()} == {
        ("words-1", "single/trials"): [0, 0, 0],
        ("words-1", "single/seeds"): [1],
        ("words-4", "lena/seeds"): [1, 2],
        ("words-4", "too-fast/seeds"): [1, 2],
        ("words-4", "grows-1/seeds"): [1, 2],
        ("images-4", "lena-sgd/seeds"): [1],
    }
    for (_, name), own in found.items():
        for run in own:
            assert {"commit", "versions", "seconds"} <= run.user_attrs.keys()
            assert run.state is (TrialState.PRUNED if "too-fast" in name else TrialState.COMPLETE)
            if "too-fast" not in name:
                assert run.value == run.intermediate_values[max(run.intermediate_values)]
                assert len(run.intermediate_values) == (1 if "trials" in name else 4)
    chosen = min(found["words-1", "single/trials"], key=lambda run: run.value).params
    for run in found["words-4", "grows-1/seeds"]:
        batches = run.user_attrs["batches"]
        assert batches[0][0] == 2 and sum(size * updates for size, updates in batches) == 16
        assert max(run.intermediate_values) == sum(updates for _, updates in batches)
    for stage in stages([studies["words-4"]])[1:3]:
        assert {key: runs.settings(stage)[key] for key in ("lr", "beta2")} == chosen
        runs.check(stage)
    assert "model" in found["words-4", "lena/seeds"][0].user_attrs["gains"][0][1]

    before = journal.read_bytes()
    compare(monkeypatch, "run")
    assert "0 runs to go" in capfd.readouterr().out and journal.read_bytes() == before


def test_the_report_has_tables_and_pictures(monkeypatch):
    compare(monkeypatch, "report")
    text = Path("results/tables.md").read_text()
    assert "## words-4: words, n = 4" in text and "| lena |" in text and "| lena-sgd |" in text
    assert "| too-fast | 2 of 2 diverged |" in text
    assert "| grows | ×1 | 8 ± 0 |" in Path("results/front.md").read_text()
    drawn = {path.name for path in Path("results").glob("*.svg")}
    assert drawn == {"words-4.svg", "words-4-gains.svg", "words-front.svg"}


def test_two_commands_do_not_write_the_same_results(monkeypatch):
    with FileLock("results/.lock"), pytest.raises(SystemExit, match="another process is running studies"):
        compare(monkeypatch, "run")


def test_what_cannot_be_run_is_refused(monkeypatch):
    with pytest.raises(SystemExit, match="no study is called word-4; there are words-1, words-4, images-4"):
        compare(monkeypatch, "run", "word-4")
    with pytest.raises(SystemExit, match="--workers is 0"):
        compare(monkeypatch, "run", "--workers", "0")
