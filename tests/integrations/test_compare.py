"""The comparison harness as it is used: runs of two tiny studies, interrupted and gone on with, tables and pictures."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
STUDIES = """
tasks:
  words:
    kind: language
    model: {architecture: modernbert, layers: 1, width: 16, heads: 2, initializer_range: 0.07}
    data: {vocab_size: 258, sequence_length: 16, blocks_per_micro_batch: 2, evaluation_blocks: 16}
    micro_batches: 16
    evaluations: 4
    settings: {weight_decay: 0.1, clip: 1.0}
  pictures:
    kind: images
    model: {width: 4, depths: [1, 1]}
    data: {rows_per_micro_batch: 8}
    micro_batches: 16
    evaluations: 2
    settings: {weight_decay: 0.0005}
methods:
  single: {optimizer: adamw, search: {lr: {log: [0.001, 0.01]}, beta2: {choice: [0.95, 0.99]}}}
  lena: {optimizer: lena}
  too-fast: {optimizer: adamw, settings: {lr: 1.0e+30}}
  single-sgd: {optimizer: sgd, settings: {lr: 0.02}}
  lena-sgd: {optimizer: lena, settings: {base: sgd, lr: 0.02}}
studies:
  words-1: {task: words, n: 1, methods: [single], trials: 2, seeds: [1]}
  words-4: {task: words, n: 4, base: words-1, methods: [lena, too-fast], trials: 2, seeds: [1, 2]}
  pictures-1: {task: pictures, n: 1, methods: [single-sgd], seeds: [1]}
  pictures-4: {task: pictures, n: 4, base: pictures-1, methods: [lena-sgd], seeds: [1]}
"""
JOBS = {
    "words-1": ["single/trial-0", "single/trial-1", "single/seed-1"],
    "words-4": ["lena/seed-1", "lena/seed-2", "too-fast/seed-1", "too-fast/seed-2"],
    "pictures-1": ["single-sgd/seed-1"],
    "pictures-4": ["lena-sgd/seed-1"],
}


def compare(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "TORCH_COMPILE_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "FASHION_MNIST": str(folder),
    }
    options = ["--studies", str(folder / "studies.yaml"), "--results", str(folder / "results")]
    command = [sys.executable, "-m", "examples.compare", *options, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def read(folder: Path) -> dict[str, dict[str, dict]]:
    found = {}
    for path in (folder / "results").glob("*.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert len({record["job"] for record in records}) == len(records)  # nothing was run twice
        found[path.stem] = {record["job"]: record for record in records}
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder in which all studies have been run."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "studies.yaml").write_text(STUDIES)
    random = np.random.default_rng(0)
    for name, rows in (("train", 50_016), ("t10k", 64)):
        for kind, header, size in (("images-idx3", 16, 784), ("labels-idx1", 8, 1)):
            values = random.integers(0, 10, rows * size, dtype=np.uint8)
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(bytes(header) + values.tobytes(), 1))
    done = compare(folder, "run")
    assert done.returncode == 0, done.stderr
    return folder


def test_every_run_leaves_one_whole_record(finished):
    records = read(finished)
    assert {study: sorted(jobs) for study, jobs in records.items()} == {s: sorted(jobs) for s, jobs in JOBS.items()}
    for study, jobs in records.items():
        for record in jobs.values():
            assert None not in [loss for _, _, loss in record["curve"]]
            if record["method"] == "too-fast":
                assert record["loss"] is None
                continue
            assert record["loss"] == record["curve"][-1][2] and record["curve"][-1][1] == 16
            assert record["command"] == f"python -m examples.compare run {study}"
    chosen = min((records["words-1"][f"single/trial-{i}"] for i in (0, 1)), key=lambda record: record["loss"])
    for record in (*(records["words-4"][f"lena/seed-{i}"] for i in (1, 2)), records["words-1"]["single/seed-1"]):
        assert {key: record["settings"][key] for key in ("lr", "beta2")} == chosen["tried"]
        assert record["split"] == "test"
    assert "model" in records["words-4"]["lena/seed-1"]["lena"][0][1]


def test_an_interrupted_queue_goes_on_to_the_same_records(finished):
    whole = read(finished)
    path = finished / "results" / "words-1.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:1]) + '{"job": "torn')
    (finished / "results" / "words-4.jsonl").unlink()
    done = compare(finished, "run", "words-4", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert "4 to go" in done.stdout and "pictures" not in done.stdout
    again = read(finished)
    for study in ("words-1", "words-4"):
        for job, record in whole[study].items():
            assert again[study][job]["curve"] == record["curve"], job
            assert again[study][job]["settings"] == record["settings"]


def test_a_command_makes_tables_and_pictures(finished):
    done = compare(finished, "report")
    assert done.returncode == 0, done.stderr
    text = (finished / "results" / "tables.md").read_text()
    assert "## words-4: words, n = 4" in text and "| lena |" in text and "| lena-sgd |" in text
    assert "| too-fast | 2 of 2 diverged |" in text
    for name in ("words-4.png", "words-4-gains.png", "pictures-4.png"):
        assert (finished / "results" / name).stat().st_size > 10_000


def test_two_queues_do_not_write_the_same_records(finished):
    with FileLock(finished / "results" / ".lock"):
        done = compare(finished, "run")
    assert done.returncode == 1 and "another process is running studies" in done.stderr


def test_an_unknown_study_is_refused(tmp_path):
    (tmp_path / "studies.yaml").write_text(STUDIES)
    done = compare(tmp_path, "run", "word-4")
    assert done.returncode == 1
    assert done.stderr.strip().endswith("no study is called word-4; there are words-1, words-4, pictures-1, pictures-4")
