"""What the examples are told on the command line: what cannot be is said once and leaves nothing; the rest is done."""

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
    command,
    history,
    in_turn,
    load,
    options,
    write_texts,
)
from tests.integrations._programs import attempt

Case = tuple[str, list[str], tuple[str, ...]]
"""Which example, what is added to an ordinary command line (PLACE stands for the folder), words of the answer."""

AUTO = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
BATCH = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}


def config(params: dict[str, Any] | None = None, optimizer: str = "LENA", **more: Any) -> list[str]:
    """`--deepspeed` with the text of a config; `params` are added to those that HF fills."""
    entry = {"type": optimizer, "params": AUTO | (params or {})}
    return ["--deepspeed", json.dumps({"zero_optimization": {"stage": 2}, "optimizer": entry} | BATCH | more)]


def form(**entries: Any) -> list[str]:
    """`--deepspeed` with the text of a config that has these entries and no others."""
    return ["--deepspeed", json.dumps(entries)]


def decay(**params: Any) -> dict[str, Any]:
    return {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_num_steps": "auto"} | params}


GOAL = ["--target-loss", "5.1", "--eval_steps", "1", "--save_steps", "1"]
ADASCALE = ["--deepspeed", str(CONFIGS["gpt"]), "--optimizer-preset", "adascale"]
LATEST = ["--resume_from_checkpoint", "latest"]
PLAIN, RIVAL = ["--output_dir", "PLACE/plain"], ["--output_dir", "PLACE/rival"]
"""The folders of runs that are there already."""

BAD: dict[str, Case] = {
    # HF's arguments against the DeepSpeed config
    "another learning rate": ("gpt", config({"lr": 0.002}), ("optimizer.params.lr is 0.002", "learning_rate 0.001")),
    "other betas": ("gpt", config({"betas": [0.9, 0.95]}), ("params.betas is [0.9, 0.95]", 'Write "auto"')),
    "another accumulation": (
        "gpt",
        config(gradient_accumulation_steps=4),
        ("gradient_accumulation_steps is 4", "gradient_accumulation_steps 2"),
    ),
    "another warm-up": (
        "gpt",
        [*config(optimizer="AdamW", scheduler=decay(warmup_num_steps=5)), "--warmup_steps", "2"],
        ("scheduler.params.warmup_num_steps is 5", "warmup_steps", " 2"),
    ),
    "another length of the schedule": (
        "gpt",
        config(scheduler=decay(total_num_steps=100)),
        ("scheduler.params.total_num_steps is 100", f"max_steps {UPDATES}"),
    ),
    "another length of LENA's": (
        "gpt",
        config({"total_steps": 100}),
        ('"total_steps": 100', f"--max_steps is {UPDATES}"),
    ),
    "a warm-up on LENA's": ("bert", [*config(), "--warmup-steps", "3"], ("--warmup_steps 3", '"warmup": "none"')),
    "an optimizer that nobody would use": ("gpt", [*config(), "--optim", "adafactor"], ("--optim", "ignored", "LENA")),
    "betas that nobody would use": (
        "gpt",
        [*config(), "--adam_beta1", "0.8", "--optimizer-preset", "lars"],
        ("--adam_beta1 0.8", "ignored", '"betas"'),
    ),
    "a clipping that nobody would use": (
        "gpt",
        [*config(), "--max_grad_norm", "0.5"],
        ("--max_grad_norm 0.5", "ignored", '"gradient_clipping": "auto"'),
    ),
    "an accumulation that nobody would use": (
        "gpt",
        ["--deepspeed", '{"zero_optimization": {"stage": 2}}'],
        ("--gradient_accumulation_steps 2", "ignored", '"gradient_accumulation_steps": "auto"'),
    ),
    "an unknown key of LENA": ("gpt", config({"gain_powr": 1}), ('unknown key "gain_powr"', "gain_power")),
    "no DeepSpeed config there": ("gpt", ["--deepspeed", "PLACE/none.json"], ("none.json", "No such file")),
    "a DeepSpeed config that is no JSON": ("gpt", ["--deepspeed", "PLACE/texts.txt"], ("texts.txt", "not JSON")),
    "a preset without DeepSpeed": ("gpt", ["--optimizer-preset", "lars"], ("lars", "--deepspeed FILE")),
    "an unknown preset": ("gpt", ["--optimizer-preset", "adam"], ("adam", "adascale", "lena-lamb")),
    "an unknown option": ("gpt", ["--no_such"], ("--no_such",)),
    "arguments that HF refuses": ("gpt", ["--fp16", "--bf16"], ("fp16 and bf16",)),
    "a target without evaluations": ("bert", ["--target-loss", "3", "--eval_strategy", "no"], ("--eval_strategy",)),
    "no optimizer entry": ("gpt", form(optimizer=["LENA"]), ('"optimizer" is ["LENA"]', "JSON object")),
    "no optimizer entry to swap": (
        "gpt",
        [*form(optimizer=["LENA"]), "--optimizer-preset", "lars"],
        ('"optimizer" is ["LENA"]', "JSON object"),
    ),
    "an optimizer without a type": ("gpt", form(optimizer={"params": AUTO}), ('"optimizer" needs a "type"',)),
    "an optimizer's params that are none": (
        "gpt",
        form(optimizer={"type": "LENA", "params": [1]}),
        ('"params" of "optimizer" is [1]', "JSON object"),
    ),
    "no ZeRO entry": ("gpt", form(zero_optimization="2"), ('"zero_optimization" is "2"', "JSON object")),
    "an unknown ZeRO stage": ("gpt", form(zero_optimization={"stage": 4}), ('"stage" of', "is 4", "0, 1, 2 or 3")),
    # numbers
    **{
        f"{option} {value}": ("gpt", [f"--{option}", value], (f"--{option} is {value}; it must be {allowed}",))
        for option, value, allowed in (
            ("dropout", "2.0", "at least 0 and below 1"),
            ("held_out_fraction", "1.0", "between 0 and 1"),
            ("max_held_out_blocks", "0", "at least 1"),
            ("max_held_out_blocks", "-5", "at least 1"),
            ("sequence_length", "1", "at least 2 tokens"),
            ("sample_texts", "0", "at least 1"),
            ("target_loss", "nan", "a finite number"),
            ("per_device_train_batch_size", "0", "at least 1"),
            ("gradient_accumulation_steps", "0", "at least 1"),
            ("learning_rate", "0.0", "a finite number above 0"),
            ("learning_rate", "nan", "a finite number above 0"),
            ("weight_decay", "-1.0", "a finite number, at least 0"),
            ("num_train_epochs", "0.0", "a finite number above 0"),
            ("max_steps", "0", "at least 1"),
        )
    },
    # where to write
    "a place below a file": ("gpt", ["--output_dir", "/dev/null/x"], ("output_dir /dev/null/x", "Not a directory")),
    "a place where no folder can be": ("gpt", ["--output_dir", "/proc/nope"], ("output_dir /proc/nope", "another")),
    # options of the data that nobody would use
    **{
        f"--{option} that nobody would use": (
            "gpt",
            [f"--{option}", value, *more],
            (f"--{option} {value} would be ignored: ", why, f"Leave --{option} out"),
        )
        for option, value, more, why in (
            ("vocab_size", "400", ["--tokenizer", "PLACE/tokenizer"], "--tokenizer brings one"),
            ("text_column", "text", [], "for data sets of the hub"),
            ("dataset_config", "raw", ["--dataset", "sotu"], "for data sets of the hub"),
            ("held_out_texts", "500", [], "for --streaming"),
            ("sample_texts", "500", [], "for --streaming"),
            ("shuffle_texts", "500", [], "for --streaming"),
            ("held_out_fraction", "0.1", STREAM, "holds out --held_out_texts"),
        )
    },
    "a share of sotu": ("gpt", ["--dataset", "sotu", "--held_out_fraction", "0.1"], ("ignored: of sotu the years",)),
    # data
    "no name of the data": ("gpt", ["--dataset", ""], ("dataset is empty", "sotu")),
    "a single text": ("gpt", ["--dataset", "PLACE/lines.txt"], ("only one text", "blank lines")),
    "a file with a zero far inside": ("gpt", ["--dataset", "PLACE/late.txt"], ("late.txt", "zero byte at 70000")),
    "a path that the data library splits": ("gpt", ["--dataset", "PLACE/a::b.txt"], ('with "::"',)),
    "less than an update": (
        "gpt",
        ["--gradient_accumulation_steps", "2000"],
        ("the training text fills", "one update takes 4000"),
    ),
    "less than an update in a stream": (
        "bert",
        ["--gradient_accumulation_steps", "2000", *STREAM, "--sample_texts", "5000"],
        ("the training text fills", "one update takes 4000"),
    ),
    "a stream with nothing to train on": ("gpt", [*STREAM, "--held_out_texts", "5000"], ("--held_out_texts",)),
    "a stream without an end": ("gpt", ["--streaming", "--max_steps", "-1"], ("--streaming needs --max_steps",)),
    "no such file": ("gpt", ["--dataset", "PLACE/none.txt"], ("none.txt", "no such file")),
    "an empty file": ("bert", ["--dataset", "PLACE/empty.txt"], ("empty.txt", "the file is empty")),
    "a binary file": ("bert", ["--dataset", "PLACE/binary.txt", *STREAM], ("binary.txt", "not UTF-8 text")),
    "a file with zeros": ("gpt", ["--dataset", "PLACE/zeros.txt"], ("zeros.txt", "a binary file")),
    "a wrong hub name, offline": ("gpt", ["--dataset", "nobody/nothing"], ("nobody/nothing", "data set of the hub")),
    "a wrong hub name, offline, streamed": (
        "gpt",
        ["--dataset", "nobody/nothing", *STREAM],
        ("nobody/nothing", "data set of the hub"),
    ),
    "no tokenizer there": ("gpt", ["--tokenizer", "nobody/nothing"], ("tokenizer nobody/nothing",)),
    "a tokenizer of another form": ("gpt", ["--tokenizer", "PLACE/foreign"], ("foreign: its files cannot be read",)),
    "a tokenizer without a mask": ("bert", ["--tokenizer", "PLACE/tokenizer"], ("no mask token", "leave --tokenizer")),
    "a vocabulary without the bytes": ("gpt", ["--vocab_size", "100"], ("vocab_size is 100", "at least 257")),
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
        ("another run: model_size: then tiny, now mini; seed: then 42, now 7; learning_rate: then 0.001, now 0.01. ",),
    ),
    "a checkpoint of another optimizer": (
        "gpt",
        [*config({"gain_power": 0.5}), *RIVAL, *LATEST],
        ("params.gain_power: then 1.0, now 0.5", "params.layer: then model, now not given"),
    ),
    "a checkpoint of other texts": (
        "bert",
        ["--dataset", "PLACE/more.txt", "--resume_from_checkpoint", "PLACE/plain/checkpoint-1"],
        ("model: then GPT-2, now BERT", "texts.txt, now", "bytes of the texts: then"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def answers(workshop: Path) -> dict[str, dict[str, Any]]:
    """What came of every bad command line, and before them of some good ones with a target: all in one process."""
    (workshop / "empty.txt").write_text("\n")
    (workshop / "binary.txt").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    (workshop / "zeros.txt").write_bytes(b"text\0more")
    (workshop / "late.txt").write_bytes(b"some text\n" * 7000 + b"\0")
    (workshop / "lines.txt").write_text("a line\n" * 1000)
    (workshop / "a::b.txt").write_text("a text\n\nanother\n")
    (workshop / "foreign").mkdir()
    (workshop / "foreign" / "tokenizer.json").write_text('{"model": {}}')
    write_texts(workshop / "more.txt", paragraphs=130)
    plain = options(workshop / "texts.txt", workshop / "plain", *GOAL)
    rival = options(workshop / "texts.txt", workshop / "rival", *GOAL, *ADASCALE)
    good = {"plain": plain, "again": [*plain, *LATEST], "rival": rival}
    cases = [(PROGRAMS["gpt"], arguments) for arguments in good.values()]
    for name, (model, arguments, _) in BAD.items():
        placed = [argument.replace("PLACE", str(workshop)) for argument in arguments]
        own = options(workshop / "texts.txt", workshop / name.replace(" ", "-"), *placed)
        cases.append((PROGRAMS[model], own))
    save_tokenizer(workshop / "tokenizer")
    return dict(zip([*good, *BAD], in_turn(cases, workshop), strict=True))


def save_tokenizer(folder: Path) -> None:
    """One for a GPT: it ends texts, and masks nothing."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<end>": 0, "<unk>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unk>").save_pretrained(folder)


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


def test_what_only_the_trainer_knows_is_said_once_by_two_ranks(workshop: Path) -> None:
    """The updates of an epoch, counted by HF. The data is good, and there to stay; nothing else is written."""
    folder = workshop / "epoch"
    arguments = options(workshop / "texts.txt", folder, *config({"total_steps": 7}), "--max_steps", "-1")
    done = attempt(command("gpt", workshop / "texts.txt", folder)[0], *arguments, "--num_train_epochs", "1")
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count('pretrain_gpt.py: error: LENA: "total_steps": 7') == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert {file.name for file in folder.iterdir()} == {"data"}
    assert not any(file.suffix == ".draft" for file in (folder / "data").iterdir())


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
    begun, finished = (answers[name]["said"].partition("\nheld-out loss before") for name in ("plain", "again"))
    assert finished[1:] == begun[1:] and finished[1]
    assert "  lr " in begun[0] and "  lr " not in finished[0]
