"""`watch` in Megatron-core's own loop: weights that do not know of it, and how it is started, kept and refused."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ds_lena
from ds_lena.integrations.megatron import watch, wrap
from tests.helpers.case import Window
from tests.helpers.marks import full
from tests.helpers.megatron_run import make_update, megatron, update_of
from tests.integrations._ranks import WORLD, Ranks

SHARDED = {"use_distributed_optimizer": True}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
SKIPPED = (Window(2), Window(2), Window(2, poisoned=True), Window(2), Window(2))
SEQUENCE = {"split": "megatron-sequence", "tensor": 2}

# -- what it leaves alone ---------------------------------------------------------------------------------------------


def trained(is_watched: bool, fields: dict[str, Any]) -> tuple[list[Tensor], Any]:
    """Weights and the optimizer's state after four updates or more, and the report of all but the first and last."""
    with megatron(**fields) as (case, chunk, optimizer):
        watched = None
        updates = range(max(len(case.windows), 4))
        for update in updates:
            if is_watched and update == 1:
                watched = watch(optimizer, chunk)
            if watched is not None and update == updates[-1]:
                watched.close()
            make_update(case, chunk, optimizer, update)
        state = optimizer.chained_optimizers[0].optimizer.state.values()
        moved = [value for own in state for value in own.values() if isinstance(value, Tensor)]
        found = [tensor.detach().clone() for tensor in (*chunk.parameters(), *moved)]
        return found, None if watched is None else watched.report()


def with_and_without(fields: dict[str, Any]) -> tuple[bool, int, int]:
    """Whether all is equal to the bit, and the updates that were measured and skipped."""
    (watched, report), (alone, _) = trained(True, fields), trained(False, fields)
    is_equal = len(watched) == len(alone) and all(map(torch.equal, watched, alone))
    return is_equal, report["update"], report["skipped"]


@pytest.mark.parametrize(
    ("fields", "skipped"),
    [
        (SEQUENCE | {"clipping": 0.5}, 0),
        ({"precision": "bf16", "config": SHARDED | OVERLAP}, 0),
        ({"precision": "fp16", "windows": SKIPPED}, 1),
        *full(
            [
                ({"base": "sgd"}, 0),
                ({"config": SHARDED, "clipping": 0.5}, 0),
                (SEQUENCE | {"precision": "bf16", "config": SHARDED}, 0),
                ({"split": "megatron-tied", "pipe": 2, "loop": "schedule"}, 0),
                ({"precision": "fp16", "windows": SKIPPED, "config": SHARDED}, 1),
            ]
        ),
    ],
)
def test_the_weights_do_not_know_of_it(ranks: Ranks, fields: dict[str, Any], skipped: int) -> None:
    assert ranks.run(with_and_without, fields) == [(True, 2, skipped)] * WORLD


# -- what it is of ----------------------------------------------------------------------------------------------------


def first_reports() -> list[dict[str, Any]]:
    """Of the first update, which finds the same weights: by Adam, by a rule that Megatron does not know, and by LENA,
    of a watch that was there before LENA, and of one that shows what LENA measures.
    """
    found = []
    for inner in ("adam", "adagrad", "lena"):
        with megatron() as (case, chunk, optimizer):
            if inner == "adagrad":
                wrapper = optimizer.chained_optimizers[0]
                wrapper.optimizer = torch.optim.Adagrad(wrapper.optimizer.param_groups, lr=1e-3)
            watches = [watch(optimizer, chunk)]
            if inner == "lena":
                wrap(optimizer, chunk, **case.keys)
                watches.append(watch(optimizer, chunk))
                assert watch(optimizer, chunk) is watches[1]
                with pytest.raises(ds_lena.StateError, match="its own state_dict"):
                    watches[1].state_dict()
            before = [p.detach().clone() for p in chunk.parameters()]
            report = update_of(case, chunk, optimizer, 0)
            assert not all(map(torch.equal, before, chunk.parameters()))
            found += [watched.report() for watched in watches]
            if inner == "lena":
                own = {name: layer["noise"] for name, layer in report["layers"].items()}
                assert own == {name: layer["noise"] for name, layer in found[-1]["layers"].items()}
            else:
                assert report == found[-1]
    return found


def test_it_measures_any_optimizer_alike(ranks: Ranks) -> None:
    for first, *others in ranks.run(first_reports):
        assert first["noise"] > 0 and first["update"] == 1
        assert others == [first] * 3


def of_differences() -> list[tuple[float, float]]:
    """Noise and signal, told and by their definitions from the gradients of the last two updates, on one rank."""
    with megatron(world=1, accumulation=1, config=SHARDED) as (case, chunk, optimizer):
        watched = watch(optimizer, chunk, differences=True, smoothing=0.0)
        gradients: list[Tensor] = []
        prepare = optimizer.chained_optimizers[0].prepare_grads

        def prepare_grads() -> bool:
            gradients.append(torch.cat([p.main_grad.flatten().double() for p in chunk.parameters()]))
            return bool(prepare())

        optimizer.chained_optimizers[0].prepare_grads = prepare_grads
        for update in range(3):
            make_update(case, chunk, optimizer, update)
        report, (g, h) = watched.report(), gradients[-2:]
        assert report["estimator"] == "differences"
        return [(report["noise"], float((g - h).square().sum() / 2)), (report["signal"], float(g @ h))]


