"""The comparison without training: studies, settings, optimizers, schedules, models, tables, the kept results."""

import math
import re
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import torch
from datasets import Dataset
from optuna.distributions import CategoricalDistribution, FloatDistribution
from torch import nn
from torch.nn.functional import cross_entropy

from examples.common.blocks import train_tokenizer
from examples.common.errors import InputError
from examples.compare import language, tables
from examples.compare.front import at, fronts
from examples.compare.language import Language
from examples.compare.optimizers import OPTIMIZERS, build, windows
from examples.compare.pictures import draw
from examples.compare.plan import Method, Study, read
from examples.compare.runs import RESULTS, Runs, Stage, stages

ROOT = Path(__file__).parents[2]
TOY = Language(name="toy", architecture="gpt2", micro_batches=64, evaluations=4, settings={"weight_decay": 0.1})
ONE = Method("one", "adamw", {}, {"lr": FloatDistribution(0.001, 0.01, log=True)})
RIVAL = Method("rival", "adamw", {"lr_power": 0.5}, {"warmup_fraction": FloatDistribution(0, 1)})
FIXED = Method("fixed", "adamw", {"lr_power": 0.5, "warmup_fraction": 0.1})
SMALL = Study(name="small", task=TOY, n=1, methods=(ONE,), trials=3, seeds=(1, 2))
LARGE = Study(name="large", task=TOY, n=8, base=SMALL, methods=(RIVAL, FIXED), trials=3, seeds=(1, 2))
OTHER = Study(name="other", task=TOY, n=16, base=SMALL, settings_of=LARGE, methods=(RIVAL,), seeds=(1,))
ALL = (SMALL, LARGE, OTHER)


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


def finish(runs, stage, *curves):
    """Runs that never were: a curve of (update, loss) for each, or None for one that diverged at once."""
    for curve in curves:
        study, trial = runs.begin(stage, runs.settings(stage))
        for update, loss in curve or []:
            trial.report(loss, update)
        study.tell(trial, curve[-1][1] if curve else None, state=optuna.trial.TrialState(1 if curve else 2))


def finish_trials(runs, study, method, *losses):
    finish(runs, Stage(study, method, tunes=True), *(loss and [(1, loss)] for loss in losses))


def finish_single_worker(runs):
    """Its trials, and its seeds, with losses 4, 3, 2, 1 after the quarters of the run."""
    finish_trials(runs, SMALL, ONE, 3.0, 2.0, None)
    finish(runs, Stage(SMALL, ONE, tunes=False), *[[(16 * i, 5.0 - i) for i in range(1, 5)]] * 2)


def parameters(runs, study, method):
    return [run.params for run in runs.of(Stage(study, method, tunes=True))]


# -- plan --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: replace(TOY, architecture="gpt3"), "task toy: architecture is gpt3, not gpt2 or modernbert or llama"),
        (lambda: replace(LARGE, n=0), "study large: n is 0; 1 or more is needed"),
        (lambda: replace(LARGE, seeds=(0,)), "study large: seeds are (0,); 1 and more are needed"),
        (lambda: replace(LARGE, seeds=()), "study large: seeds are ();"),
        (lambda: replace(LARGE, seeds=(1, 1)), "study large: one of (1, 1) is there twice"),
        (lambda: replace(LARGE, methods=(RIVAL, RIVAL)), "study large: one of ['rival', 'rival'] is there twice"),
        (lambda: replace(LARGE, trials=0), "large: rival has something to search, and large no trials for it"),
        (lambda: replace(OTHER, settings_of=SMALL), "other: rival has something to search, and small no trials"),
        (lambda: replace(RIVAL, optimizer="adam"), "method rival: no optimizer is called adam; there are adamw, sgd"),
        (lambda: replace(RIVAL, optimizer="muon"), "method rival: muon_lr is missing"),
        (lambda: replace(FIXED, settings={"warmup": 0.1}), "method fixed: no setting is called warmup;"),
        (lambda: Method("l", "lena", {"layer": "all"}), 'method l: LENA: "layer"'),
        (lambda: Method("l", "lena", {"layers": "all"}), '"layers"'),
        (lambda: Method("l", "lena", {"muon_lr": 1}), "method l: no setting is called muon_lr"),
        (lambda: Method("l", "lena", {"total_steps": 9}), "total_steps"),
        (lambda: Method("l", "lena", {}, {"gain_power": FloatDistribution(-1, 1)}), 'method l: LENA: "gain_power"'),
        (lambda: Method("g", "adamw", {"growth_factor": 0}), 'method g: BatchGrowth: "factor": 0 is not allowed'),
        (lambda: Method("g", "adamw", {"growth_factor": 1, "full_batch_at": 1}), "method g: a batch grows by one of"),
        (lambda: Method("g", "adamw", {"norm_test": 1.5}), "method g: norm_test is between 0 and 1"),
        (lambda: Method("g", "lena", {"norm_test": 0.5}), "method g: norm_test is between 0 and 1, and not for a LENA"),
        (lambda: Method("l", "lena", {}, {"layer": CategoricalDistribution(["model", "all"])}), 'LENA: "layer"'),
    ],
)
def test_a_plan_that_cannot_be_is_refused(make, words):
    with pytest.raises(InputError, match=re.escape(words)):
        make()


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "No such file"), ("", "STUDIES, a list of studies"), ("STUDIES = []", "STUDIES, a list of studies")],
)
def test_a_file_without_studies_is_refused(tmp_path, content, words):
    path = tmp_path / "studies.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=words):
        read(path)


