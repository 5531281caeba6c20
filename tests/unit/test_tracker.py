"""What is remembered of a run: proposals, applied and skipped updates, checkpoints, and another plan on resume."""

import io
import json
import logging
import math

import pytest
import torch
from pytest import approx

from ds_lena import ConfigError, StateError
from ds_lena.layers import LayerTable
from ds_lena.tracker import Plan, Tracker
from tests.unit.support import config, statistics

T, N, B = 100, 8, 4
PLAN = Plan(total_steps=T, planned_n=N, micro_batch_size=B)
UNKNOWN = Plan(total_steps=T, planned_n=None, micro_batch_size=None)


def new(*names, **keys):
    names = names or ("a", "b")
    table = LayerTable(names, (3,) * len(names), tuple(range(len(names))))
    return Tracker(config(**keys), table, torch.device("cpu"))


def some(t=0, n=N, layers=2):
    """Statistics that differ from update to update and from layer to layer."""
    return statistics(n, [8 + i + 0.1 * t for i in range(layers)], [2 + 0.3 * i for i in range(layers)])


def apply(tracker, measured=None, plan=PLAN):
    proposal = tracker.propose(measured or some(layers=tracker.table.count), plan)
    tracker.commit(proposal)
    return proposal


def trained(updates=10, plan=PLAN, n=N, **keys):
    tracker = new(**keys)
    for t in range(updates):
        apply(tracker, some(t, n), plan)
    return tracker


def resumed(tracker, *names, **keys):
    """A new tracker from the checkpoint of another, as it comes back from disk."""
    file = io.BytesIO()
    torch.save(tracker.state_dict(), file)
    file.seek(0)
    fresh = new(*names, **keys)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


# -- one update -------------------------------------------------------------------------------------------------------


def test_a_proposal_changes_nothing():
    tracker = trained()
    before = tracker.state_dict(), tracker.report()
    tracker.propose(some(77), PLAN)
    assert (tracker.state_dict(), tracker.report()) == before


def test_the_same_update_can_be_proposed_again():
    tracker = trained()
    first, second = (tracker.propose(some(77), PLAN) for _ in range(2))
    assert torch.equal(first.factor, second.factor)


def test_a_committed_update_is_counted_once():
    tracker = trained(updates=3)
    assert tracker.updates == 3
    assert tracker.done.item() == 3 * N
    assert tracker.report()["n"] == N


def test_a_skipped_update_is_counted_and_leaves_nothing_behind():
    skipping, steady = trained(), trained()
    skipping.propose(some(77), PLAN)
    skipping.skip()
    assert skipping.state_dict() == steady.state_dict() | {"skipped": 1}
    assert torch.equal(apply(skipping).factor, apply(steady).factor)


def test_the_factor_behind_the_last_layer_is_one():
    factor = new(warmup="none").propose(some(), PLAN).factor
    assert factor.shape == (3,)
    assert factor[-1] == 1


def test_statistics_that_are_not_finite_are_counted_layer_by_layer():
    tracker = new()
    apply(tracker, statistics(N, [8, math.nan], [2, 2]))
    apply(tracker, statistics(N, [math.inf, math.nan], [2, 2]))
    assert tracker.report()["nonfinite"] == 3


def test_the_authors_code_is_another_method():
    tracker = trained(variant="authors-code", warmup="none")
    assert tracker.state.weight.tolist() == [1, 1], "not debiased"
    assert tracker.report()["layers"]["a"]["gain"] != trained(warmup="none").report()["layers"]["a"]["gain"]


# -- the plan: H, k, and what a run is made of ------------------------------------------------------------------------


def test_the_run_is_planned_from_its_first_update():
    tracker = trained(updates=1)
    assert tracker.planned.item() == T * N
    apply(tracker, some(n=2))
    assert tracker.planned.item() == T * N, "a short window does not change the plan"
    assert tracker.done.item() == N + 2


def test_without_a_known_length_nothing_ends():
    tracker = new(warmup="none")
    apply(tracker, plan=Plan(None, None, None))
    assert tracker.planned.item() == math.inf


