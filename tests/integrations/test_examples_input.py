"""What the examples are told on the command line: what cannot be is said in one line; the rest is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integrations._examples import (
    CONFIGS,
    PROGRAMS,
    STREAM,
    UPDATES,
    history,
    in_turn,
    load,
    options,
    write_texts,
)

Case = tuple[str, list[str], tuple[str, ...]]
"""Which example, what is added to an ordinary command line (PLACE stands for the folder), words of the answer."""

AUTO = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
BATCH = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}


def config(**more: Any) -> list[str]:
    """`--deepspeed` with the text of a config; `more` are keys of LENA's."""
    entry = {"type": "LENA", "params": AUTO | more}
    return ["--deepspeed", json.dumps({"zero_optimization": {"stage": 2}, "optimizer": entry} | BATCH)]


GOAL = ["--target-loss", "5.1", "--eval_steps", "1", "--save_steps", "1"]
DROPOUT = ["--dropout", "0.1"]
ADASCALE = ["--deepspeed", str(CONFIGS["gpt"]), "--optimizer-preset", "adascale"]
LATEST = ["--resume_from_checkpoint", "latest"]
PLAIN, RIVAL = ["--output_dir", "PLACE/plain"], ["--output_dir", "PLACE/rival"]
"""The folders of runs that are there already."""

GOOD: dict[str, list[str]] = {
    "plain": GOAL,
    "again": [*GOAL, *PLAIN, *LATEST],
    "whole": DROPOUT,
    "resumed": [*DROPOUT, "--resume_from_checkpoint", "PLACE/whole/checkpoint-4"],
    "rival": [*GOAL, *ADASCALE],
}
"""Runs of GPT-2, before the bad ones; after one with DeepSpeed the process cannot train again."""

BAD: dict[str, Case] = {
    # options that the DeepSpeed config would ignore
    "betas without a key": (
        "gpt",
        [*config(), "--adam_beta1", "0.8", "--optimizer-preset", "lars"],
        ("--adam_beta1 0.8", "ignored", "optimizer.params.betas"),
    ),
    "a clipping without a key": (
        "gpt",
        [*config(), "--max_grad_norm", "0.5"],
        ("--max_grad_norm 0.5", "ignored", '"gradient_clipping"', '"auto"'),
    ),
    "an accumulation without a key": (
        "gpt",
        ["--deepspeed", '{"zero_optimization": {"stage": 2}}'],
        ("--gradient_accumulation_steps 2", "ignored"),
    ),
    "an optimizer beside the config's": ("gpt", [*config(), "--optim", "adafactor"], ("adafactor", "ignored", "LENA")),
    "a warm-up on LENA's": ("bert", [*config(), "--warmup-steps", "3"], ("--warmup_steps 3", '"warmup": "none"')),
    # what cannot be read
    "no DeepSpeed config there": ("gpt", ["--deepspeed", "PLACE/none.json"], ("none.json", "No such file")),
    "a DeepSpeed config that is no JSON": (
        "gpt",
        ["--deepspeed", "PLACE/texts.txt"],
        ("DeepSpeed config", "texts.txt"),
    ),
    "a preset without DeepSpeed": (
        "gpt",
        ["--optimizer-preset", "lars"],
        ("--optimizer-preset is for DeepSpeed", "--deepspeed FILE"),
    ),
    "an unknown preset": ("gpt", ["--optimizer-preset", "adam"], ("adam", "adascale", "lena-lamb")),
    "arguments that HF refuses": ("gpt", ["--fp16", "--bf16"], ("fp16 and bf16",)),
    # data
    "a single text": ("gpt", ["--dataset", "PLACE/lines.txt"], ("lines.txt", "train set will be empty")),
    "less than an update": (
        "gpt",
        ["--gradient_accumulation_steps", "2000"],
        ("the training text fills", "takes 4000"),
    ),
    "a stream with nothing to train on": (
        "gpt",
        [*STREAM, "--held_out_texts", "5000"],
        ("training text fills 0 blocks",),
    ),
    "a stream with many readers": ("gpt", [*STREAM, "--dataloader_num_workers", "2"], ("--streaming has one reader",)),
    "a stream that is shared out": (
        "bert",
        [*STREAM, "--accelerator_config", '{"dispatch_batches": false}'],
        ("--streaming has one reader", "dispatch_batches"),
    ),
    "no such file": ("gpt", ["--dataset", "PLACE/none.txt"], ("none.txt", "find any data file")),
    "a binary file": ("gpt", ["--dataset", "PLACE/binary.txt"], ("'utf-8' codec", "position 0")),
    "a binary file in a stream": ("bert", ["--dataset", "PLACE/binary.txt", *STREAM], ("binary.txt", "'utf-8' codec")),
    "a wrong hub name, offline": ("gpt", ["--dataset", "nobody/nothing"], ("nobody/nothing", "on the Hub")),
    "no such column": ("gpt", ["--dataset", "PLACE/hub", "--text_column", "body"], ("'body'", "'words'")),
    "no tokenizer there": ("gpt", ["--tokenizer", "nobody/nothing"], ("tokenizer nobody/nothing",)),
    "a tokenizer that ends nothing": ("gpt", ["--tokenizer", "PLACE/tokenizer"], ("no end-of-text token",)),
    # checkpoints
    "nothing to resume from": ("bert", LATEST, ("no complete checkpoint",)),
    "a start where checkpoints are": ("gpt", PLAIN, ("plain holds checkpoint-", "earlier run", "delete")),
    "a checkpoint where others are": (
        "gpt",
        [*PLAIN, *ADASCALE, "--resume_from_checkpoint", "PLACE/rival/checkpoint-1"],
        ("plain holds checkpoint-", "another --output_dir"),
    ),
    "a checkpoint of another run": (
        "gpt",
        [*PLAIN, "--model_size", "mini", "--seed", "7", "--learning_rate", "0.01", *LATEST],
        ('model_size: then "tiny", now "mini"; seed: then 42, now 7; learning_rate: then 0.001, now 0.01. ',),
    ),
    "a checkpoint of another optimizer": (
        "gpt",
        [*config(gain_power=0.5), *RIVAL, *LATEST],
        ("DeepSpeed's optimizer: then", '"gain_power": 1.0', '"gain_power": 0.5'),
    ),
    "a checkpoint of other texts": (
        "bert",
        ["--dataset", "PLACE/more.txt", "--resume_from_checkpoint", "PLACE/plain/checkpoint-1"],
        ('model: then "GPT-2", now "BERT"', "texts.txt", "bytes of local texts: then"),
    ),
}