def test_a_study_made_from_another_one_differs_in_what_is_said_alone():
    studies = read()
    assert studies["bert-128-keys"].n == 128
    gpt, bert = studies["gpt-128-keys"], studies["bert-128-keys"]
    assert bert == replace(gpt, name="bert-128-keys", task=studies["bert-1"].task, base=studies["bert-1"])
    assert [studies[f"fashion-{n}"].n for n in (8, 16, 32, 64, 128)] == [8, 16, 32, 64, 128]


def test_no_settings_of_the_repository_hang_on_how_a_parser_merges():
    files = [path for kind in ("yaml", "yml", "json") for path in ROOT.glob(f"[!.]*/**/*.{kind}")]
    files = [path for path in files if path.relative_to(ROOT).parts[0] != "outputs"]
    assert len(files) > 10 and [path for path in files if "<<" in path.read_text()] == []


# -- runs --------------------------------------------------------------------------------------------------------------


def test_trials_never_see_the_test_split():
    assert {stage.split for stage in stages(ALL) if stage.tunes} == {"validation"}
    assert {stage.split for stage in stages(ALL) if not stage.tunes} == {"test"}


def test_what_a_study_needs_is_run_before_it():
    needed = [f"{stage.study.name} {stage.name}" for stage in stages([OTHER])]
    small, large = (
        ["small one/trials", "small one/seeds"],
        ["large rival/trials", "large rival/seeds", "large fixed/seeds"],
    )
    assert needed == [*small, *large, "other rival/seeds"]
    assert stages(ALL) == stages([OTHER]) and stages([LARGE]) == stages([OTHER])[:-1]


def test_trials_follow_the_losses_and_depend_on_what_was_tried_alone(tmp_path):
    wide = Method("wide", "adamw", {}, {"lr": FloatDistribution(1e-4, 1e-2, log=True)})
    study, found = replace(SMALL, methods=(wide,), trials=30), []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        runs, stage = Runs(folder), Stage(study, wide, tunes=True)
        for _ in range(study.trials):
            optuna_study, trial = runs.begin(stage, runs.settings(stage))
            optuna_study.tell(trial, abs(math.log10(trial.params["lr"] / 3e-3)))
        found.append([run.params["lr"] for run in runs.of(stage)])
    assert found[0] == found[1] and len(set(found[0])) == study.trials
    assert sum(abs(math.log10(lr / 3e-3)) for lr in found[0][15:]) / 15 < 0.35  # at random it would be 0.6


