"""The Megatron example by the launcher on two ranks: it learns, and leaves its results."""

from __future__ import annotations

import json
from pathlib import Path

from tests.integrations._examples import history, load, write_texts
from tests.integrations._programs import EXAMPLES, launch

UPDATES = 6
SMALL = ("--layers", "1", "--hidden_size", "32", "--heads", "2", "--vocab_size", "300", "--sequence_length", "32")


def test_it_learns_with_lena_and_leaves_its_results(tmp_path: Path) -> None:
    texts, config = write_texts(tmp_path / "texts.txt"), tmp_path / "zero1.json"
    entries = load(EXAMPLES / "ds_lena_megatron_zero1.json") | {"gradient_accumulation_steps": 4}
    entries["optimizer"]["params"]["lr"] = 0.01
    config.write_text(json.dumps(entries))
    folder = tmp_path / "out"
    launch(
        str(EXAMPLES / "pretrain_gpt_megatron.py"),
        *("--deepspeed_config", str(config), "--dataset", str(texts), "--output_dir", str(folder)),
        *("--updates", str(UPDATES), "--evaluate_every", "3", "--sequence_parallel", "True", *SMALL),
    )
    results = load(folder / "results.json")
    assert (results["updates"], results["lena"]["n"]) == (UPDATES, 4)
    assert results["losses"]["held_out_end"] < results["losses"]["held_out_before"] - 0.3
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    assert [record["update"] for record in history(folder) if "loss" in record] == list(range(1, UPDATES + 1))
