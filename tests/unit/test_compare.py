"""The comparison harness without training: plans, searches, the order of runs, schedules, tables."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from examples.common.errors import InputError
from examples.compare import allowed, jobs, search, summary
from examples.compare.jobs import Job
from examples.compare.models import ARCHITECTURES
from examples.compare.optimizers import OPTIMIZERS, build, windows
from examples.compare.pictures import draw
from examples.compare.plan import read
from examples.compare.records import RESULTS, Records
from examples.compare.tables import tables
from examples.compare.training import KINDS

ROOT = Path(__file__).parents[2]
PLAN = """
tasks:
  toy:
    kind: language
    model: {architecture: gpt2, layers: 1, width: 8, heads: 2, initializer_range: 0.02}
    data: {vocab_size: 258, sequence_length: 8, blocks_per_micro_batch: 1, evaluation_blocks: 8}
    micro_batches: 64
    evaluations: 4
    settings: {weight_decay: 0.1}
methods:
  one: {optimizer: adamw, search: {lr: {log: [0.001, 0.01]}}}
  rival: {optimizer: adamw, settings: {lr_power: 0.5}, search: {warmup_fraction: {uniform: [0, 1]}}}
  fixed: {optimizer: adamw, settings: {lr_power: 0.5, warmup_fraction: 0.1}}
studies:
  small: {task: toy, n: 1, methods: [one], trials: 3, seeds: [1, 2]}
  large: {task: toy, n: 8, base: small, methods: [rival, fixed], trials: 3, seeds: [1, 2]}
  other: {task: toy, n: 16, base: small, settings_of: large, methods: [rival], seeds: [1]}