def test_settings_come_from_task_base_method_and_trials(runs):
    rival, taken = Stage(LARGE, RIVAL, tunes=False), Stage(OTHER, RIVAL, tunes=False)
    assert runs.settings(Stage(LARGE, RIVAL, tunes=True)) is None
    finish_trials(runs, SMALL, ONE, 3.0, 2.0)
    assert runs.settings(Stage(LARGE, FIXED, tunes=False)) is None, "a trial is missing"
    finish_trials(runs, SMALL, ONE, None)  # a run that diverged is the worst
    lr = parameters(runs, SMALL, ONE)[1]["lr"]
    base = {"weight_decay": 0.1, "lr": lr, "lr_power": 0.5}
    assert runs.settings(Stage(LARGE, FIXED, tunes=False)) == base | {"warmup_fraction": 0.1}
    assert runs.settings(Stage(LARGE, RIVAL, tunes=True)) == base
    assert runs.settings(rival) is runs.settings(taken) is None
    finish_trials(runs, LARGE, RIVAL, 3.0, None, 2.0)
    assert runs.settings(rival) == runs.settings(taken) == base | parameters(runs, LARGE, RIVAL)[2]


def test_a_single_worker_hands_on_an_lr_that_is_fixed(runs):
    small = replace(SMALL, methods=(Method("one", "adamw", {"lr": 0.5, "clip": 2.0}),))
    found = runs.settings(Stage(replace(LARGE, base=small), FIXED, tunes=False))
    assert found == {"weight_decay": 0.1, "lr": 0.5, "lr_power": 0.5, "warmup_fraction": 0.1}


def test_what_an_interrupted_process_left_goes_and_the_same_runs_make_the_same_file(runs, tmp_path):
    finish_single_worker(runs)
    runs.tidy(SMALL)
    path = tmp_path / "small.jsonl"
    tidy = path.read_bytes()
    stage = Stage(SMALL, ONE, tunes=False)
    more = Runs(tmp_path)
    more.begin(Stage(replace(SMALL, seeds=(1, 2, 3)), ONE, tunes=False), more.settings(stage))  # and never ended
    path.write_bytes(path.read_bytes() + b'{"op_code": 6, "torn')
    left = Runs(tmp_path)
    left.tidy(SMALL)
    assert path.read_bytes() == tidy
    assert [run.user_attrs["seed"] for run in left.of(stage)] == [1, 2]


@pytest.mark.parametrize("line", ["<<<<<<< HEAD", "5"])
def test_a_broken_line_among_the_runs_is_refused(runs, tmp_path, line):
    finish_single_worker(runs)
    path = tmp_path / "small.jsonl"
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([first, line, *others, ""]))
    with pytest.raises(InputError, match=re.escape(f"{path}: no journal of optuna's")):
        Runs(tmp_path).of(Stage(SMALL, ONE, tunes=True))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (replace(SMALL, task=replace(TOY, micro_batches=65)), "small.jsonl: one/trials was run with task Language("),
        (replace(SMALL, task=replace(TOY, settings={"clip": 1})), "one/trials was run with task Language("),
        (replace(SMALL, split="validation"), "one/seeds was run with split test, which would be validation now"),
        (replace(SMALL, n=2), "one/trials was run with n 1, which would be 2 now"),
        (replace(SMALL, methods=(replace(ONE, settings={"clip": 1.0}),)), "with clip nothing, which would be 1.0 now"),
        (
            replace(SMALL, methods=(replace(ONE, search={"lr": FloatDistribution(0, 1)}),)),
            "one/trials was run with search {'lr'",
        ),
        (replace(SMALL, trials=1), "one/seeds was run with lr 0."),  # trials were taken away: another one is chosen
    ],
)
def test_runs_of_another_definition_are_refused(runs, changed, words):
    finish_single_worker(runs)
    for stage in stages(ALL):
        runs.check(stage)
    with pytest.raises(InputError, match=re.escape(words)):
        for stage in stages([changed]):
            runs.check(stage)


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


@pytest.mark.parametrize("name", ["adamw", "muon", "schedule-free"])
def test_a_batch_that_may_not_grow_trains_as_a_fixed_one(name):
    watched, alone = (toy_steps(name, SETTINGS | more).state_dict() for more in ({"growth_factor": 1.0}, {}))
    assert all(torch.equal(watched[key], alone[key]) for key in alone)