@pytest.mark.full
def test_one_micro_batch_in_an_update_is_compared_with_the_one_before(tmp_path: Path) -> None:
    alone = Ranks(tmp_path, world=1)
    try:
        for told, defined in alone.run(of_differences)[0]:
            assert told == pytest.approx(defined, rel=1e-5)
    finally:
        alone.stop()


def called_twice() -> list[str]:
    with megatron() as (case, chunk, optimizer):
        watched = watch(optimizer, [chunk], layer="block")
        assert watch(optimizer, chunk, layer="block") is watched
        assert watch(optimizer.chained_optimizers[0], [chunk], layer="block") is watched
        found = [error_of(optimizer, [chunk], layer="model" if dist.get_rank() else "block")]
        watched.close()
        other = watch(optimizer, [chunk], layer="model")
        assert list(update_of(case, chunk, optimizer, 0)["layers"]) == ["model"]
        assert (other.report()["update"], watched.report()["update"]) == (1, 0)
        return found


def error_of(optimizer: Any, chunks: list[Any], **keys: Any) -> str:
    try:
        watch(optimizer, chunks, **keys)
    except ds_lena.LenaError as error:
        return str(error)
    return ""


def test_twice_is_the_same_watch_and_with_other_keys_an_error_on_every_rank(ranks: Ranks) -> None:
    for told in ranks.run(called_twice):
        assert [one[:66] for one in told] == ["ds_lena.watch: this optimizer is watched already, with other keys "]


# -- refused ----------------------------------------------------------------------------------------------------------


def misuse() -> dict[str, str]:
    found = {}
    with megatron() as (case, chunk, optimizer):
        is_second = dist.get_rank() == 1
        found["key"] = error_of(optimizer, [chunk], **({"smoothness": 1} if is_second else {}))
        found["keys"] = error_of(optimizer, [chunk], **({"layer": "model"} if is_second else {}))
        found["no ddp"] = error_of(optimizer, [chunk.module])
        found["inner"] = error_of(optimizer.optimizer, [chunk])
        chunk(*case.batch(0, dist.get_rank(), 0)).backward()
        watch(optimizer, chunk)
        chunk(*case.batch(0, dist.get_rank(), 1)).backward()
        chunk.finish_grad_sync()
        with pytest.raises(ds_lena.StateError) as raised:
            optimizer.step()
        found["within an update"] = str(raised.value)
    return found


def test_misuse_is_refused_on_every_rank(ranks: Ranks) -> None:
    first, second = ranks.run(misuse)
    assert first == second
    wanted = {
        "key": 'Did you mean "smoothing"?',
        "keys": "\"layer\" is not the same on all ranks: 'tensor' on rank 0, 'model' on rank 1",
        "no ddp": "ds_lena.watch: got the model chunks [Gpt]",
        "inner": "ds_lena.watch: got AdamW in place of Megatron's optimizer",
        "within an update": "Call wrap() or watch() between two updates.",
    }
    assert {name: first[name] for name, text in wanted.items() if text not in first[name]} == {}


def in_samples() -> tuple[str, int | None, int | None]:
    from megatron.core import num_microbatches_calculator as calculator

    calculator.init_num_microbatches_calculator(dist.get_rank(), None, 8, 2, dist.get_world_size())
    try:
        with megatron() as (case, chunk, optimizer):
            wrong = error_of(optimizer, [chunk], micro_batch_size=4)
            watch(optimizer, chunk, tokens_per_sample=3)
            report = update_of(case, chunk, optimizer, 0)
            return wrong, report["samples"], report["tokens"]
    finally:
        calculator.unset_num_microbatches_calculator()


def test_megatron_is_asked_for_the_size_of_a_micro_batch(ranks: Ranks) -> None:
    for wrong, samples, tokens in ranks.run(in_samples):
        assert wrong.startswith('ds_lena.watch: "micro_batch_size": 4') and "has 2" in wrong
        assert (samples, tokens) == (8, 24)


# -- going on ---------------------------------------------------------------------------------------------------------


def checkpointed(folder: str) -> list[bool]:
    """Whether a run that goes on from Megatron's distributed checkpoint ends with the same report and weights."""
    from megatron.core import dist_checkpointing

    # Megatron writes in processes of its own, which those of this test must not start, being daemons.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]

    def sharded(chunk: Any, optimizer: Any, is_loading: bool) -> dict[str, Any]:
        model = chunk.module.sharded_state_dict()
        return {"model": model, "optimizer": optimizer.sharded_state_dict(model, is_loading=is_loading)}

    with megatron(tensor=2, precision="bf16") as (case, chunk, optimizer):
        watched = watch(optimizer, chunk)
        for update in range(2):
            make_update(case, chunk, optimizer, update)
        saved = sharded(chunk, optimizer, False) | {"noise_scale": watched.state_dict()}
        dist_checkpointing.save(saved, folder)
        reports = [update_of(case, chunk, optimizer, update) for update in (2, 3)]
        weights = [p.detach().clone() for p in chunk.parameters()]
    with megatron(tensor=2, precision="bf16") as (case, chunk, optimizer):
        watched = watch(optimizer, chunk)
        loaded = dist_checkpointing.load(sharded(chunk, optimizer, True), folder)
        chunk.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
        watched.load_state_dict(loaded["noise_scale"])
        again = [update_of(case, chunk, optimizer, update) for update in (2, 3)]
        return [again == reports, all(map(torch.equal, weights, chunk.parameters()))]


def test_the_averages_go_on_from_a_checkpoint_that_the_script_put_them_into(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(checkpointed, str(tmp_path)) == [[True, True]] * WORLD