"""


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "studies.yaml"
    path.write_text(PLAN)
    return read(path)


@pytest.fixture
def records(tmp_path, plan):
    return Records(tmp_path / "results", plan)


def finish(records, job, loss, tried=None, curve=()):
    """Write the record of a run that never was."""
    records.add(
        job.study.name,
        {
            "job": job.name,
            "method": job.method.name,
            "trial": job.trial,
            "seed": job.seed,
            "split": job.split,
            "loss": loss,
            "tried": tried or {},
            "settings": tried or {},
            "curve": list(curve),
            "digest": job.study.digest(job.method),
        },
    )


def finish_base(records, plan):
    small = plan["small"]
    for trial, (lr, loss) in enumerate([(0.001, 3.0), (0.002, 2.0), (0.003, None)]):
        finish(records, Job(small, small.methods[0], 0, trial), loss, {"lr": lr})


def finish_single_worker(records, plan):
    """With its seeds; losses 4, 3, 2, 1 after the quarters of the run."""
    finish_base(records, plan)
    small = plan["small"]
    for seed in small.seeds:
        curve = [(16 * i, 16 * i, 5.0 - i) for i in range(1, 5)]
        finish(records, Job(small, small.methods[0], seed), 1.0, curve=curve)


# -- plan --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("base: small", "base: tiny", "nothing is called 'tiny'"),
        ("task: toy, n: 8", "task: joy, n: 8", "nothing is called 'joy'"),
        ("[rival, fixed]", "[rivals]", "nothing is called 'rivals'"),
        ("trials: 3", "trails: 3", "trails"),
        ("kind: language", "kind: languages", "task toy: no kind is called languages; there are images, language"),
        ("architecture: gpt2", "architecture: gpt3", "task toy: no architecture is called gpt3; there are bert, gpt2"),
        ("architecture: gpt2, ", "", "task toy: architecture of model is missing"),
        ("width: 8", "widths: 8", "task toy: no entry of model is called widths;"),
        ("sequence_length", "length", "task toy: no entry of data is called length;"),
        ("weight_decay", "weight_decays", "task toy: no setting is called weight_decays;"),
        ("micro_batches: 64", "micro_batches: 0", "task toy: micro_batches is 0; a whole number of 1 or more"),
        ("    micro_batches: 64\n", "", "task toy: micro_batches is missing"),
        ("n: 8", "n: 0", "study large: n is 0; a whole number of 1 or more"),
        ("n: 8", "n: 2.5", "study large: n is 2.5;"),
        ("n: 8, ", "", "study large: n is missing"),
        ("seeds: [1]", "seeds: [0]", "study other: a seed is 0;"),
        ("seeds: [1]", "seeds: [1, 1]", "study other: one of 1, 1 is there twice"),
        ("[rival, fixed]", "[rival, rival]", "study large: one of rival, rival is there twice"),
        ("[rival, fixed]", "rival", "study large: methods is 'rival'; a list is needed"),
        ("seeds: [1]", "split: tests, seeds: [1]", "study other: no split is called tests; there are test, validation"),
        (
            "trials: 3, seeds: [1, 2]}\n  other",
            "seeds: [1, 2]}\n  other",
            "large: rival is searched, but large has no trials",
        ),
        ("settings_of: large", "settings_of: small", "other: rival is searched, but small has no trials for it"),
        (
            "seeds: [1]}",
            "seeds: [1]}\n  last: {task: toy, n: 4, settings_of: other, methods: [fixed]}",
            "which has them of",
        ),
        ("n: 8, base: small", "n: 8", "study large: rival has no lr, of its own or of a base"),
        ("rival: {optimizer: adamw", "rival: {optimizer: muon", "method rival: muon_lr is missing"),
        ("{log: [0.001", "{log: [0.1", "method one: the space for lr is log [0.1, 0.01]; it needs two numbers"),
        ("{log: [0.001", "{log: [0", "both above 0"),
        ("{uniform: [0, 1]}", "{choice: []}", "it needs at least one value"),
        ("search: {warmup_fraction: {uniform: [0, 1]}}", "search: []", "method rival"),
        ("fixed: {optimizer: adamw", "fixed: {optimizer: adam", "method fixed: no optimizer is called adam;"),
        ("warmup_fraction: 0.1", "warmup: 0.1", "method fixed: no setting is called warmup;"),
        ("{log: [0.001", "{logg: [0.001", "method one: no space for lr is called {'logg': "),
        ("{log: [0.001, 0.01]}", "0.001", "method one: no space for lr is called 0.001"),
        ("{log: [0.001, 0.01]}", "log", "method one: no space for lr is called log; there are choice, log, uniform"),
        (
            "{optimizer: adamw, settings: {lr_power: 0.5, w",
            "{optimizer: lena, settings: {layer: all, w",
            'LENA: "layer"',
        ),
        (
            "rival: {optimizer: adamw, settings: {lr_power: 0.5}, search: {warmup_fraction: {uniform: [0, 1]}}",
            "rival: {optimizer: lena, search: {gain_power: {uniform: [-1, 1]}}",
            'method rival: LENA: "gain_power"',
        ),
        (
            "fixed: {optimizer: adamw, settings: {lr_power: 0.5, w",
            "fixed: {optimizer: lena, settings: {total_steps: 9, w",
            "no setting is called total_steps",
        ),
        ("seeds: [1]", "seeds: 3", "study other: seeds is 3; a list is needed"),
        ("tasks:", "task:", "tasks, methods and studies are needed"),
        ("tasks:", "tasks: [", "not YAML"),
        (PLAN, "", "tasks, methods and studies are needed"),
        (PLAN, "{tasks: {}, methods: {}, studies: {}}", "no studies"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(tmp_path, old, new, words):
    path = tmp_path / "studies.yaml"
    path.write_text(PLAN.replace(old, new))
    with pytest.raises(InputError, match=re.escape(words)) as refused:
        read(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(("content", "words"), [(None, "No such file"), (b"\xff\xfe\x00", "not YAML")])
def test_a_plan_that_cannot_be_read_is_refused(tmp_path, content, words):
    path = tmp_path / "studies.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        read(path)


def test_what_may_be_said_is_what_is_there():
    assert allowed.SETTINGS.keys() == OPTIMIZERS.keys() and allowed.MODELS.keys() == KINDS.keys()
    assert allowed.MODELS.keys() == allowed.DATA.keys()
    assert set(allowed.ARCHITECTURES) == ARCHITECTURES.keys()


def test_every_setting_of_a_definition_changes_its_digest(plan, tmp_path):
    before = {(s.name, m.name): s.digest(m) for s in plan.values() for m in s.methods}
    path = tmp_path / "other.yaml"
    path.write_text(PLAN.replace("micro_batches: 64", "micro_batches: 65"))
    after = {(s.name, m.name): s.digest(m) for s in read(path).values() for m in s.methods}
    assert all(before[key] != after[key] for key in before)


# -- search ------------------------------------------------------------------------------------------------------------

SPACE = {
    "lr": {"log": [1e-4, 1e-2]},
    "warmup_fraction": {"uniform": [0.1, 0.5]},
    "beta2": {"choice": [0.95, 0.99, None]},
}


def test_a_suggestion_depends_on_the_trials_alone():
    seen = [(search.suggest(SPACE, i, []), 3.0 - i / 10) for i in range(8)]
    assert search.suggest(SPACE, 8, seen) == search.suggest(SPACE, 8, seen)
    assert search.suggest(SPACE, 8, seen) != search.suggest(SPACE, 9, seen)


def test_suggestions_lie_in_the_space_and_follow_the_losses():
    seen = []
    for trial in range(30):
        found = search.suggest(SPACE, trial, seen)
        assert 1e-4 <= found["lr"] <= 1e-2 and 0.1 <= found["warmup_fraction"] <= 0.5
        assert found["beta2"] in (0.95, 0.99, None)
        off = abs(math.log10(found["lr"] / 3e-3))
        seen.append((found, None if off > 1 else off))
    late = [abs(math.log10(found["lr"] / 3e-3)) for found, _ in seen[15:]]
    assert sum(late) / len(late) < 0.35  # at random it would be 0.6


# -- jobs --------------------------------------------------------------------------------------------------------------


def test_all_runs_are_asked_for_method_by_method(plan):
    names = [f"{job.study.name}/{job.name}" for job in jobs.all_jobs(plan)]
    assert names[:5] == [f"small/one/{run}" for run in ("trial-0", "trial-1", "trial-2", "seed-1", "seed-2")]
    assert names[5:8] == [f"large/rival/trial-{i}" for i in range(3)]
    assert names[-3:] == ["other/rival/seed-1", "large/fixed/seed-1", "large/fixed/seed-2"]


@pytest.mark.parametrize(
    ("wanted", "needed"),
    [
        ({"small"}, {"small/one"}),
        ({"large"}, {"small/one", "large/rival", "large/fixed"}),
        ({"other"}, {"small/one", "large/rival/trial", "other/rival"}),  # neither the seeds of `large` nor `fixed`
    ],
)
def test_what_a_study_needs_is_run_with_it(plan, wanted, needed):
    names = [f"{job.study.name}/{job.name}" for job in jobs.needed_jobs(wanted, plan)]
    every = [f"{job.study.name}/{job.name}" for job in jobs.all_jobs(plan)]
    assert names == [name for name in every if name.startswith(tuple(needed))]


def test_trials_never_see_the_test_split(plan):
    assert {job.split for job in jobs.all_jobs(plan) if job.trial is not None} == {"validation"}
    assert {job.split for job in jobs.all_jobs(plan) if job.trial is None} == {"test"}


def test_runs_wait_for_what_they_depend_on(plan, records):
    small, large = plan["small"], plan["large"]
    (one,), (rival, fixed) = small.methods, large.methods

    def ready(job):
        return jobs.settings(job, plan, records) is not None

    assert ready(Job(small, one, 0, 0)) and ready(Job(small, one, 0, 1))  # two at a time
    assert not ready(Job(small, one, 0, 2))
    assert not ready(Job(large, rival, 0, 0)) and not ready(Job(large, fixed, 1))
    finish_base(records, plan)
    assert ready(Job(large, rival, 0, 0)) and ready(Job(large, fixed, 1))
    assert not ready(Job(large, rival, 1)) and not ready(Job(plan["other"], rival, 1))
    for trial in range(3):
        finish(records, Job(large, rival, 0, trial), 3 - trial, {"warmup_fraction": trial / 10})
    assert ready(Job(large, rival, 1)) and ready(Job(plan["other"], rival, 1))


def test_settings_come_from_task_base_method_and_trials(plan, records):
    finish_base(records, plan)
    large = plan["large"]
    rival, fixed = large.methods
    for trial, loss in enumerate([2.0, 1.0, 3.0]):
        finish(records, Job(large, rival, 0, trial), loss, {"warmup_fraction": trial / 10})
    expected = {"weight_decay": 0.1, "lr": 0.002, "lr_power": 0.5, "warmup_fraction": 0.1}
    assert jobs.settings(Job(large, rival, 1), plan, records) == expected
    assert jobs.settings(Job(large, fixed, 1), plan, records) == expected
    assert jobs.settings(Job(plan["other"], rival, 1), plan, records) == expected


def test_a_single_worker_hands_on_an_lr_that_is_fixed(tmp_path):
    path = tmp_path / "studies.yaml"
    path.write_text(PLAN.replace("search: {lr: {log: [0.001, 0.01]}}}", "settings: {lr: 0.5, clip: 2.0}}"))
    plan = read(path)
    large = plan["large"]
    found = jobs.settings(Job(large, large.method("fixed"), 1), plan, Records(tmp_path, plan))
    assert found == {"weight_decay": 0.1, "lr": 0.5, "lr_power": 0.5, "warmup_fraction": 0.1}


def test_records_survive_and_a_torn_line_does_not_count(plan, records, tmp_path):
    finish_base(records, plan)
    path = tmp_path / "results" / "small.jsonl"
    assert Records(tmp_path / "results", plan).of("small") == records.of("small")
    path.write_text(path.read_text()[:-20])
    assert len(Records(tmp_path / "results", plan).of("small")) == 2


@pytest.mark.parametrize("line", ["<<<<<<< HEAD", "5"])
def test_a_broken_line_among_the_records_is_refused(plan, records, tmp_path, line):
    finish_base(records, plan)
    path = tmp_path / "results" / "small.jsonl"
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([first, line, *others]))
    with pytest.raises(InputError, match="line 2 is no record"):
        Records(tmp_path / "results", plan)


def test_runs_older_than_the_choice_of_the_trials_are_refused(plan, records):
    finish_base(records, plan)
    small = plan["small"]
    finish(records, Job(small, small.methods[0], 1), 1.0, {"weight_decay": 0.1, "lr": 0.002})
    for trial in range(3):
        records.of("small")[f"one/trial-{trial}"]["settings"]["weight_decay"] = 0.1
    jobs.refuse_outdated(plan, records)
    records.of("small")["one/trial-0"]["loss"] = 1.5  # as if this trial, with lr 0.001, had come later
    with pytest.raises(InputError, match=re.escape("small one/seed-1 was run with lr 0.002, which would be 0.001")):
        jobs.refuse_outdated(plan, records)
    records.of("small")["one/trial-0"]["loss"] = 3.0
    records.of("small")["one/trial-1"]["settings"]["weight_decay"] = 0.2
    with pytest.raises(InputError, match=re.escape("small one/trial-1 was run with weight_decay 0.2")):
        jobs.refuse_outdated(plan, records)


def test_records_of_another_definition_are_refused(plan, records, tmp_path):
    finish_base(records, plan)
    path = tmp_path / "studies.yaml"
    path.write_text(PLAN.replace("log: [0.001, 0.01]", "log: [0.001, 0.1]"))
    with pytest.raises(InputError, match="records of one were made by another definition"):
        Records(tmp_path / "results", read(path))


# -- optimizers --------------------------------------------------------------------------------------------------------

SETTINGS = {"lr": 0.01, "beta2": 0.99, "weight_decay": 0.1, "warmup_fraction": 0.25, "muon_lr": 0.01}


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.hidden, self.head = nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 8)

    def get_output_embeddings(self):
        return self.head

    def forward(self, x):
        return self.head(torch.tanh(self.hidden(self.embedding(x))))


def toy_steps(name, settings, updates=4, n=2):
    model = Toy()
    contestant = build(name, settings, model, n, updates)
    data = torch.arange(8)
    contestant.mode(training=True)
    for t in range(updates):
        for i in range(n):
            (nn.functional.cross_entropy(model(data[i::n]), data[i::n].flip(0)) / n).backward()
        contestant.set_lr(t / updates, (t + 1) / updates)
        contestant.step()
    return model


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_moves_every_parameter(name):
    before, after = Toy().state_dict(), toy_steps(name, SETTINGS).state_dict()
    assert all((before[key] != after[key]).any() for key in before)


def test_lena_that_scales_nothing_is_the_adamw_of_the_rivals():
    settings = SETTINGS | {"warmup_fraction": 0.5}
    lena = toy_steps("lena", settings | {"scaling": "none", "warmup": "fixed"}).state_dict()
    adamw = toy_steps("adamw", settings).state_dict()
    for key in adamw:
        torch.testing.assert_close(lena[key], adamw[key], rtol=1e-6, atol=1e-7)


def test_muon_gets_hidden_matrices_and_adamw_the_rest():
    muon, adamw = build("muon", SETTINGS, Toy(), 1, 4).optimizers
    assert [p.shape for group in muon.param_groups for p in group["params"]] == [(4, 4)]
    assert sum(len(group["params"]) for group in adamw.param_groups) == 4
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.1, 0.0]


def test_muon_steps_by_lenas_factors():
    settings = SETTINGS | {"warmup": "fixed", "warmup_fraction": 0.5}
    ending = toy_steps("lena-muon", settings | {"scaling": "none"}).state_dict()
    alone = toy_steps("muon", settings).state_dict()  # the same where LENA scales nothing
    for key in alone:
        torch.testing.assert_close(ending[key], alone[key], rtol=1e-6, atol=1e-7)

    faster = toy_steps("lena-muon", settings | {"scaling": "linear"}).state_dict()
    twice = toy_steps("muon", settings | {"lr_power": 1.0, "muon_lr": 2 * settings["muon_lr"]}).state_dict()
    for key in twice:
        torch.testing.assert_close(faster[key], twice[key], rtol=1e-6, atol=1e-7)


def test_lr_warms_up_and_falls_to_a_tenth():
    contestant = build("adamw", SETTINGS | {"lr_power": 0.5}, Toy(), 16, 100)
    rates = []
    for t in range(100):
        contestant.set_lr(t / 100, (t + 1) / 100)
        rates.append(contestant.optimizers[0].param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.04 / 25)
    assert max(rates) < 0.04 and rates.index(max(rates)) in (23, 24)
    assert rates[-1] == pytest.approx(0.004, rel=1e-2)


def test_a_batch_that_grows_does_so_by_powers_of_two_and_ends_at_the_budget():
    assert windows({}, 32, 100) == [32, 32, 32, 4]
    grown = windows({"full_batch_at": 0.5}, 32, 1024)
    assert sum(grown) == 1024 and grown[0] == 1 and grown[-2] == 32
    assert grown[:-1] == sorted(grown[:-1]) and set(grown[:-1]) == {1, 2, 4, 8, 16, 32}
    reached = sum(size for size in grown[: grown.index(32)])
    assert reached == pytest.approx(512, abs=32)


# -- summary -----------------------------------------------------------------------------------------------------------


def test_updates_to_a_target_lie_on_the_line_between_two_evaluations():
    curve = [(10, 80, 5.0), (20, 160, 3.0), (30, 240, 2.0)]
    assert summary.updates_to(curve, 4.0) == pytest.approx(15)
    assert summary.updates_to(curve, 4.0, column=1) == pytest.approx(120)
    assert summary.updates_to(curve, 6.0) == 10
    assert summary.updates_to(curve, 1.0) is None


def test_a_table_has_methods_with_all_their_seeds_only(plan, records):
    large = plan["large"]
    finish_single_worker(records, plan)
    for seed in (1, 2):
        loss = None if seed == 2 else 2.5
        finish(records, Job(large, large.method("fixed"), seed), loss, curve=[(4, 32, 4.0), (8, 64, 2.5)])
    finish(records, Job(large, large.method("rival"), 1), 2.0, curve=[(8, 64, 2.0)])
    text = tables(plan, records)
    assert "updates to 4.000 | updates to 4.000 | updates to 3.000" in text
    assert "| fixed | 1 of 2 diverged | 4 ± 0 | 4 ± 0 | 7 ± 0 | 0 |" in text
    assert "| rival |" not in text


def test_a_table_counts_micro_batches_where_the_batch_grew_and_bears_a_seed_that_never_was_evaluated(
    plan, records, tmp_path
):
    large = plan["large"]
    finish_single_worker(records, plan)
    for seed in (1, 2):
        finish(records, Job(large, large.method("fixed"), seed), None)
        finish(records, Job(large, large.method("rival"), seed), 2.0, curve=[(10, 32, 4.0), (14, 64, 2.0)])
    text = tables(plan, records)
    assert "| fixed | 2 of 2 diverged | not reached | not reached | not reached | 0 |" in text
    assert "| rival | 2.000 ± 0.000 | 10 ± 0 (32 micro-batches) |" in text
    draw(plan, records, tmp_path)
    assert (tmp_path / "large.png").exists()


def test_trials_are_told_where_another_study_made_them(plan, records):
    large, other = plan["large"], plan["other"]
    finish_single_worker(records, plan)
    for trial in range(3):
        finish(records, Job(large, large.method("rival"), 0, trial), 2.0, {"warmup_fraction": 0.1})
    finish(records, Job(other, other.method("rival"), 1), 2.0, curve=[(1, 16, 2.0)])
    (row,) = [line for line in tables(plan, records).splitlines() if line.startswith("| rival | 2.000 ±")]
    assert row.endswith("| 3 |  |"), row


def test_a_picture_needs_a_run_that_came_to_its_end(plan, records, tmp_path):
    small, large = plan["small"], plan["large"]
    for seed in (1, 2):
        finish(records, Job(small, small.methods[0], seed), None)
        finish(records, Job(large, large.method("fixed"), seed), None)
    draw(plan, records, tmp_path)
    assert summary.targets(small, records) == [] and not list(tmp_path.glob("*.png"))


# -- the results in the repository -------------------------------------------------------------------------------------


def test_results_belong_to_the_studies_and_the_tables_to_the_results():
    studies = read()
    records = Records(RESULTS, studies)  # refuses records of another definition
    jobs.refuse_outdated(studies, records)
    assert (RESULTS / "tables.md").read_text() == tables(studies, records)
    for study in studies.values():
        for record in records.of(study.name).values():
            assert {"command", "commit", "versions", "settings", "curve"} <= record.keys(), json.dumps(record)[:80]


SPREAD = re.compile(r"\d+(?:\.\d+)? ± \d+(?:\.\d+)?")


def test_the_documents_cite_what_the_tables_say():
    tables = (RESULTS / "tables.md").read_text()
    cited = SPREAD.findall((ROOT / "docs" / "comparison.md").read_text())
    readme = (ROOT / "README.md").read_text().split("## Does it help?")[1].split("\n## ")[0]
    cited += re.findall(r"\d\.\d{3}", readme)
    assert len(cited) > 20
    assert [figure for figure in cited if figure not in tables] == []


def test_a_row_of_the_documents_has_the_figures_of_its_method():
    tables = (RESULTS / "tables.md").read_text().splitlines()
    comparison = (ROOT / "docs" / "comparison.md").read_text()
    rows = re.findall(r"^\|[^|\n]*`([^`\n]+)`[^|\n]*\|(.*)$", comparison, re.MULTILINE)
    assert len(rows) > 40
    for method, row in rows:
        own = "\n".join(line for line in tables if line.startswith(f"| {method} |"))
        assert own and [figure for figure in SPREAD.findall(row) if figure not in own] == [], method