@pytest.mark.parametrize(
    ("plan", "n", "keys", "planned"),
    [
        pytest.param(PLAN, N, {}, T * N, id="the same"),
        pytest.param(Plan(T, 16, B), 16, {}, 10 * N + 90 * 16, id="n"),
        pytest.param(Plan(T, 16, B), 3, {}, 10 * N + 90 * 16, id="n, in a short window"),
        pytest.param(Plan(60, N, B), N, {}, 10 * N + 50 * N, id="T"),
        pytest.param(Plan(5, N, B), N, {}, 10 * N, id="T, already over"),
        pytest.param(PLAN, N, {"base_batch_size": 8}, 10 * N + 90 * N / 2, id="k"),
        pytest.param(Plan(T, N, 8), N, {}, 10 * N + 90 * N * 2, id="b"),
    ],
)
def test_a_run_that_is_resumed_with_another_plan_goes_on_from_where_it_is(plan, n, keys, planned):
    tracker = resumed(trained(updates=10), **keys)
    apply(tracker, some(n=n), plan)
    assert tracker.planned.item() == planned


def test_a_new_plan_is_made_once():
    tracker = resumed(trained(updates=10))
    for n in (16, 16, 5):
        apply(tracker, some(n=n), Plan(T, 16, B))
        assert tracker.planned.item() == 10 * N + 90 * 16


@pytest.mark.parametrize("begin", [trained, lambda: resumed(trained())], ids=["new", "resumed"])
def test_a_plan_that_changes_without_a_resume_leaves_the_run_as_it_was_planned(begin):
    tracker = begin()
    for plan in (PLAN, Plan(2 * T, 16, B)):
        apply(tracker, plan=plan)
        assert tracker.planned.item() == T * N


def test_the_authors_code_counts_micro_batches_whatever_they_hold():
    tracker = resumed(trained(variant="authors-code"), variant="authors-code")
    apply(tracker, plan=Plan(T, N, 8))
    assert tracker.done.item() == 11 * N


def test_where_nobody_knows_n_beforehand_a_resumed_run_is_planned_from_the_n_that_it_shows():
    tracker = resumed(trained(updates=10, plan=UNKNOWN))
    apply(tracker, some(n=16), UNKNOWN)
    assert tracker.planned.item() == 10 * N + 90 * 16


def test_a_short_last_window_before_a_checkpoint_does_not_change_the_plan():
    tracker = trained(updates=9, plan=UNKNOWN)
    apply(tracker, some(n=3), UNKNOWN)
    tracker = resumed(tracker)
    apply(tracker, some(n=N), UNKNOWN)
    assert tracker.planned.item() == T * N


def test_without_a_base_batch_k_is_one_micro_batch():
    assert new().base_in_micro_batches(B) == 1
    assert new().base_in_micro_batches(None) == 1


def test_a_base_batch_in_samples_is_divided_by_the_micro_batch():
    tracker = new(base_batch_size=2)
    apply(tracker)
    assert tracker.k == 0.5
    assert tracker.planned.item() == T * N / 0.5


def test_a_base_batch_in_samples_needs_the_size_of_a_micro_batch():
    with pytest.raises(ConfigError, match=r'"base_batch_size": 32 is in samples.*"micro_batch_size"'):
        new(base_batch_size=32).propose(some(), UNKNOWN)


def test_a_resumed_run_keeps_its_base_batch_in_samples_and_derives_k_again():
    tracker = resumed(trained())
    assert tracker.state_dict()["base_samples"] == B
    apply(tracker, plan=Plan(T, N, 8))
    assert tracker.report()["base"] == 0.5


def test_a_base_batch_that_is_given_on_resume_wins():
    tracker = resumed(trained(), base_batch_size=16)
    apply(tracker)
    assert tracker.report()["base"] == 4


def test_another_micro_batch_size_rescales_the_noise_that_is_remembered():
    tracker = trained(smoothing=0.5)
    noise, signal = tracker.noise_and_signal()
    apply(tracker, statistics(1, [9, 9], [9, 9]), Plan(T, N, 8))  # n = 1 adds nothing new
    after_noise, after_signal = tracker.noise_and_signal()
    torch.testing.assert_close(after_noise, noise / 2)
    torch.testing.assert_close(after_signal, signal)


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys", [{}, {"warmup": "none"}, {"variant": "authors-code"}, {"base_batch_size": 8, "smoothing": 0.9}], ids=str
)
def test_a_resumed_run_goes_on_bit_for_bit(keys):
    steady = trained(**keys)
    tracker = resumed(steady, **keys)
    assert tracker.state_dict() == steady.state_dict()
    assert tracker.report() == steady.report()
    for t in range(10, 40):
        assert torch.equal(apply(tracker, some(t)).factor, apply(steady, some(t)).factor)
    assert tracker.state_dict() == steady.state_dict()


