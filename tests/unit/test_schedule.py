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
from ds_lena.reporting import report_of
from ds_lena.schedule import checkpoint
from ds_lena.schedule.clock import RunPlan
from ds_lena.schedule.schedule import Schedule
from tests.unit.support import config, statistics

T, N, B = 100, 8, 4
PLAN = RunPlan(total_steps=T, planned_n=N, micro_batch_size=B)
UNKNOWN = RunPlan(total_steps=T, planned_n=None, micro_batch_size=None)


def new(*names, **keys):
    names = names or ("a", "b")
    table = LayerTable(names, (3,) * len(names), tuple(range(len(names))))
    return Schedule(config(**keys), table, torch.device("cpu"))


def some(t=0, n=N, layers=2):
    """Statistics that differ from update to update and from layer to layer."""
    return statistics(n, [8 + i + 0.1 * t for i in range(layers)], [2 + 0.3 * i for i in range(layers)])


def apply(schedule, measured=None, plan=PLAN):
    proposal = schedule.propose(measured or some(layers=schedule.table.count), plan)
    schedule.commit(proposal)
    return proposal


def trained(updates=10, plan=PLAN, n=N, **keys):
    schedule = new(**keys)
    for t in range(updates):
        apply(schedule, some(t, n), plan)
    return schedule


def resumed(schedule, *names, **keys):
    """A new schedule from the checkpoint of another, as it comes back from disk."""
    file = io.BytesIO()
    torch.save(checkpoint.to_dict(schedule), file)
    file.seek(0)
    fresh = new(*names, **keys)
    checkpoint.load(fresh, torch.load(file, weights_only=True))
    return fresh


# -- one update -------------------------------------------------------------------------------------------------------


def test_a_proposal_changes_nothing():
    schedule = trained()
    before = checkpoint.to_dict(schedule), report_of(schedule)
    schedule.propose(some(77), PLAN)
    assert (checkpoint.to_dict(schedule), report_of(schedule)) == before


def test_the_same_update_can_be_proposed_again():
    schedule = trained()
    first, second = (schedule.propose(some(77), PLAN) for _ in range(2))
    assert torch.equal(first.factor, second.factor)


def test_a_committed_update_is_counted_once():
    schedule = trained(updates=3)
    assert schedule.updates == 3
    assert schedule.clock.done.item() == 3 * N
    assert report_of(schedule)["n"] == N


def test_a_skipped_update_is_counted_and_leaves_nothing_behind():
    skipping, steady = trained(), trained()
    skipping.propose(some(77), PLAN)
    skipping.skip()
    assert checkpoint.to_dict(skipping) == checkpoint.to_dict(steady) | {"skipped": 1}
    assert torch.equal(apply(skipping).factor, apply(steady).factor)


def test_the_factor_behind_the_last_layer_is_one():
    factor = new(warmup="none").propose(some(), PLAN).factor
    assert factor.shape == (3,)
    assert factor[-1] == 1


def test_statistics_that_are_not_finite_are_counted_layer_by_layer():
    schedule = new()
    apply(schedule, statistics(N, [8, math.nan], [2, 2]))
    apply(schedule, statistics(N, [math.inf, math.nan], [2, 2]))
    assert report_of(schedule)["nonfinite"] == 3


def test_the_authors_code_is_another_method():
    schedule = trained(variant="authors-code", warmup="none")
    assert schedule.state.weight.tolist() == [1, 1], "not debiased"
    assert report_of(schedule)["layers"]["a"]["gain"] != report_of(trained(warmup="none"))["layers"]["a"]["gain"]


# -- the plan: H, k, and what a run is made of ------------------------------------------------------------------------


def test_the_run_is_planned_from_its_first_update():
    schedule = trained(updates=1)
    assert schedule.clock.planned.item() == T * N
    apply(schedule, some(n=2))
    assert schedule.clock.planned.item() == T * N, "a short window does not change the plan"
    assert schedule.clock.done.item() == N + 2


def test_without_a_known_length_nothing_ends():
    schedule = new(warmup="none")
    apply(schedule, plan=RunPlan(None, None, None))
    assert schedule.clock.planned.item() == math.inf


