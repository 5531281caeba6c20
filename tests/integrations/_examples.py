"""The examples on a small text: their command lines, and what a run leaves."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.integrations._programs import EXAMPLES, SCRIPTS, python

UPDATES, SAVED_EVERY = 8, 2
PROGRAMS = {"gpt": "pretrain_gpt.py", "bert": "pretrain_bert.py"}
CONFIGS = {"gpt": EXAMPLES / "ds_lena_zero2.json", "bert": EXAMPLES / "ds_lena_bert_zero2.json"}
STREAM = ("--streaming", "--held_out_texts", "20", "--sample_texts", "60", "--shuffle_texts", "30")


def write_texts(path: Path, paragraphs: int = 120) -> Path:
    """Paragraphs of words that repeat, so that there is something to learn."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(60)]
    lines = (" ".join(draw.choices(words, k=draw.randint(20, 60))) for _ in range(paragraphs))
    path.write_text("\n\n".join(lines) + "\n")
    return path


def options(texts: Path | str, folder: Path, *more: str) -> list[str]:
    small = ["--model_size", "tiny", "--sequence_length", "32"]
    if "--tokenizer" not in more:
        small += ["--vocab_size", "300"]
    batch = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    times = ["--max_steps", str(UPDATES), "--logging_steps", "1", "--eval_steps", "4", "--save_steps", str(SAVED_EVERY)]
    return [*small, *batch, *times, "--use_cpu", "--dataset", str(texts), "--output_dir", str(folder), *more]


def command(model: str, texts: Path, folder: Path, *more: str) -> list[str]:
    return [
        str(EXAMPLES / PROGRAMS[model]),
        *("--deepspeed", str(CONFIGS[model])),
        *options(texts, folder, *more),
    ]


def in_turn(cases: list[tuple[str, list[str]]], folder: Path) -> list[dict[str, Any]]:
    """For each (script, arguments): its exit "code" and what it "said". All run in one process, as its only rank."""
    asked, answered = folder / "cases.json", folder / "answers.json"
    asked.write_text(json.dumps(cases))
    python(str(SCRIPTS / "examples_in_turn.py"), str(asked), str(answered))
    return load(answered)


def load(file: Path) -> Any:
    return json.loads(file.read_text())


def history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
