"""Parts of the examples on their own: presets, streams that are shared out among ranks, checkpoints that are whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_lena.config import LenaConfig
from tests.integrations._programs import EXAMPLES
from tests.integrations._ranks import WORLD, Ranks

sys.path.insert(0, str(EXAMPLES))  # as Python does for a script
from common import presets
from common.deepspeed_config import refuse_without_launcher
from common.errors import InputError

FILLED = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1}
LENA = {"type": "LENA", "params": {"lr": "auto", "no_decay": ["*norm*"], "base_batch_size": 16, "layer": "block"}}


# -- presets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in presets.PRESETS if name != "adamw"])
def test_a_preset_is_the_method_of_its_file_with_hf_s_numbers_and_the_model_s_names(name: str) -> None:
    made = presets.entry(name, LENA, ["*bias"])
    published = json.loads((presets.CONFIGS / f"{name}.json").read_text())["optimizer"]["params"]
    params = {key: FILLED[key] if value == "auto" else value for key, value in made["params"].items()}
    config = LenaConfig.from_keys(params)
    assert made["type"] == "LENA" and made["params"]["lr"] == made["params"]["weight_decay"] == "auto"
    assert config.total_steps is None, "HF's count"
    assert (config.no_decay, config.base_batch_size) == (("*norm*",), 16)
    of_the_file = published.keys() - FILLED.keys() - {"total_steps"}
    assert {key: params[key] for key in of_the_file} == {key: published[key] for key in of_the_file}
    assert "layer" not in params or "layer" in published


def test_a_preset_in_the_place_of_another_optimizer_has_the_model_s_patterns() -> None:
    made = presets.entry("lena", {"type": "AdamW", "params": {"lr": 1.0}}, ["*bias"])
    assert made["params"]["no_decay"] == ["*bias"]


def test_adamw_is_torch_s_with_hf_s_numbers() -> None:
    made = presets.entry("adamw", LENA, ["*bias"])
    assert made == {"type": "AdamW", "params": {"torch_adam": True} | dict.fromkeys(FILLED, "auto")}


def test_rivals_whose_learning_rate_is_for_the_batch_bring_their_own() -> None:
    assert presets.defaults("lars") == {"learning_rate": 1.0, "weight_decay": 0.0001}
    assert presets.defaults("adamw") == {}


# -- sizes -------------------------------------------------------------------------------------------------------------

PUBLISHED = {
    ("gpt", "base"): (50257, 1024, 124_439_808),
    ("bert", "tiny"): (30522, 512, 4_416_698),
    ("bert", "base"): (30522, 512, 109_514_298),
    ("bert", "large"): (30522, 512, 335_174_458),
    ("modernbert", "base"): (50368, 8192, 149_655_232),
    ("modernbert", "large"): (50368, 8192, 395_881_664),
}
"""(vocabulary, positions, parameters), the masked language model's head included."""


@pytest.mark.parametrize(("model", "size"), PUBLISHED)
def test_the_sizes_are_the_published_ones(model: str, size: str) -> None:
    from common import models

    vocabulary, positions, parameters = PUBLISHED[model, size]

    class Tokenizer:
        bos_token_id = eos_token_id = sep_token_id = pad_token_id = 0

        def __len__(self) -> int:
            return vocabulary

    with torch.device("meta"):
        if model == "gpt":
            made = models.build_gpt2(models.GPT2Arguments(model_size=size), Tokenizer(), positions)
        else:
            made = models.build_bert(models.BertArguments(model, size), Tokenizer(), positions)
    assert sum(parameter.numel() for parameter in made.parameters()) == parameters


# -- streams -----------------------------------------------------------------------------------------------------------

BLOCKS, LENGTH = 6, 8  # of each rank


def stream(texts: int = 40) -> Any:
    """An endless stream of blocks of different numbers, from texts that are one token a word."""
    from common.streaming import Endless
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<end>": 0} | {f"w{number}": number for number in range(1, 1 + texts * LENGTH)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    rows = [" ".join(f"w{1 + text * LENGTH + i}" for i in range(LENGTH)) for text in range(texts)]
    return Endless(Dataset.from_dict({"text": rows}).to_iterable_dataset(), fast, LENGTH, buffer=10, seed=1)


def first(blocks: int, **more: Any) -> list[tuple[int, ...]]:
    return [tuple(int(i) for i in block["input_ids"]) for block, _ in zip(stream(**more), range(blocks), strict=False)]


def test_a_stream_never_ends_and_comes_in_another_order_every_time_round() -> None:
    once = 4 * (LENGTH + 1) // LENGTH
    seen = first(3 * once, texts=4)
    assert len(seen) == 3 * once
    assert len({tuple(seen[turn * once : (turn + 1) * once]) for turn in range(3)}) > 1
    assert first(3 * once, texts=4) == seen