def toy_loss(model, i):
    data = torch.arange(8)[i::2]
    return cross_entropy(model(data), data // 4)


def toy_noise(model):
    """Of two micro-batches: the variance of their gradients, and the squared norm of the averaged one."""
    parameters = list(model.parameters())
    first, second = (
        torch.cat([g.flatten() for g in torch.autograd.grad(toy_loss(model, i), parameters)]).double() for i in (0, 1)
    )
    return (first - second).square().sum().item() / 2, ((first + second) / 2).square().sum().item()


def toy_update(contestant, model):
    for i in (0, 1):
        (toy_loss(model, i) / 2).backward()
    contestant.step()


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize(("eta", "largest"), [(0.1, 128), (0.1, 3), (0.99, 128)])
def test_a_norm_test_that_fails_asks_for_the_batch_that_would_pass(name, eta, largest):
    model = Toy()
    noise, square = toy_noise(model)
    contestant = build(name, SETTINGS | {"norm_test": eta}, model, largest, 1)
    assert contestant.growing.accumulation == 2
    toy_update(contestant, model)
    assert contestant.growing.accumulation == max(2, min(math.ceil(noise / (eta**2 * square)), largest))
    assert noise / (0.1**2 * square) > 3 > 2 > noise / (0.99**2 * square)


@pytest.mark.parametrize(("scale", "price"), [(3.0, 16), (40.0, 16), (40.0, 64), (9.0, 4)])
def test_a_priced_batch_costs_least(scale, price):
    contestant = build("adamw", SETTINGS | {"update_price": price}, Toy(), 128, 1)
    growth, found = contestant.growing.growth, 2
    for _ in range(8):
        found = growth.next(found, scale, replicas=1)
    cost = {n: scale + n + price * (1 + scale / n) for n in range(2, 129)}
    assert abs(found - min(cost, key=cost.get)) <= 1  # it is rounded down
    assert growth.next(8, -1.0, replicas=1) == growth.next(8, math.inf, replicas=1) == 8


def test_a_batch_follows_the_noise_scale_of_all_parameters():
    model = Toy()
    contestant = build("muon", SETTINGS | {"growth_factor": 0.5}, model, 64, 20)
    noise, square = toy_noise(model)
    toy_update(contestant, model)
    found = contestant.growing.watch.report()["noise_scale"]
    assert found == pytest.approx(noise / (square - noise / 2), rel=1e-4)


def test_a_batch_that_grows_does_so_by_powers_of_two_and_ends_at_the_budget():
    assert windows({}, 32, 100) == [32, 32, 32, 4]
    assert windows({"growth_factor": 4}, 32, 5) == windows({"norm_test": 0.5}, 32, 5) == [2, 2, 1]
    grown = windows({"full_batch_at": 0.5}, 32, 1024)
    assert sum(grown) == 1024 and grown[0] == 1 and grown[-2] == 32
    assert grown[:-1] == sorted(grown[:-1]) and set(grown[:-1]) == {1, 2, 4, 8, 16, 32}
    reached = sum(size for size in grown[: grown.index(32)])
    assert reached == pytest.approx(512, abs=32)


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", language.ARCHITECTURES)
def test_models_predict_what_they_say_and_are_as_asked_for(architecture):
    torch.manual_seed(0)
    tokenizer = train_tokenizer(Dataset.from_dict({"text": ["we the people"]}), 258, with_mask=True)
    task = replace(
        TOY, architecture=architecture, layers=2, width=16, heads=2, initializer_range=0.5, sequence_length=8
    )
    model = language.build(task, tokenizer)
    tokens = torch.randint(len(tokenizer), (3, 8))
    labels = tokens.masked_fill(torch.rand(3, 8) < 0.5, -100) if task.masked else tokens
    found = model(input_ids=tokens, labels=labels)
    logits, predicted = (found.logits, labels) if task.masked else (found.logits[:, :-1], labels[:, 1:])
    torch.testing.assert_close(found.loss, cross_entropy(logits.flatten(0, 1), predicted.flatten()))
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 16, 2)
    assert config.vocab_size == len(tokenizer)
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(0.5, rel=0.15)  # ModernBERT truncates