@pytest.mark.parametrize(
    ("plan", "n", "keys", "planned"),
    [
        pytest.param(PLAN, N, {}, T * N, id="the same"),
        pytest.param(RunPlan(T, 16, B), 16, {}, 10 * N + 90 * 16, id="n"),
        pytest.param(RunPlan(T, 16, B), 3, {}, 10 * N + 90 * 16, id="n, in a short window"),
        pytest.param(RunPlan(60, N, B), N, {}, 10 * N + 50 * N, id="T"),
        pytest.param(RunPlan(5, N, B), N, {}, 10 * N, id="T, already over"),
        pytest.param(PLAN, N, {"base_batch_size": 8}, 10 * N + 90 * N / 2, id="k"),
        pytest.param(RunPlan(T, N, 8), N, {}, 10 * N + 90 * N * 2, id="b"),
    ],
)
def test_a_run_that_is_resumed_with_another_plan_goes_on_from_where_it_is(plan, n, keys, planned):
    schedule = resumed(trained(updates=10), **keys)
    apply(schedule, some(n=n), plan)
    assert schedule.clock.planned.item() == planned


def test_a_new_plan_is_made_once():
    schedule = resumed(trained(updates=10))
    for n in (16, 16, 5):
        apply(schedule, some(n=n), RunPlan(T, 16, B))
        assert schedule.clock.planned.item() == 10 * N + 90 * 16


@pytest.mark.parametrize("begin", [trained, lambda: resumed(trained())], ids=["new", "resumed"])
def test_a_plan_that_changes_without_a_resume_leaves_the_run_as_it_was_planned(begin):
    schedule = begin()
    for plan in (PLAN, RunPlan(2 * T, 16, B)):
        apply(schedule, plan=plan)
        assert schedule.clock.planned.item() == T * N


def test_the_authors_code_counts_micro_batches_whatever_they_hold():
    schedule = resumed(trained(variant="authors-code"), variant="authors-code")
    apply(schedule, plan=RunPlan(T, N, 8))
    assert schedule.clock.done.item() == 11 * N


@pytest.mark.parametrize("plan", [UNKNOWN, PLAN, RunPlan(T, 2, B)], ids=["unknown", "configured", "caller's windows"])
@pytest.mark.parametrize("first", [3, N])
def test_a_short_first_window_does_not_set_the_plan(plan, first):
    schedule = new()
    for n in (first, N, 16, 2):
        apply(schedule, some(n=n), plan)
    at_once = first == N or plan is PLAN
    assert schedule.clock.planned.item() == (T * N if at_once else first + (T - 1) * N)
    schedule = resumed(schedule)
    before = schedule.clock.planned.item()
    for n in (3, N, N):
        apply(schedule, some(n=n), plan)
        assert schedule.clock.planned.item() == before


@pytest.mark.parametrize("grown", [N, 4 * N])
def test_the_plan_of_a_batch_that_grows_is_that_of_its_first(grown):
    plan = UNKNOWN.growing_from(N)
    schedule = new()
    for n in (N, 2 * N, grown):
        apply(schedule, some(n=n), plan)
        assert schedule.clock.planned.item() == T * N
    schedule = resumed(schedule)
    for n in (4 * N, 8 * N):
        apply(schedule, some(n=n), plan)
        assert schedule.clock.planned.item() == T * N


