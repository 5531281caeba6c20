"""The optimizer on NVMe: no checkpoint is loaded, and a script may change gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_lena
from tests.helpers.nvme import small_swaps, why_not_on_nvme
from tests.integrations._engines import Net, batch, config, engine, said, stock_engine, train
from tests.integrations._ranks import Ranks

pytestmark = pytest.mark.full


@pytest.fixture(autouse=True)
def needs_async_io() -> None:
    if why_not_on_nvme():
        pytest.skip(why_not_on_nvme())


@contextmanager
def on_nvme(seed: int = 0) -> Iterator[Any]:
    with small_swaps() as (offload, entries):
        zero = {"offload_optimizer": offload, "sub_group_size": 1000}
        with engine(config(3, lena={"weight_decay": 0.0}, zero=zero, **entries), Net(seed, width=32)) as made:
            yield made


def loaded(folder: str) -> tuple[list[str], str]:
    """What is said at the start, and what loading a checkpoint says."""
    with said() as messages, on_nvme() as made:
        train(made, range(1))
        made.save_checkpoint(folder)
        try:
            made.load_checkpoint(folder)
        except ds_lena.UnsupportedError as error:
            return messages, str(error)
    return messages, ""


def test_a_checkpoint_is_refused_and_it_is_said_at_the_start(ranks: Ranks, tmp_path: Path) -> None:
    (messages, error), (of_rank_1, same_error) = ranks.run(loaded, str(tmp_path))
    assert error == same_error and error.startswith('LENA: with "offload_optimizer" to NVMe DeepSpeed')
    assert (messages, of_rank_1) == ([error], [])


def changed() -> list[bool]:
    """Whether a script's own gradient, of zeros, leaves a weight where it is."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_set_full_grad

    same = []
    with on_nvme() as made:
        weights = [made.module.left[2].weight, made.module.right[2].weight]
        for update in range(2):
            before = [safe_get_full_fp32_param(weight).clone() for weight in weights]
            for micro in range(2):
                made.backward(made(*batch(update, micro)))
                if micro:
                    safe_set_full_grad(weights[0], torch.zeros_like(safe_get_full_grad(weights[0])))
                made.step()
            same += [torch.equal(safe_get_full_fp32_param(w), b) for w, b in zip(weights, before, strict=True)]
    return same


def test_weights_move_by_the_gradient_that_a_script_has_written(ranks: Ranks) -> None:
    for same in ranks.run(changed):
        assert same == [True, False, True, False]


def refusal_of_a_watch() -> str:
    with small_swaps() as (offload, entries):
        zero = {"offload_optimizer": offload, "sub_group_size": 1000}
        with stock_engine(config(3, zero=zero, **entries)) as made:
            try:
                ds_lena.watch(made)
            except ds_lena.UnsupportedError as error:
                return str(error)
    return ""


def test_a_watch_is_refused(ranks: Ranks) -> None:
    for error in ranks.run(refusal_of_a_watch):
        assert 'ds_lena.watch does not support "offload_optimizer" to NVMe' in error
