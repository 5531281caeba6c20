"""Every key that DeepSpeed knows is in the table of support. A newer DeepSpeed may bring one that is not."""

from __future__ import annotations

from fnmatch import fnmatchcase

from ds_lena.integrations.deepspeed.support import FEATURES, WITHOUT_EFFECT
from tests.helpers.deepspeed_keys import Asked, keys_of_deepspeed
from tests.integrations._engines import config, engine
from tests.integrations._ranks import Ranks

PATTERNS = [key for row in (*FEATURES, *WITHOUT_EFFECT) for key in row.keys]
BEHIND = {"data_parallel_size"}  # asked for only where there is a sequence_parallel_size
ROWS = {
    "torch_autocast.dtype": "torch_autocast with bf16",
    "zero_optimization.offload_optimizer.ratio": '"offload_optimizer" with a "ratio" below 1',
    "zero_optimization.offload_optimizer.device": "offload_optimizer to the CPU (ZeRO 1, 2)",
    "zero_optimization.offload_optimizer.super_offload": '"super_offload"',
}


def found_by_ranks() -> set[str]:
    """Those of the configuration, and the outermost ones that an engine asks for when it is made."""
    asked: set[tuple[str, ...]] = set()
    with engine(Asked(config(1), (), asked)):
        pass
    return keys_of_deepspeed() | {key for (key,) in asked} | BEHIND


def test_every_key_of_deepspeed_is_in_the_table(ranks: Ranks) -> None:
    found = ranks.run(found_by_ranks)[0]
    assert len(found) > 350, "the search for keys has found too few"
    unknown = sorted(key for key in found if not any(fnmatchcase(key, pattern) for pattern in PATTERNS))
    assert unknown == [], "say in ds_lena/integrations/deepspeed/support/ what LENA makes of them"
    gone = sorted(pattern for pattern in PATTERNS if not any(fnmatchcase(key, pattern) for key in found))
    assert gone == [], "DeepSpeed no longer knows them"


def test_a_key_that_deepspeed_might_bring_is_not_in_the_table() -> None:
    for key in ("zero_optimization.new", "bf16.new", "data_types.new", "checkpoint.new", "new", "optimizer.new"):
        assert not any(fnmatchcase(key, pattern) for pattern in PATTERNS), key


def test_no_key_stands_both_as_one_with_and_one_without_effect() -> None:
    without = [key for row in WITHOUT_EFFECT for key in row.keys]
    assert [key for row in FEATURES for key in row.keys if any(fnmatchcase(key, pattern) for pattern in without)] == []


def test_the_row_of_a_key() -> None:
    for key, what in ROWS.items():
        assert [row.what for row in FEATURES if any(fnmatchcase(key, pattern) for pattern in row.keys)] == [what]