@pytest.mark.parametrize("n", [2, 4, 16, 64])
def test_noise_and_signal_carry_over_to_another_n_and_the_gain_follows_at_once(n):
    noise, signal = torch.tensor([3.0, 0.5]), torch.tensor([0.2, 1.0])

    def window(n):
        return statistics(n, (noise + signal).tolist(), (noise / n + signal).tolist())

    schedule = new(max_relative_gain=None)
    for _ in range(5):
        apply(schedule, window(N))
    schedule = resumed(schedule, max_relative_gain=None)
    before = schedule.state.progress.clone()
    apply(schedule, window(n), RunPlan(T, n, B))
    wanted = (noise + signal) / (noise / n + signal)
    torch.testing.assert_close(schedule.state.gain, wanted.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(schedule.state.progress - before, wanted.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("n", [16, 4])
def test_where_nobody_knows_n_beforehand_a_resumed_run_is_planned_from_its_first_two_windows(n):
    schedule = resumed(trained(updates=10, plan=UNKNOWN))
    apply(schedule, some(n=n), UNKNOWN)
    at_once = 10 * N + 90 * max(n, N)
    assert schedule.clock.planned.item() == at_once
    apply(schedule, some(n=n), UNKNOWN)
    assert schedule.clock.planned.item() == (at_once if n > N else 10 * N + n + 89 * n)
    apply(schedule, some(n=2), UNKNOWN)
    assert schedule.clock.planned.item() == (at_once if n > N else 10 * N + n + 89 * n)


def test_a_short_last_window_before_a_checkpoint_does_not_change_the_plan():
    schedule = trained(updates=9, plan=UNKNOWN)
    apply(schedule, some(n=3), UNKNOWN)
    schedule = resumed(schedule)
    apply(schedule, some(n=N), UNKNOWN)
    assert schedule.clock.planned.item() == T * N


def test_without_a_base_batch_k_is_one_micro_batch():
    assert new().base_in_micro_batches(B) == 1
    assert new().base_in_micro_batches(None) == 1


def test_a_base_batch_in_samples_is_divided_by_the_micro_batch():
    schedule = new(base_batch_size=2)
    apply(schedule)
    assert schedule.clock.k == 0.5
    assert schedule.clock.planned.item() == T * N / 0.5


def test_a_base_batch_in_samples_needs_the_size_of_a_micro_batch():
    with pytest.raises(ConfigError, match=r'"base_batch_size": 32 is in samples.*"micro_batch_size"'):
        new(base_batch_size=32).propose(some(), UNKNOWN)


def test_a_resumed_run_keeps_its_base_batch_in_samples_and_derives_k_again():
    schedule = resumed(trained())
    assert checkpoint.to_dict(schedule)["base_samples"] == B
    apply(schedule, plan=RunPlan(T, N, 8))
    assert report_of(schedule)["base"] == 0.5


def test_a_base_batch_that_is_given_on_resume_wins():
    schedule = resumed(trained(), base_batch_size=16)
    apply(schedule)
    assert report_of(schedule)["base"] == 4


def test_another_micro_batch_size_rescales_the_noise_that_is_remembered():
    schedule = trained(smoothing=0.5)
    noise, signal = schedule.noise_and_signal()
    apply(schedule, statistics(1, [9, 9], [9, 9]), RunPlan(T, N, 8))  # n = 1 adds nothing new
    after_noise, after_signal = schedule.noise_and_signal()
    torch.testing.assert_close(after_noise, noise / 2)
    torch.testing.assert_close(after_signal, signal)


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys", [{}, {"warmup": "none"}, {"variant": "authors-code"}, {"base_batch_size": 8, "smoothing": 0.9}], ids=str
)
def test_a_resumed_run_goes_on_bit_for_bit(keys):
    steady = trained(**keys)
    schedule = resumed(steady, **keys)
    assert checkpoint.to_dict(schedule) == checkpoint.to_dict(steady)
    assert report_of(schedule) == report_of(steady)
    for t in range(10, 40):
        assert torch.equal(apply(schedule, some(t)).factor, apply(steady, some(t)).factor)
    assert checkpoint.to_dict(schedule) == checkpoint.to_dict(steady)


def test_a_state_of_no_updates_can_be_resumed():
    schedule = resumed(new())
    assert torch.equal(apply(schedule).factor, apply(new()).factor)


def test_the_state_is_plain_numbers_by_layer_name():
    state = checkpoint.to_dict(trained())
    assert set(state["layers"]) == {"a", "b"}
    assert json.loads(json.dumps(state)) == state


def test_a_saved_state_does_not_change_with_the_run():
    schedule = trained()
    state = checkpoint.to_dict(schedule)
    text = json.dumps(state)
    apply(schedule)
    assert json.dumps(state) == text


def test_layers_are_matched_by_name_and_not_by_place():
    steady, turned = trained(), resumed(trained(), "b", "a")
    assert report_of(turned)["layers"] == report_of(steady)["layers"]


def test_layers_that_are_not_in_the_checkpoint_start_fresh_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="ds_lena"):
        schedule = resumed(trained(), "a", "new")
    layers = report_of(schedule)["layers"]
    assert layers["a"] == report_of(trained())["layers"]["a"]
    assert layers["new"] == report_of(new("new"))["layers"]["new"]
    (record,) = caplog.records
    assert all(word in record.getMessage() for word in ("start fresh", "['new']", "['b']"))


