"""Gradients that are thrown away, kept or lost before an update: LENA's numbers are those of what moves the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_lena
from tests.integrations._engines import Net, config, engine, moved, said
from tests.integrations._ranks import Ranks
from tests.integrations._truth import KEYS, differences, every_rank, numbers

UPDATES = range(3)
SHAPE = (2, 4)
DROPS = [(0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16"), (1, "fp32 + offload")]
KEEPS = [(1, "bf16-fp32"), (2, "fp32"), (2, "bf16-fp32"), (3, "fp32")]
KEEPS += [(2, "fp32 + offload"), (3, "fp32 + offload")]
Loop = Callable[[Any, int], None]


def batch(*seed: int) -> tuple[Tensor, Tensor]:
    rank = torch.distributed.get_rank()
    return pair(rank, *seed)


def pair(rank: int, *seed: int) -> tuple[Tensor, Tensor]:
    return numbers(1, rank, *seed, shape=SHAPE), numbers(2, rank, *seed, shape=SHAPE)


def bad() -> tuple[Tensor, Tensor]:
    return tuple(100 * x for x in batch(99, 99))  # type: ignore[return-value]


def good(made: Any, update: int) -> None:
    """Two micro-batches and an update."""
    for micro in range(2):
        made.set_gradient_accumulation_boundary(micro == 1)
        made.backward(made(*batch(update, micro)))
    made.step()


def thrown_away_by(how: str, at_boundary: bool) -> Loop:
    """As `good`, after a micro-batch that is thrown away. `at_boundary`: after it was reduced."""

    def loop(made: Any, update: int) -> None:
        made.set_gradient_accumulation_boundary(at_boundary)
        made.backward(made(*bad()))
        {"engine": made, "module": made.module, "wrapper": made.optimizer}[how].zero_grad()
        good(made, update)

    return loop


def after(stage: int, precision: str, loop: Loop) -> tuple[list[Tensor], dict[str, Any], list[str]]:
    """What moved, the report, and what was said."""
    with said() as messages, engine(config(stage, precision, lena=KEYS)) as made:
        for update in UPDATES:
            loop(made, update)
        return moved(made), ds_lena.report(made), messages


def beside_the_good_run(stage: int, precision: str, how: str, at_boundary: bool) -> tuple[bool, bool, list[str]]:
    wanted, report, _ = after(stage, precision, good)
    ours, with_bad, messages = after(stage, precision, thrown_away_by(how, at_boundary))
    return all(torch.equal(a, b) for a, b in zip(wanted, ours, strict=True)), report == with_bad, messages


@pytest.mark.parametrize(
    ("stage", "precision", "how", "at_boundary"),
    [
        *((*layout, "engine", False) for layout in DROPS),
        (0, "fp32", "module", False),
        (1, "fp32", "module", False),
        (1, "fp32", "wrapper", False),
        (0, "fp32", "engine", True),
        (1, "fp32", "engine", True),
        (2, "fp32", "engine", True),
        (1, "bf16-fp32", "wrapper", False),
        (3, "fp32", "wrapper", False),
    ],
)
def test_a_gradient_that_is_thrown_away_leaves_no_trace(
    ranks: Ranks, stage: int, precision: str, how: str, at_boundary: bool
) -> None:
    assert ranks.run(beside_the_good_run, stage, precision, how, at_boundary) == [(True, True, [])] * 2


def kept(stage: int, precision: str) -> tuple[list[str], list[str], float]:
    loop = thrown_away_by("engine", at_boundary=False)
    windows = [
        every_rank(lambda rank, u=update: [_bad_of(rank), *(pair(rank, u, micro) for micro in range(2))])
        for update in UPDATES
    ]
    with said() as messages, engine(config(stage, precision, lena=KEYS)) as made:
        for update in UPDATES:
            loop(made, update)
        found = differences(made, Net(), windows, divisor=2) if precision == "fp32" else []
        return found, messages, ds_lena.report(made)["n"]


def _bad_of(rank: int) -> tuple[Tensor, ...]:
    return tuple(100 * x for x in pair(rank, 99, 99))


@pytest.mark.parametrize(("stage", "precision"), KEEPS)
def test_where_deepspeed_keeps_it_lena_counts_it_and_says_so_once(ranks: Ranks, stage: int, precision: str) -> None:
    told = []
    for found, messages, n in ranks.run(kept, stage, precision):
        assert found == []
        assert n == 6
        told += messages
    assert len(told) == 1 and "zero_grad() in the middle of an update throws away nothing" in told[0]


# -- two engines -------------------------------------------------------------------------------------------------------


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


class Maker(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def gan(stage: int) -> tuple[list[str], int, list[str]]:
    """The critic's differences from a run without a generator; the generator's n."""
    entries = config(stage, lena=KEYS, gradient_accumulation_steps=1)
    rank = torch.distributed.get_rank()
    with said() as messages, engine(entries, Critic()) as critic, engine(copy.deepcopy(entries), Maker()) as maker:
        for update in UPDATES:
            # At ZeRO 0 DeepSpeed refuses a pass through an engine that is not its own.
            judge = critic if stage else critic.module
            maker.backward(judge(maker(numbers(rank, update, shape=(2, 4)))))
            maker.step()
            critic.zero_grad()
            critic.backward(critic(numbers(rank, update, 7, shape=(2, 3))))
            critic.step()
        windows = [every_rank(lambda r, u=update: [(numbers(r, u, 7, shape=(2, 3)),)]) for update in UPDATES]
        return differences(critic, Critic(), windows, divisor=1), ds_lena.report(maker)["n"], messages


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_generators_gradients_in_the_critic_are_dropped(ranks: Ranks, stage: int) -> None:
    assert ranks.run(gan, stage) == [([], 2, [])] * 2


# -- exceptions and checkpoints ----------------------------------------------------------------------------------------


def broken_pass(made: Any, how_far: int = 2) -> None:
    """A backward pass that ends in the middle, as when memory runs out: the last tower has its gradients then."""

    def fail(gradient: Tensor) -> None:
        raise MemoryError

    handle = made.module.left[0].weight.register_hook(fail)
    with suppress(MemoryError):
        made.set_gradient_accumulation_boundary(False)
        made.backward(made(*bad()))
    handle.remove()


def retried(stage: int, precision: str, clears: str) -> tuple[bool, bool, list[str]]:
    def loop(made: Any, update: int) -> None:
        broken_pass(made)
        {"engine": made, "wrapper": made.optimizer}[clears].zero_grad()
        good(made, update)

    wanted, report, _ = after(stage, precision, good)
    ours, with_bad, messages = after(stage, precision, loop)
    return all(torch.equal(a, b) for a, b in zip(wanted, ours, strict=True)), report == with_bad, messages


@pytest.mark.parametrize(
    ("stage", "precision", "clears"),
    [(0, "fp32", "engine"), (0, "bf16", "engine"), (1, "fp32", "engine"), (1, "bf16-fp32", "wrapper")],
)
def test_a_pass_that_an_exception_ended_can_be_thrown_away(
    ranks: Ranks, stage: int, precision: str, clears: str
) -> None:
    assert ranks.run(retried, stage, precision, clears) == [(True, True, [])] * 2


def kept_part(stage: int, precision: str) -> tuple[float, list[str]]:
    def loop(made: Any, update: int) -> None:
        made.set_gradient_accumulation_boundary(False)
        made.backward(made(*batch(update, 5)))
        broken_pass(made)
        good(made, update)

    _, report, messages = after(stage, precision, loop)
    return report["n"], messages


@pytest.mark.parametrize(("stage", "precision", "n"), [(0, "fp32", 8), (1, "fp32", 8), (1, "bf16-fp32", 6)])
def test_the_part_of_a_broken_pass_counts_where_it_stays_in_the_gradient(
    ranks: Ranks, stage: int, precision: str, n: int
) -> None:
    told = []
    for counted, messages in ranks.run(kept_part, stage, precision):
        assert counted == n
        told += messages
    assert (n == 6) == (told == [])
    assert all("an exception has ended a backward pass" in text for text in told)


def stuck(stage: int) -> str:
    with engine(config(stage, lena=KEYS)) as made:
        broken_pass(made)
        made.zero_grad()
        try:
            good(made, 0)
        except ds_lena.StateError as error:
            return str(error)
        return ""


@pytest.mark.parametrize("stage", [2, 3])
def test_where_deepspeed_cannot_go_on_the_error_says_so(ranks: Ranks, stage: int) -> None:
    for message in ranks.run(stuck, stage):
        assert "an exception has ended an earlier backward pass" in message and "make a new engine" in message


def loaded_before_step(stage: int, folder: str) -> str:
    """The error of a step whose gradients a checkpoint has thrown away; afterwards the engine trains."""
    with engine(config(stage, lena=KEYS)) as made:
        made.save_checkpoint(folder)
        made.backward(made(*bad()))
        made.set_gradient_accumulation_boundary(True)
        made.load_checkpoint(folder)
        try:
            made.step()
        except ds_lena.StateError as error:
            good(made, 0)
            return f"{ds_lena.report(made)['n']} {error}"
    return ""


@pytest.mark.parametrize("stage", range(4))
def test_a_step_right_after_loading_a_checkpoint_is_refused(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    for message in ranks.run(loaded_before_step, stage, str(tmp_path)):
        assert message.startswith("4 LENA: engine.step() came right after load_checkpoint()")


def loaded(stage: int, precision: str, folder: str) -> tuple[bool, float, list[str]]:
    """Whether a run that loads a checkpoint in the middle of an update goes on as one that loads it before."""
    results = []
    for unfinished in (0, 2):
        with engine(config(stage, precision, lena=KEYS)) as made:
            good(made, 0)
            if unfinished == 0:
                made.save_checkpoint(folder)
        with said() as messages, engine(config(stage, precision, lena=KEYS)) as made:
            for _ in range(unfinished):
                made.set_gradient_accumulation_boundary(False)
                made.backward(made(*bad()))
            made.load_checkpoint(folder)
            for update in (1, 2):
                good(made, update)
            results.append((moved(made), ds_lena.report(made)))
    (wanted, report), (ours, with_bad) = results
    same = all(torch.equal(a, b) for a, b in zip(wanted, ours, strict=True)) and report == with_bad
    return same, with_bad["n"], messages


@pytest.mark.parametrize(
    ("stage", "precision"),
    [(0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16-fp32"), (2, "fp32"), (2, "bf16-fp32"), (3, "fp32")],
)
def test_loading_a_checkpoint_throws_the_gradients_of_the_window_away(
    ranks: Ranks, tmp_path: Path, stage: int, precision: str
) -> None:
    told = []
    for same, n, messages in ranks.run(loaded, stage, precision, str(tmp_path)):
        assert (same, n) == (True, 4)
        told += messages
    assert any("load_checkpoint() in the middle of an update" in text for text in told)


def counted_after_a_load(stage: int, folder: str) -> list[tuple[int, float]]:
    """Updates, and n of the last one, after each micro-batch that follows a load in the middle of an update."""
    with engine(config(stage, lena=KEYS, gradient_accumulation_steps=3)) as made:
        made.save_checkpoint(folder)
        for _ in range(2):
            made.backward(made(*bad()))
            made.step()
        made.load_checkpoint(folder)
        found = []
        for micro in range(6):
            made.backward(made(*batch(0, micro)))
            made.step()
            report = ds_lena.report(made)
            found.append((report["update"], report["n"]))
        return found


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_an_update_after_a_load_has_all_its_micro_batches(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    wanted = [(0, 0), (0, 0), (1, 6), (1, 6), (1, 6), (2, 6)]
    assert ranks.run(counted_after_a_load, stage, str(tmp_path)) == [wanted, wanted]


# -- several losses ----------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def losses(y: Tensor) -> Sequence[Tensor]:
    return y[:, 0].square().mean(), y[:, 1].square().mean()


def two_losses(stage: int, how: str) -> str:
    entries = config(stage, lena=KEYS, gradient_accumulation_steps=2 if how == "first micro-batch" else 1)
    with engine(entries, Heads()) as made:
        x = numbers(torch.distributed.get_rank(), shape=(2, 4))
        first, second = losses(made(x))
        if how == "two forward passes":
            second = losses(made(x))[1]
        try:
            if how == "torch backward":
                first.backward(retain_graph=True)
                second.backward()
            else:
                made.backward(first, retain_graph=True)
                made.backward(second)
        except ds_lena.UnsupportedError as error:
            return str(error)
        return ""


LOOPS = [(stage, how) for stage in (0, 1, 2, 3) for how in ("engine", "first micro-batch", "two forward passes")]


@pytest.mark.parametrize(("stage", "how"), [*LOOPS, *((stage, "torch backward") for stage in (1, 2, 3))])
def test_several_backward_passes_for_one_micro_batch_are_refused(ranks: Ranks, stage: int, how: str) -> None:
    for message in ranks.run(two_losses, stage, how):
        assert "a second backward pass for one micro-batch" in message
        assert "engine.backward(loss_1 + loss_2)" in message


def without_last_backward() -> str:
    with engine(config(1, "fp32 + offload")) as made:
        made.set_gradient_accumulation_boundary(False)
        made.backward(made(*batch(0, 0)))
        made.set_gradient_accumulation_boundary(True)
        try:
            made.step()
        except ds_lena.StateError as error:
            return str(error)
    return ""


def test_offload_at_zero_1_needs_a_backward_pass_of_the_last_micro_batch(ranks: Ranks) -> None:
    for message in ranks.run(without_last_backward):
        assert "the last micro-batch of this update had no backward pass" in message