def test_a_state_of_no_updates_can_be_resumed():
    tracker = resumed(new())
    assert torch.equal(apply(tracker).factor, apply(new()).factor)


def test_the_state_is_plain_numbers_by_layer_name():
    state = trained().state_dict()
    assert set(state["layers"]) == {"a", "b"}
    assert json.loads(json.dumps(state)) == state


def test_a_saved_state_does_not_change_with_the_run():
    tracker = trained()
    state = tracker.state_dict()
    text = json.dumps(state)
    apply(tracker)
    assert json.dumps(state) == text


def test_layers_are_matched_by_name_and_not_by_place():
    steady, turned = trained(), resumed(trained(), "b", "a")
    assert turned.report()["layers"] == steady.report()["layers"]


def test_layers_that_are_not_in_the_checkpoint_start_fresh_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="ds_lena"):
        tracker = resumed(trained(), "a", "new")
    layers = tracker.report()["layers"]
    assert layers["a"] == trained().report()["layers"]["a"]
    assert layers["new"] == new("new").report()["layers"]["new"]
    (record,) = caplog.records
    assert all(word in record.getMessage() for word in ("start fresh", "['new']", "['b']"))


def test_a_checkpoint_that_fits_is_loaded_without_a_word(caplog):
    resumed(trained())
    assert caplog.text == ""


@pytest.mark.parametrize("version", [None, 0, 2, "1"])
def test_a_checkpoint_of_another_version_is_refused(version):
    with pytest.raises(StateError, match=f"has version {version!r}; this ds_lena reads version 1"):
        new().load_state_dict(trained().state_dict() | {"version": version})


def test_a_checkpoint_of_the_other_variant_is_refused():
    with pytest.raises(StateError, match=r'"variant": "default", this run has "authors-code"'):
        resumed(trained(), variant="authors-code")


# -- what users see ---------------------------------------------------------------------------------------------------


def test_the_report_before_the_first_update():
    report = new().report()
    layer = {"gain": 1, "factor": 0, "warmup": 0, "state": 0, "noise": 0, "signal": 0, "noise_scale": math.inf}
    assert report.pop("layers") == dict.fromkeys("ab", layer | {"capped": False})
    assert report == {
        "update": 0, "n": 0, "base": 1, "skipped": 0, "nonfinite": 0, "noise_scale": math.inf, "gain": 1,
    }  # fmt: skip


def test_the_report_after_an_update():
    # n = 4: layer a has s2 = 4, m2 = 3; layer b s2 = 8, m2 = -1. Both: s2 = 12, m2 = 2, r = (12 + 2) / (3 + 2).
    tracker = new(total_steps=T, max_factor=2, max_relative_gain=None)
    apply(tracker, statistics(4, [7, 7], [4, 1]), Plan(T, 4, None))
    report = tracker.report()
    assert (report["update"], report["n"], report["base"]) == (1, 4, 1)
    assert report["gain"] == approx(14 / 5)
    assert report["noise_scale"] == approx(12 / 2)
    a, b = report["layers"]["a"], report["layers"]["b"]
    assert a["gain"] == a["state"] == approx(7 / 4)
    assert (a["noise"], a["signal"], a["noise_scale"]) == approx((4, 3, 4 / 3))
    assert a["warmup"] == approx(7 / 4 / (0.05 * T * 4))
    assert a["factor"] == approx(a["gain"] ** 0.85 * a["warmup"])
    assert b["gain"] == approx(4)
    assert (b["noise"], b["signal"], b["noise_scale"]) == approx((8, -1, math.inf))
    assert b["factor"] == approx(2 * b["warmup"]), "max_factor"


def test_the_report_holds_plain_numbers():
    report = trained().report()
    assert json.loads(json.dumps(report)) == report
    assert all(type(layer["capped"]) is bool for layer in report["layers"].values())


def test_the_end_of_the_warm_ups_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger="ds_lena"):
        tracker = new(warmup_cap=0.25)
        for _ in range(60):
            apply(tracker, statistics(N, [N, 2], [1, 2]))
    (record,) = caplog.records
    assert "2 of 2 layers has ended, of 1 by warmup_cap=0.25" in record.getMessage()
    assert tracker.report()["layers"]["b"]["capped"]


def test_a_checkpoint_of_another_base_rule_is_refused():
    saved = new(base="sgd").state_dict()
    with pytest.raises(StateError, match=r'"base": "sgd".*this run has "adamw"'):
        new().load_state_dict(saved)