@pytest.fixture(scope="module")
def answers(workshop: Path) -> dict[str, dict[str, Any]]:
    """What came of every command line, the good ones first: all in one process."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    (workshop / "binary.txt").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    (workshop / "lines.txt").write_text("a line\n" * 1000)
    write_texts(workshop / "more.txt", paragraphs=130)
    (workshop / "hub").mkdir()
    Dataset.from_dict({"words": ["a", "b"]}).to_parquet(workshop / "hub" / "train.parquet")
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(workshop / "tokenizer")
    cases = [("gpt", name, more) for name, more in GOOD.items()]
    cases += [(model, name, more) for name, (model, more, _) in BAD.items()]
    lines = []
    for model, name, more in cases:
        placed = [argument.replace("PLACE", str(workshop)) for argument in more]
        lines.append((PROGRAMS[model], options(workshop / "texts.txt", workshop / name.replace(" ", "-"), *placed)))
    return dict(zip([*GOOD, *BAD], in_turn(lines, workshop), strict=True))


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_said_in_one_line_and_leaves_nothing(
    answers: dict[str, dict[str, Any]], workshop: Path, name: str
) -> None:
    model, _, words = BAD[name]
    answer = answers[name]
    assert answer["code"] == 1, answer["said"]
    assert answer["said"].startswith(f"{PROGRAMS[model]}: error: ") and "\n" not in answer["said"], answer["said"]
    assert [word for word in words if word not in answer["said"]] == [], answer["said"]
    folder = workshop / name.replace(" ", "-")
    assert not folder.exists() or [file for file in folder.rglob("*") if file.is_file()] == []


@pytest.mark.parametrize("name", ["plain", "rival"])
def test_a_target_ends_the_run_at_the_first_evaluation_that_reaches_it(
    answers: dict[str, dict[str, Any]], workshop: Path, name: str
) -> None:
    """Without DeepSpeed, and with a rival of LENA."""
    assert answers[name]["code"] == 0, answers[name]["said"]
    results, records = load(workshop / name / "results.json"), history(workshop / name)
    reached = results["target"]["reached_at"]
    held_out = [record["eval_loss"] for record in records if "eval_loss" in record]
    assert 1 <= reached == results["updates"] < UPDATES
    assert held_out[-1] <= 5.1 < min(held_out[:-1])
    assert results["preset"] == (None if name == "plain" else "adascale")
    assert ("lena" in results) == (name == "rival")


def test_a_run_that_goes_on_from_its_end_trains_no_more(answers: dict[str, dict[str, Any]]) -> None:
    """It was killed between its last checkpoint and its results, say."""
    begun, finished = (answers[name]["said"].partition("\nheld-out loss") for name in ("plain", "again"))
    assert finished[1:] == begun[1:] and finished[1]
    assert "'learning_rate'" in begun[0] and "'learning_rate'" not in finished[0]


def test_a_run_that_was_resumed_comes_to_the_same(answers: dict[str, dict[str, Any]], workshop: Path) -> None:
    """Bit for bit, with dropout, from a checkpoint in the middle."""
    whole, resumed = workshop / "whole", workshop / "resumed"
    assert answers["whole"]["code"] == answers["resumed"]["code"] == 0, answers["resumed"]["said"]
    assert history(resumed) == [record for record in history(whole) if record["update"] > 4]
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
