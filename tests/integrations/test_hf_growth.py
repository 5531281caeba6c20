"""HF Trainer with a batch that grows: every sample once an epoch, the plan's weights, and a resume to the bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments, get_cosine_schedule_with_warmup

import ds_lena
from ds_lena import BatchGrowth, ConfigError, cosine
from ds_lena.integrations.transformers_growth import BatchGrowthCallback
from tests.integrations._hf_growth import BATCH, BUDGET, LR, RANKS, SAMPLES, Endless, Tokens, model, sample
from tests.integrations._programs import SCRIPTS, launch, python

Run = Callable[[str], list[dict[str, Any]]]
EPOCH = SAMPLES // BATCH // RANKS
FITTING = int(BUDGET) // BATCH // RANKS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf_growth")
    launch(str(SCRIPTS / "hf_growth.py"), str(folder))
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return lambda name: [json.loads((folder / f"{name}.rank{rank}.json").read_text()) for rank in range(RANKS)]


def trained(windows: list[int], seen: list[list[list[int]]], rates: list[float]) -> dict[str, list[float]]:
    """The weights of torch's AdamW in float64: each update averages over the labels of its whole window.

    The Trainer counts a sample's first label too, which the model does not predict.
    """
    twin = model(0).double()
    optimizer = torch.optim.AdamW(twin.parameters(), weight_decay=0.0)
    done = 0
    for window, lr in zip(windows, rates, strict=True):
        numbers = [n for of_rank in seen for batch in of_rank[done : done + window] for n in batch]
        tokens = torch.stack([sample(number)["input_ids"] for number in numbers])
        labels = torch.stack([sample(number)["labels"] for number in numbers])
        logits = twin(input_ids=tokens).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        (loss / (labels != -100).sum()).backward()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        done += window
    return {name: p.flatten().tolist() for name, p in twin.named_parameters()}


def _vector(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def path_error(found: dict[str, list[float]], right: dict[str, list[float]]) -> float:
    start = {name: p.detach().double().flatten() for name, p in model(0).named_parameters()}
    # The gradient of a key's bias is 0 but for rounding, and Adam makes steps of its sign.
    names = [name for name in right if not name.endswith("c_attn.bias")]
    distance = sum(float((_vector(found[k]) - _vector(right[k])).square().sum()) for k in names)
    return math.sqrt(distance / sum(float((_vector(right[k]) - start[k]).square().sum()) for k in names))


@pytest.mark.parametrize("way", ["zero2", "ddp"])
def test_windows_weights_and_what_the_trainer_says_are_right(run: Run, way: str) -> None:
    first, second = run(way)
    windows = first["windows"]
    assert windows == second["windows"] and first["weights"] == second["weights"]
    assert windows[0] == 2 and max(windows) >= 6
    done = 0
    for window in windows:
        in_epoch = done % EPOCH
        assert in_epoch % window == 0 or in_epoch + window == EPOCH
        done += window
    epochs = [
        sorted(n for result in (first, second) for batch in result["seen"][start : start + EPOCH] for n in batch)
        for start in (0, EPOCH)
    ]
    assert epochs[0] == list(range(SAMPLES)), "every sample once"
    assert len(set(epochs[1])) == len(epochs[1])
    schedule, before = cosine(total=200), [BATCH * RANKS * sum(windows[:i]) for i in range(len(windows))]
    assert first["lr"] == pytest.approx([LR * schedule(samples) for samples in before])
    right = trained(windows, [first["seen"], second["seen"]], first["lr"])
    assert path_error(first["weights"], right) < 1e-5
    assert (
        first["clock"]
        == first["report"]["samples"]
        == BATCH * RANKS * done
        == pytest.approx(first["samples"], rel=1e-3)
    )
    assert FITTING - windows[-1] < done <= FITTING, "the run ends before the update that would go over the budget"
    assert first["epoch"] == pytest.approx(done / EPOCH)
    planned, *last = first["max_steps"]
    assert planned[0] > planned[-1] == len(windows) and last == [len(windows)] * 2
    assert first["saved"] == [3, 6, len(windows)]
    assert first["accumulation"][0] == 2, "the Trainer has its own number back"
    assert [log["lena/samples"] for log in first["logs"] if "loss" in log][:-1] == before[1:]
    losses = [log["loss"] for log in first["logs"] if "loss" in log]
    assert max(losses) / min(losses) < 1.1, "a window is divided by what it has"


@pytest.mark.parametrize(
    ("whole", "part", "updates"),
    [
        ("zero2", "zero2 in epoch 0", 3),
        ("zero2", "zero2 in epoch 1", 6),
        ("lena", "lena resumed", 6),
        ("ddp", "ddp resumed", 6),
    ],
)
def test_resuming_goes_on_at_the_right_sample_to_the_bit(run: Run, whole: str, part: str, updates: int) -> None:
    for at_once, again in zip(run(whole), run(part), strict=True):
        left = at_once["windows"][updates:]
        assert again["windows"] == left and max(at_once["windows"][:updates]) > 2
        assert again["seen"] == at_once["seen"][-sum(left) :]
        assert again["weights"] == at_once["weights"]
        assert again["report"] == at_once["report"] and again["clock"] == at_once["clock"]
        assert again["samples"] == pytest.approx(BATCH * RANKS * sum(left), rel=1e-3)
        assert again["max_steps"][1:] == at_once["max_steps"][1:]


def test_the_learning_rate_follows_the_batch(run: Run) -> None:
    """That was set: at the end of an epoch an update may have fewer micro-batches."""
    found = run("lr follows")[0]
    schedule, windows, done = cosine(total=200), found["windows"], 0
    for window, lr in zip(windows, found["lr"], strict=True):
        wanted = LR * schedule(BATCH * RANKS * done) * (window / 2) ** 0.5
        done += window
        assert lr == pytest.approx(wanted) or (done % EPOCH == 0 and lr > wanted)
    assert max(windows) > 4


def test_resuming_on_one_rank_keeps_the_batch_in_samples(run: Run, folder: Path) -> None:
    at_once, beside = run("ddp")
    left = at_once["windows"][6:]
    python(str(SCRIPTS / "hf_growth.py"), str(folder))
    again = json.loads((folder / "one rank.rank0.json").read_text())
    assert again["windows"] == [2 * window for window in left]
    number = sum(left)
    seen = [batch for pair in zip(at_once["seen"][-number:], beside["seen"][-number:], strict=True) for batch in pair]
    assert again["seen"] == seen and again["clock"] == at_once["clock"]
    assert path_error(again["weights"], at_once["weights"]) < 1e-5
    assert again["report"]["noise_scale"] == pytest.approx(at_once["report"]["noise_scale"], rel=1e-3)


def test_data_without_a_length_needs_a_budget_and_may_end(run: Run) -> None:
    first = run("endless")[0]
    assert FITTING - first["windows"][-1] < sum(first["windows"]) <= FITTING
    assert first["max_steps"][1:] == [len(first["windows"])] * 2
    ended = run("ended")[0]
    assert len(ended["seen"]) == 15 and 15 - ended["accumulation"][1] < sum(ended["windows"]) <= 15
    assert ended["max_steps"][1] == len(ended["windows"])


def test_a_skipped_update_decides_nothing_and_its_samples_count(run: Run) -> None:
    first, second = run("skipped")
    windows, schedule = first["windows"], cosine(total=200)
    assert windows == second["windows"] and first["weights"] == second["weights"]
    assert first["report"]["skipped"] == 1 and first["report"]["update"] == len(windows) - 1
    assert run("zero2")[0]["windows"][:3] == [2, 2, 4], "two updates that are applied decide"
    assert windows[:3] == [2, 2, 2] and windows[3] > 2
    before = [BATCH * RANKS * sum(windows[:i]) for i in range(len(windows))]
    assert first["lr"] == pytest.approx([LR * schedule(samples) for samples in before])
    assert first["clock"] == BATCH * RANKS * sum(windows)


def test_a_scheduler_in_the_configuration_is_refused_on_every_rank(run: Run) -> None:
    assert all("the scheduler WarmupDecayLR counts updates" in message for message in run("refused"))


# -- what is refused --------------------------------------------------------------------------------------------------


def trainer(folder: Path, data: Any = None, **more: Any) -> Trainer:
    keys = {"lr_scheduler_type": "constant", "gradient_accumulation_steps": 2, "save_strategy": "no"} | more
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, use_cpu=True, report_to=[], disable_tqdm=True, **keys
    )
    held_out = torch.utils.data.Subset(Tokens(), range(2))
    return Trainer(model=model(0), args=arguments, train_dataset=data or Tokens(), eval_dataset=held_out)


def step_lr(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1)


def cosine_in_updates(optimizer: torch.optim.Optimizer) -> Any:
    return get_cosine_schedule_with_warmup(optimizer, 0, 10)


GROWTH = BatchGrowth(1.0, 2, 8)


@pytest.mark.parametrize(
    ("arguments", "keys", "message"),
    [
        ({"max_steps": 5}, {}, "Give budget_samples=… or budget_tokens=…"),
        ({"train_sampling_strategy": "group_by_length"}, {}, "sorts the data by the first batch"),
        ({"train_sampling_strategy": "batch_rebalance"}, {}, "sorts the data by the first batch"),
        ({"lr_scheduler_type": "linear"}, {}, '"lr_scheduler_type": "linear" counts updates'),
        ({"warmup_steps": 3}, {"schedule": cosine(100)}, "a warm-up in samples"),
        ({"ignore_data_skip": True}, {}, "ignore_data_skip"),
        ({"auto_find_batch_size": True}, {}, "auto_find_batch_size"),
        ({}, {"budget_samples": -1}, '"budget_samples": -1 is not allowed'),
        ({}, {"budget_tokens": 100}, 'needs "tokens_per_sample"'),
        ({}, {"budget_tokens": 100, "budget_samples": 5, "tokens_per_sample": 4}, "not both"),
        ({}, {"smoothness": 1}, 'Did you mean "smoothing"'),
    ],
)
def test_what_does_not_go_together_is_told(
    tmp_path: Path, arguments: dict[str, Any], keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        BatchGrowthCallback.add_to(trainer(tmp_path, **arguments), GROWTH, **keys)


@pytest.mark.parametrize(
    ("growth", "keys", "message"),
    [
        (BatchGrowth(1.0, 2, 3), {"accumulation": 4}, '"largest": 3 is below the 4 x 1 micro-batches'),
        (GROWTH, {"budget_samples": 3}, "less than the first update takes, 4 samples"),
        (GROWTH, {"scheduler": step_lr, "schedule": cosine(100)}, "the scheduler StepLR counts updates"),
        (GROWTH, {"scheduler": step_lr}, "the scheduler StepLR counts updates.*schedule=…"),
        (GROWTH, {"scheduler": cosine_in_updates}, "the scheduler LambdaLR counts updates.*schedule=…"),
    ],
)
def test_what_is_seen_at_the_start_of_training_is_told(
    tmp_path: Path, growth: BatchGrowth, keys: dict[str, Any], message: str
) -> None:
    made = trainer(tmp_path, gradient_accumulation_steps=keys.pop("accumulation", 2))
    if "scheduler" in keys:
        optimizer = torch.optim.AdamW(made.model.parameters())
        made.optimizer, made.lr_scheduler = optimizer, keys.pop("scheduler")(optimizer)
    BatchGrowthCallback.add_to(made, growth, **keys)
    with pytest.raises(ConfigError, match=message):
        made.train()


def test_a_callback_without_its_trainer_is_told(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.add_callback(BatchGrowthCallback(GROWTH))
    with pytest.raises(ConfigError, match=r"BatchGrowthCallback.add_to\(trainer, …\) before train"):
        made.train()
    with pytest.raises(ConfigError, match=r"has one already.*leave it out of callbacks"):
        BatchGrowthCallback.add_to(made, GROWTH)


def test_a_second_callback_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    BatchGrowthCallback.add_to(made, GROWTH)
    with pytest.raises(ConfigError, match="has one already"):
        BatchGrowthCallback.add_to(made, GROWTH)


@pytest.mark.parametrize(("data", "length"), [(None, {}), (Endless(), {"max_steps": 1})])
def test_a_run_that_has_ended_trains_nothing_more(tmp_path: Path, data: Any, length: dict[str, int]) -> None:
    """A part of the budget is left, which is too small for the grown batch."""

    def run(budget: float, **more: str) -> tuple[Trainer, BatchGrowthCallback]:
        made = trainer(tmp_path, data, save_strategy="steps", save_steps=1, **length)
        callback = BatchGrowthCallback.add_to(made, BatchGrowth(1e6, 2, 8, every=1), budget_samples=budget)
        made.train(**more)
        return made, callback

    before, callback = run(62)
    steps, samples = before.state.global_step, callback.growing.samples
    assert samples < 62 and before.state.max_steps == steps
    last = str(tmp_path / f"checkpoint-{steps}")
    again, callback = run(62, resume_from_checkpoint=last)
    assert again.state.global_step == again.state.max_steps == steps and callback.growing.samples == samples
    assert again.args.gradient_accumulation_steps == 2
    for p, q in zip(again.model.parameters(), before.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
    further, callback = run(120, resume_from_checkpoint=last)
    assert further.state.global_step > steps and 120 - 16 < callback.growing.samples <= 120


def test_a_share_of_steps_is_one_of_the_samples(tmp_path: Path) -> None:
    """The Trainer makes updates of it by its first plan: 0.25 would be a fourth of all updates at the first batch."""
    seen: list[float] = []

    class Evaluated(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(state.epoch)

    made = trainer(tmp_path, num_train_epochs=4, eval_strategy="steps", eval_steps=0.25)
    made.add_callback(Evaluated())
    BatchGrowthCallback.add_to(made, BatchGrowth(1e6, 2, 8, every=1))
    made.train()
    assert made.state.max_steps < 88 / 2
    assert len(seen) == 4 and all(at <= epoch < at + 8 / 44 for at, epoch in zip((1, 2, 3, 4), seen, strict=True))


def test_one_process_trains_all_epochs_and_twice(tmp_path: Path) -> None:
    """Without a budget the Trainer's epochs are the run. A second `train()` begins anew."""
    made = trainer(tmp_path, num_train_epochs=1.5)
    callback = BatchGrowthCallback.add_to(made, BatchGrowth(1e6, 2, 12, every=1), tokens_per_sample=8)
    for _ in range(2):
        made.train()
        assert callback.growing is not None
        assert callback.growing.samples == callback.watch.report()["samples"]
        assert 66 - callback.growing.accumulation < callback.growing.micro_batches <= 66
        assert made.args.gradient_accumulation_steps == 2
        assert made.state.max_steps == made.state.global_step < 33


def test_tokens_are_a_budget_too(tmp_path: Path) -> None:
    made = trainer(tmp_path, Endless(), max_steps=1)
    callback = BatchGrowthCallback.add_to(made, BatchGrowth(1.0, 2, 2), budget_tokens=8 * 41, tokens_per_sample=8)
    made.train()
    assert made.state.global_step == 10 and callback.growing.samples == 40
    assert ds_lena.report(made)["update"] == 10