def of_a_rank(dispatch: bool | None) -> list[tuple[int, ...]]:
    """The blocks that accelerate gives to this rank, as in HF's Trainer."""
    from accelerate import Accelerator, DataLoaderConfiguration
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=dispatch))
    loader = torch.utils.data.DataLoader(
        stream(), batch_size=2, collate_fn=lambda rows: torch.tensor([list(row["input_ids"]) for row in rows])
    )
    batches = [batch for batch, _ in zip(accelerator.prepare(loader), range(BLOCKS // 2), strict=False)]
    AcceleratorState._reset_state(True)
    return [tuple(row) for row in torch.cat(batches).tolist()]


@pytest.mark.parametrize("dispatch", [None, False], ids=["read by the first rank", "read by every rank"])
def test_every_rank_sees_other_blocks_of_a_stream_and_none_is_left_out(ranks: Ranks, dispatch: bool | None) -> None:
    seen = ranks.run(of_a_rank, dispatch)
    assert [len(blocks) for blocks in seen] == [BLOCKS] * WORLD
    assert sorted(block for blocks in seen for block in blocks) == sorted(first(BLOCKS * WORLD))


@pytest.mark.parametrize("name", ["a[1]", "b*", "c?d", "e{1,2}"])
def test_names_of_files_are_no_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import datasets
    from common.streaming import open_streams
    from common.texts import load_texts

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / name).mkdir()
    (tmp_path / name / "texts.txt").write_text("one\n\ntwo\n\nthree\n")
    whole, streamed = load_texts(str(tmp_path / name)), open_streams(str(tmp_path / name), None, "text", 1)
    assert [*whole.train["text"], *whole.held_out["text"]] == ["one", "two", "three\n"]
    assert [row["text"] for row in streamed.train] == ["two", "three\n"]


# -- checkpoints -------------------------------------------------------------------------------------------------------


def checkpoint(folder: Path, update: int) -> Path:
    made = folder / f"checkpoint-{update}"
    (made / f"global_step{update}").mkdir(parents=True)
    (made / "trainer_state.json").write_text("{}")
    names = [f"rng_state_{rank}.pth" for rank in range(WORLD)] + [f"global_step{update}/zero_optim_states.pt"]
    for name in names:
        torch.save(torch.zeros(100), made / name)
    return made


def test_the_newest_whole_checkpoint_is_taken(tmp_path: Path) -> None:
    from common.checkpoints import find_checkpoint

    for update in (2, 4, 10, 12, 14, 16):
        checkpoint(tmp_path, update)
    (tmp_path / "checkpoint-16" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-14" / "rng_state_1.pth").unlink()
    torn = tmp_path / "checkpoint-12" / "global_step12" / "zero_optim_states.pt"
    torn.write_bytes(torn.read_bytes()[:-30])
    assert find_checkpoint("latest", tmp_path, WORLD) == str(tmp_path / "checkpoint-10")


def test_a_checkpoint_that_is_not_whole_is_refused_by_name(tmp_path: Path) -> None:
    from common.checkpoints import find_checkpoint
    from common.errors import InputError

    made = checkpoint(tmp_path, 2)
    assert find_checkpoint(str(made), tmp_path, WORLD) == str(made)
    for ranks in (WORLD - 1, WORLD + 1):
        with pytest.raises(InputError, match=rf"no complete checkpoint of {ranks} rank\(s\) here"):
            find_checkpoint(str(made), tmp_path, ranks)
    (made / "trainer_state.json").unlink()
    with pytest.raises(InputError, match="no complete checkpoint to resume from"):
        find_checkpoint("latest", tmp_path, None)


def test_a_run_keeps_out_of_another_s_checkpoints(tmp_path: Path) -> None:
    from common.checkpoints import refuse_mixture
    from common.errors import InputError

    own, other = tmp_path / "own", tmp_path / "other"
    (own / "checkpoint-best").mkdir(parents=True)
    refuse_mixture(own, None)
    refuse_mixture(tmp_path / "none", None)
    mine, foreign = checkpoint(own, 2), checkpoint(other, 2)
    refuse_mixture(own, str(mine))
    for started_from in (None, str(foreign)):
        with pytest.raises(InputError, match=r"own holds checkpoint-2 of an earlier run.* or delete"):
            refuse_mixture(own, started_from)


def test_a_checkpoint_is_resumed_with_the_options_of_its_run(tmp_path: Path) -> None:
    from common import same_run
    from common.errors import InputError

    made = checkpoint(tmp_path, 2)
    same_run.refuse_another(made, {"seed": 1})  # an older one, with nothing to compare
    (tmp_path / same_run.FILE).write_text('{"seed": 1, "tokenizer": null}')
    same_run.refuse_another(made, {"seed": 1})
    with pytest.raises(InputError, match=r"another run: seed: then 1, now 2; tokenizer: then not given, now mine\."):
        same_run.refuse_another(made, {"seed": 2, "tokenizer": "mine"})


# -- the launcher ------------------------------------------------------------------------------------------------------


def test_a_process_that_no_launcher_has_started_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.deepspeed_config.find_spec", lambda name: None)  # no mpi4py
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    refuse_without_launcher()
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(InputError, match="this one lacks LOCAL_RANK"):
        refuse_without_launcher()
    monkeypatch.setenv("SM_TRAINING_ENV", "{}")
    refuse_without_launcher()