# -- tables ------------------------------------------------------------------------------------------------------------


def test_updates_to_a_target_lie_on_the_line_between_two_evaluations():
    curve = [(10, 80, 5.0), (20, 160, 3.0), (30, 240, 2.0)]
    assert tables.updates_to(curve, 4.0) == pytest.approx(15)
    assert tables.updates_to(curve, 4.0, column=1) == pytest.approx(120)
    assert tables.updates_to(curve, 6.0) == 10
    assert tables.updates_to(curve, 1.0) is None


def test_a_table_has_methods_with_all_their_seeds_and_says_which_diverged(runs, tmp_path):
    finish_single_worker(runs)
    finish(runs, Stage(LARGE, FIXED, tunes=False), [(4, 4.0), (8, 2.5)], None)
    finish_trials(runs, LARGE, RIVAL, 2.0, 3.0, 4.0)
    finish(runs, Stage(LARGE, RIVAL, tunes=False), [(8, 2.0)])
    text = tables.tables(ALL, runs)
    assert "updates to 4.000 | updates to 4.000 | updates to 3.000" in text
    assert "| fixed | 1 of 2 diverged | not reached | not reached | not reached | 0 |" in text
    assert "| rival |" not in text
    finish(runs, Stage(LARGE, RIVAL, tunes=False), [(4, 4.0), (8, 3.0)])
    finish(runs, Stage(OTHER, RIVAL, tunes=False), [(4, 2.0)])
    large, other = [
        line for line in tables.tables(ALL, runs).splitlines() if line.startswith("| rival | ") and "±" in line
    ][1:]
    assert large.startswith("| rival | 2.500 ± 0.500 | 6 ± 2 | 6 ± 2 | 8 ± 0 | 3 | lr 0.00")
    assert other.startswith("| rival | 2.000 ± 0.000 | 4 ± 0 | 4 ± 0 | 4 ± 0 | 3 | lr 0.00"), "trials of another study"
    draw([replace(study, picture=True) for study in ALL], runs, tmp_path)
    assert {path.name for path in tmp_path.glob("*.svg")} == {"small.svg", "large.svg", "other.svg"}


def test_a_table_counts_micro_batches_where_the_batch_grew(runs):
    finish_single_worker(runs)
    grows = Method("grows", "adamw", {"full_batch_at": 1.0})
    large = replace(LARGE, methods=(grows,))
    batches = windows(grows.settings, 8, 64)
    finish(runs, Stage(large, grows, tunes=False), *[[(10, 4.0), (len(batches), 2.0)]] * 2)
    assert f"| grows | 2.000 ± 0.000 | 10 ± 0 ({sum(batches[:10])} micro-batches) |" in tables.tables([large], runs)


def test_a_front_has_fixed_batches_beside_what_follows_the_noise(runs, tmp_path):
    finish_single_worker(runs)
    assert "## toy" not in fronts(ALL, runs)
    grows = [Method(f"grows-{factor}", "adamw", {"growth_factor": factor}) for factor in (1, 4)]
    muon = Method("muon", "muon", {"muon_lr": 0.01})
    study, more = (replace(LARGE, name=f"with-{seed}", methods=(*grows, FIXED, muon), seeds=(seed,)) for seed in (1, 2))
    for own, losses in ((study, (2.0, 3.0)), (more, (2.2, None))):
        for method, loss, updates in zip(grows, losses, (16, 4), strict=True):
            finish(runs, Stage(own, method, tunes=False), loss and [(updates, loss)])
        finish(runs, Stage(own, FIXED, tunes=False), [(8, 2.5)])
        finish(runs, Stage(own, muon, tunes=False), [(8, 0.5)])  # not beside an AdamW
    text = fronts([SMALL, study], runs)
    assert "| method | batch | updates | loss | seeds | trials | fixed | difference |" in text
    assert "| grows | ×4 | 4 ± 0 | 3.000 ± 0.000 | 1 | 0 |  |  |" in text, "beyond the ends of the fixed ones"
    assert "| grows | ×1 | 16 ± 0 | 2.000 ± 0.000 | 1 | 0 | 2.000 | +0.000 |" in text, "a third, by the logarithm"
    assert "| fixed | n = 8 | 8 ± 0 | 2.500 ± 0.000 | 1 | 0 |  |  |" in text
    assert "| one | n = 1 | 64 ± 0 | 1.000 ± 0.000 | 2 | 3 |  |  |" in text
    both = fronts([SMALL, study, more], runs)
    assert "| grows | ×1 | 16 ± 0 | 2.100 ± 0.100 | 2 | 0 | 2.000 | +0.100 |" in both
    assert "| grows | ×4 | 2 ± 2 | diverged | 2 | 0 |  |  |" in both
    draw([SMALL, study, more], runs, tmp_path)
    assert (tmp_path / "toy-front.svg").exists()
    assert at([(8, 3.0, "n = 8"), (32, 2.0, "n = 2")], 7) is None