def test_a_checkpoint_that_fits_is_loaded_without_a_word(caplog):
    resumed(trained())
    assert caplog.text == ""


@pytest.mark.parametrize("version", [None, 0, 3, "1"])
def test_a_checkpoint_of_another_version_is_refused(version):
    with pytest.raises(StateError, match=f"has version {version!r}; this ds_lena reads versions 1 to 2"):
        checkpoint.load(new(), checkpoint.to_dict(trained()) | {"version": version})


def of_layer(name, **values):
    return lambda state: state["layers"][name].update(values)


def of_tally(**values):
    return lambda state: state["tally"].update(values)


def of_moments(row, column, value):
    return lambda state: state["tally"]["moments"][row].__setitem__(column, value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: state.update(update=-5), '"update" is -5, and should be a whole number >= 0'),
        (lambda state: state.update(update=2.5), '"update" is 2.5'),
        (lambda state: state.update(update=True), '"update" is True'),
        (lambda state: state.pop("done"), '"done" is nothing'),
        (lambda state: state.update(done=math.inf), '"done" is inf'),
        (lambda state: state.update(n=math.nan), '"n" is nan'),
        (lambda state: state.update(n=math.inf), '"n" is inf'),
        (lambda state: state.update(n=True), '"n" is True'),
        (lambda state: state.update(n=torch.tensor(4.0)), '"n" is tensor(4.), and should be a finite number >= 0'),
        (lambda state: state.update(n=0.0), '"n" is 0.0 after update 10'),
        (lambda state: state.update(done=0.0), '"done" is 0.0 after update 10'),
        (lambda state: state.update(planned=None), '"planned" is None after update 10'),
        (lambda state: state.update(planned="soon"), "\"planned\" is 'soon', and should be None or a number > 0"),
        (lambda state: state.update(planned=0.0), '"planned" is 0.0'),
        (lambda state: state.update(planned_for=math.inf), '"planned_for" is inf'),
        (lambda state: state.update(base_in_micro_batches=0), '"base_in_micro_batches" is 0'),
        (lambda state: state.update(base_in_micro_batches=math.inf), '"base_in_micro_batches" is inf'),
        (lambda state: state.update(base_in_micro_batches=None), '"base_in_micro_batches" is None'),
        (lambda state: state.update(base_samples=0), '"base_samples" is 0, and should be None or a finite number > 0'),
        (lambda state: state.update(total_steps=math.inf), '"total_steps" is inf'),
        (lambda state: state.update(planned_n=0), '"planned_n" is 0'),
        (lambda state: state.update(micro_batch_size=-1), '"micro_batch_size" is -1'),
        (lambda state: state.update(layers=[]), '"layers" is []'),
        (lambda state: state["layers"].update(a=None), 'in layer "a" "averages" is nothing'),
        (lambda state: state["layers"]["a"]["averages"].__setitem__(0, math.nan), 'in layer "a" "averages" is [nan'),
        (lambda state: state["layers"]["b"].pop("gain"), 'in layer "b" "gain" is nothing'),
        (lambda state: state["layers"]["b"]["averages"].pop(), 'in layer "b" "averages" is ['),
        (of_layer("a", weight=-3.0), 'in layer "a" "weight" is -3.0, and should be a number in [0, 1]'),
        (of_layer("a", weight=1.5), 'in layer "a" "weight" is 1.5'),
        (of_layer("a", progress=-1.0), 'in layer "a" "progress" is -1.0'),
        (of_layer("a", gain=0.5), 'in layer "a" "gain" is 0.5, and should be a finite number >= 1'),
        (of_layer("b", warmup=2.0), 'in layer "b" "warmup" is 2.0'),
        (of_layer("b", capped=7), 'in layer "b" "capped" is 7, and should be true or false'),
        (lambda state: state.update(tally=None), 'in "tally" "moments" is nothing'),
        (lambda state: state["tally"].pop("samples"), 'in "tally" "samples" is nothing'),
        (lambda state: state["tally"]["moments"].pop(), 'in "tally" "moments" is [['),
        (of_moments(2, 1, math.nan), 'in "tally" "moments" is [['),
        (of_moments(1, 1, -1.0), 'in "tally" "moments" is [['),
        (of_moments(0, 0, 1.1), 'in "tally" "moments" is [[1.1'),
        (of_tally(squares=-0.5), 'in "tally" "squares" is -0.5'),
        (of_tally(micro_batches=math.inf), 'in "tally" "micro_batches" is inf'),
        (lambda state: state.update(n=10**400), '"n" is 1000'),
        (lambda state: state.pop("base"), '"base" is nothing'),
        (lambda state: state.update(base="adam"), "\"base\" is 'adam', and should be one of adamw, sgd, lars, lamb"),
        (lambda state: state.update(variant=[]), '"variant" is [], and should be one of default, authors-code'),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_nothing_changes(change, told):
    state, schedule = checkpoint.to_dict(trained()), new()
    before = report_of(schedule)
    change(state)
    with pytest.raises(StateError) as raised:
        checkpoint.load(schedule, state)
    assert told in str(raised.value) and "Restore the file" in str(raised.value)
    assert report_of(schedule) == before


