"""What is allowed but most likely not meant is said once, in one line of the log."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integrations._engines import config, engine, said, train
from tests.integrations._ranks import Ranks


def warnings_of(lena: dict[str, Any], version: str = "", updates: int = 3, **more: Any) -> list[str]:
    """What was said from the making of an engine to its last update."""
    import deepspeed

    installed = deepspeed.__version__
    deepspeed.__version__ = version or installed
    try:
        with said() as messages, engine(config(2, lena=lena, **more)) as made:
            train(made, range(updates))
    finally:
        deepspeed.__version__ = installed
    return messages


def scheduler(warmup: int, name: str = "WarmupDecayLR") -> dict[str, Any]:
    start = 0.0 if warmup else 0.01
    params = {"warmup_min_lr": start, "warmup_max_lr": 0.01, "warmup_num_steps": max(warmup, 2), "total_num_steps": 20}
    return {"type": name, "params": params}


def test_an_ordinary_run_says_nothing(ranks: Ranks) -> None:
    assert ranks.run(warnings_of, {}) == [[], []]


@pytest.mark.parametrize("updates", [0, 3])
def test_a_schedulers_warm_up_on_top_of_lenas_is_said_once_at_the_start(ranks: Ranks, updates: int) -> None:
    messages, of_rank_1 = ranks.run(warnings_of, {}, updates=updates, scheduler=scheduler(warmup=5))
    assert of_rank_1 == []
    assert len(messages) == 1
    assert "a warm-up on top of LENA's own" in messages[0] and '"warmup": "none"' in messages[0]


def test_a_scheduler_that_only_decays_is_welcome(ranks: Ranks) -> None:
    assert ranks.run(warnings_of, {}, scheduler=scheduler(warmup=0)) == [[], []]


def test_a_schedulers_warm_up_in_place_of_lenas_is_welcome(ranks: Ranks) -> None:
    assert ranks.run(warnings_of, {"warmup": "none"}, scheduler=scheduler(warmup=5)) == [[], []]


@pytest.mark.parametrize("key", ["exclude", "no_decay"])
def test_a_pattern_that_matches_nothing_is_named(ranks: Ranks, key: str) -> None:
    messages, of_rank_1 = ranks.run(warnings_of, {key: ["left.*", "wright.*"]})
    assert of_rank_1 == []
    assert len(messages) == 1
    assert f'"{key}"' in messages[0] and '"wright.*" matches no parameter' in messages[0]
    assert 'The nearest name is "right.' in messages[0]


def test_another_deepspeed_than_the_tested_one_is_named(ranks: Ranks) -> None:
    messages, of_rank_1 = ranks.run(warnings_of, {}, version="0.99.1")
    assert of_rank_1 == []
    assert len(messages) == 1
    assert "tested with DeepSpeed" in messages[0] and "this is 0.99.1" in messages[0]


def test_a_local_build_of_the_tested_deepspeed_is_welcome(ranks: Ranks) -> None:
    assert ranks.run(local_build_is_welcome) == [[], []]


def local_build_is_welcome() -> list[str]:
    import deepspeed

    return warnings_of({}, version=f"{deepspeed.__version__}+local")