def test_a_table_counts_micro_batches_as_the_noise_had_them(runs):
    finish_single_worker(runs)
    grows = Method("grows", "adamw", {"growth_factor": 1})
    study = replace(LARGE, methods=(grows,), seeds=(1,))
    stage = Stage(study, grows, tunes=False)
    optuna_study, trial = runs.begin(stage, runs.settings(stage))
    for update, loss in ((4, 4.0), (12, 2.0)):
        trial.report(loss, update)
    trial.set_user_attr("batches", [(2, 4), (7, 8)])
    optuna_study.tell(trial, 2.0)
    assert "| grows | 2.000 ± 0.000 | 4 ± 0 (8 micro-batches) |" in tables.tables([study], runs)


def test_neither_target_nor_picture_without_a_run_that_came_to_its_end(runs, tmp_path):
    finish_trials(runs, SMALL, ONE, 3.0, 2.0, None)
    finish(runs, Stage(SMALL, ONE, tunes=False), None, None)
    draw([replace(SMALL, picture=True)], runs, tmp_path)
    assert tables.targets(SMALL, runs) == [] and not list(tmp_path.glob("*.svg"))


# -- the results in the repository -------------------------------------------------------------------------------------


def test_results_belong_to_the_studies_and_the_tables_to_the_results():
    studies, runs = read().values(), Runs(RESULTS)
    for stage in stages(studies):
        runs.check(stage)
        assert len(runs.of(stage)) == stage.size, f"{stage.study.name} {stage.name}"
        for run in runs.of(stage):
            assert run.intermediate_values and {"commit", "versions", "seconds"} <= run.user_attrs.keys()
    assert (RESULTS / "tables.md").read_text() == tables.tables(studies, runs)
    assert (RESULTS / "front.md").read_text() == fronts(studies, runs)


SPREAD = re.compile(r"\d+(?:\.\d+)? ± \d+(?:\.\d+)?")


def test_the_documents_cite_what_the_tables_say():
    told = (RESULTS / "tables.md").read_text()
    cited = SPREAD.findall((ROOT / "docs" / "comparison.md").read_text())
    readme = (ROOT / "README.md").read_text().split("## What it gives")[1].split("\n## ")[0]
    cited += re.findall(r"\d\.\d{3}", readme)
    assert len(cited) > 20
    assert [figure for figure in cited if figure not in told] == []


def test_the_document_of_growth_cites_what_the_fronts_say():
    told = (RESULTS / "front.md").read_text()
    growth = (ROOT / "docs" / "growth.md").read_text()
    cited = SPREAD.findall(growth) + re.findall(r"[+-]?\b\d\.\d{3}\b", growth)
    assert len(cited) > 60
    assert [figure for figure in cited if figure not in told] == []


def test_a_row_of_the_documents_has_the_figures_of_its_method():
    told = (RESULTS / "tables.md").read_text().splitlines()
    comparison = (ROOT / "docs" / "comparison.md").read_text()
    rows = re.findall(r"^\|[^|\n]*`([^`\n]+)`[^|\n]*\|(.*)$", comparison, re.MULTILINE)
    assert len(rows) > 40
    for method, row in rows:
        own = "\n".join(line for line in told if line.startswith(f"| {method} |"))
        assert own and [figure for figure in SPREAD.findall(row) if figure not in own] == [], method