def test_a_state_that_is_no_dictionary_is_refused():
    with pytest.raises(StateError, match=r"LENA state is 'text', and no dictionary"):
        checkpoint.load(new(), "text")


def written(**keys):
    """What runs have remembered: before the first update, after one, and after more with other numbers."""
    schedule = new(**keys)
    yield schedule
    for n, mean_square, square_of_mean in [(1, [1, 0], [1, 0]), (2000, [3, 1], [3, 1 + 1e-9]), (4, [7, 7], [4, 1])]:
        apply(schedule, statistics(n, mean_square, square_of_mean), RunPlan(keys.get("total_steps"), n, None))
        yield schedule


@pytest.mark.parametrize("keys", [
    {"total_steps": T}, {"warmup": "none"}, {"smoothing": 0.0}, {"smoothing": 0.99, "scaling": "sqrt"},
    {"variant": "authors-code", "total_steps": T}, {"variant": "authors-code", "warmup": "none"},
])  # fmt: skip
def test_all_that_a_run_writes_is_whole(keys):
    """Without noise, with noise below 0 by rounding, without an end, and with the authors' averages below 0."""
    for schedule in written(**keys):
        state = checkpoint.to_dict(schedule)
        assert checkpoint.require_whole(json.loads(json.dumps(state))) == state
        without = {key: value for key, value in state.items() if key != "tally"} | {"version": 1}
        assert checkpoint.require_whole(without) is without


def test_a_checkpoint_of_the_other_variant_is_refused():
    with pytest.raises(StateError, match=r'"variant": "default", this run has "authors-code"'):
        resumed(trained(), variant="authors-code")


# -- what users see ---------------------------------------------------------------------------------------------------


def test_the_report_before_the_first_update():
    report = report_of(new())
    layer = {"gain": 1, "factor": 0, "warmup": 0, "state": 0, "noise": 0, "signal": 0, "noise_scale": math.inf}
    assert report.pop("layers") == dict.fromkeys("ab", layer | {"capped": False})
    assert report == {
        "update": 0, "n": 0, "base": 1, "skipped": 0, "nonfinite": 0, "noise_scale": math.inf, "gain": 1,
    }  # fmt: skip


def test_the_report_after_an_update():
    # n = 4: layer a has s2 = 4, m2 = 3; layer b s2 = 8, m2 = -1. Both: s2 = 12, m2 = 2, r = (12 + 2) / (3 + 2).
    schedule = new(total_steps=T, max_factor=2, max_relative_gain=None)
    apply(schedule, statistics(4, [7, 7], [4, 1]), RunPlan(T, 4, None))
    report = report_of(schedule)
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
    report = report_of(trained())
    assert json.loads(json.dumps(report)) == report
    assert all(type(layer["capped"]) is bool for layer in report["layers"].values())


def test_the_end_of_the_warm_ups_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger="ds_lena"):
        schedule = new(warmup_cap=0.25)
        for _ in range(60):
            apply(schedule, statistics(N, [N, 2], [1, 2]))
    (record,) = caplog.records
    assert "2 of 2 layers has ended, of 1 by warmup_cap=0.25" in record.getMessage()
    assert report_of(schedule)["layers"]["b"]["capped"]


def test_a_checkpoint_of_another_base_rule_is_refused():
    saved = checkpoint.to_dict(new(base="sgd"))
    with pytest.raises(StateError, match=r'"base": "sgd".*this run has "adamw"'):
        checkpoint.load(new(), saved)
