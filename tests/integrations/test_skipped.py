"""Non-finite gradients: an update that DeepSpeed skips leaves no trace, in one that it applies other layers go on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ds_lena
from ds_lena.optimizer import controller_of
from ds_lena.schedule import checkpoint
from tests.integrations._engines import config, engine, moved, said, train
from tests.integrations._ranks import Ranks

BEFORE, BAD, AFTER = range(2), 2, range(3, 6)
SKIPPING = [
    (0, "fp32"),
    (1, "fp32"),
    (1, "bf16"),
    (1, "bf16-fp32"),
    (2, "fp32"),
    (2, "bf16"),
    (3, "fp32"),
    (3, "bf16"),
    (0, "bf16"),
]
SKIPPING += [(1, "fp16"), (2, "fp16"), (3, "fp16"), (1, "fp16 + offload"), (2, "fp16 + offload"), (3, "fp16 + offload")]


def state_of(engine: Any) -> dict[str, Any]:
    """All that LENA remembers, but for the count of skipped updates."""
    saved = checkpoint.to_dict(controller_of(engine.basic_optimizer).schedule)
    return {key: value for key, value in saved.items() if key != "skipped"}


def train_past_a_bad_update(stage: int, precision: str) -> dict[str, Any]:
    """Weights, state and reports on both sides of a skipped update, at the end, and of a run that never had it."""
    with engine(config(stage, precision)) as made:
        train(made, BEFORE)
        before = (moved(made), state_of(made))
        train(made, [BAD], poisoned=[BAD])
        skipped = (moved(made), state_of(made), ds_lena.report(made))
        train(made, AFTER)
        end = (moved(made), ds_lena.report(made))
    with engine(config(stage, precision)) as healthy:
        train(healthy, [*BEFORE, *AFTER])
        wanted = (moved(healthy), ds_lena.report(healthy))
    return {
        "weights stayed": all(torch.equal(a, b) for a, b in zip(before[0], skipped[0], strict=True)),
        "state stayed": before[1] == skipped[1],
        "skipped": skipped[2],
        "end": end[1],
        "wanted": wanted[1],
        "weights are the wanted ones": all(torch.equal(a, b) for a, b in zip(end[0], wanted[0], strict=True)),
    }


@pytest.mark.parametrize(("stage", "precision"), SKIPPING)
def test_a_skipped_update_leaves_no_trace(ranks: Ranks, stage: int, precision: str) -> None:
    for run in ranks.run(train_past_a_bad_update, stage, precision):
        assert run["weights stayed"] and run["state stayed"]
        assert run["skipped"]["skipped"] == 1
        assert run["end"] == run["wanted"] | {"skipped": 1}
        assert run["weights are the wanted ones"]


def train_until_the_scale_is_low_enough(stage: int) -> dict[str, Any]:
    """From a scale that is far too high. Then the same with the scale that it has come to."""
    too_high = {"enabled": True, "initial_scale_power": 22, "hysteresis": 1}
    with engine(config(stage, fp16=too_high)) as made:
        while made.optimizer.loss_scale > 1 and made.global_steps == made.skipped_steps:
            train(made, [0])
        scale, skipped = made.optimizer.loss_scale, made.skipped_steps
        train(made, AFTER)
        end = moved(made), ds_lena.report(made)
    with engine(config(stage, fp16={"enabled": True, "loss_scale": scale})) as healthy:
        train(healthy, [0, *AFTER])
        wanted = moved(healthy), ds_lena.report(healthy)
    return {
        "scale": scale,
        "skipped": skipped,
        "end": end[1],
        "wanted": wanted[1],
        "weights are the wanted ones": all(torch.equal(a, b) for a, b in zip(end[0], wanted[0], strict=True)),
    }


@pytest.mark.parametrize("stage", [2, 3])
def test_overflows_leave_no_trace_until_the_loss_scale_is_low_enough(ranks: Ranks, stage: int) -> None:
    for run in ranks.run(train_until_the_scale_is_low_enough, stage):
        assert 1 < run["scale"] < 2**22 and run["skipped"] > 0
        assert run["end"] == run["wanted"] | {"skipped": run["skipped"]}
        assert run["weights are the wanted ones"]


def train_through_bad_updates(bad: int) -> tuple[list[dict[str, Any]], list[bool]]:
    """Reports before and after updates with a non-finite gradient in the right tower, and which weights stay finite."""
    updates = range(2, 2 + bad)
    with engine(config(0, lena={"nonfinite": "warn"})) as made:
        train(made, BEFORE)
        reports = [ds_lena.report(made)]
        for update in updates:
            train(made, [update], poisoned=[update])
            reports.append(ds_lena.report(made))
        return reports, [bool(p.isfinite().all()) for p in made.module.parameters()]


def test_an_update_that_stage_0_applies_changes_only_layers_with_finite_gradients(ranks: Ranks) -> None:
    for (before, after), finite in ranks.run(train_through_bad_updates, 1):
        left = [name for name in before["layers"] if name.startswith("left.")]
        right = [name for name in before["layers"] if name.startswith("right.")]
        assert len(left) == len(right) == 6
        assert all(after["layers"][name] == before["layers"][name] for name in right)
        assert all(after["layers"][name]["state"] > before["layers"][name]["state"] for name in left)
        assert (after["update"], after["skipped"], after["nonfinite"]) == (before["update"] + 1, 0, len(right))
        assert finite == [True] * 6 + [False] * 6, "the base rule does in this update what it does without LENA"


def test_every_layer_left_out_is_counted(ranks: Ranks) -> None:
    for reports, _ in ranks.run(train_through_bad_updates, 3):
        assert [report["nonfinite"] for report in reports] == [0, 6, 12, 18]


def counted_and_said(choice: str, stage: int) -> tuple[int, int, list[str]]:
    """What DeepSpeed counts as skipped, where its scheduler is, and what was said."""
    steps = {"type": "WarmupLR", "params": {"warmup_min_lr": 0.01, "warmup_max_lr": 0.01}}
    with engine(config(stage, lena={"nonfinite": choice}, scheduler=steps)) as made, said() as messages:
        train(made, range(4), poisoned=[1, 2])
        told = [text for text in messages if "infinite or NaN" in text]
        return made.skipped_steps, made.lr_scheduler.last_batch_iteration, told


@pytest.mark.parametrize(("choice", "skipped"), [("skip", 2), ("warn", 0)])
def test_what_is_done_is_said_once_and_counted(ranks: Ranks, choice: str, skipped: int) -> None:
    first, second = ranks.run(counted_and_said, choice, 0)
    (message,) = first[2]
    assert f'"nonfinite": "{choice}"' in message and "update 2 is infinite or NaN" in message
    assert first[:2] == (skipped, ranks.run(counted_and_said, choice, 1 if choice == "skip" else 0)[0][1])
    assert second[2] == []
