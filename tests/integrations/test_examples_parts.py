"""Parts of the examples on their own: presets, sizes, texts and streams, checkpoints that are whole."""

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
from common.deepspeed_config import read_config
from common.errors import InputError, give_up

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
HELD_OUT = 4  # texts


def stream(folder: Path, texts: int = 40, parts: int = 2) -> Any:
    """An endless stream of blocks of different numbers, from texts in some files that are one token a word."""
    from common.corpus import DataArguments, _endless
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<end>": 0} | {f"w{number}": number for number in range(1, 1 + texts * LENGTH)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    rows = [" ".join(f"w{1 + text * LENGTH + i}" for i in range(LENGTH)) for text in range(texts)]
    for part in range(parts):
        (folder / f"{part}.txt").write_text("\n\n".join(rows[part * texts // parts : (part + 1) * texts // parts]))
    args = DataArguments(
        dataset=str(folder), sequence_length=LENGTH, streaming=True, held_out_texts=HELD_OUT, shuffle_texts=10
    )
    return _endless(args, fast, seed=1)


def first(folder: Path, blocks: int) -> list[tuple[int, ...]]:
    return [tuple(int(i) for i in block["input_ids"]) for block in stream(folder).take(blocks)]


def test_a_stream_never_ends_comes_in_other_orders_and_leaves_out_the_held_out_texts(tmp_path: Path) -> None:
    texts = (40 - HELD_OUT) * (LENGTH + 1)  # tokens
    seen = [token for block in first(tmp_path, 3 * texts // LENGTH) for token in block]
    rounds = [tuple(seen[turn * texts : (turn + 1) * texts]) for turn in range(3)]
    assert len(set(rounds)) == 3
    assert min(token for token in seen if token) == HELD_OUT * LENGTH + 1
    assert len({token for token in rounds[0] + rounds[1] if token}) == (40 - HELD_OUT) * LENGTH
    assert [token for block in first(tmp_path, 3 * texts // LENGTH) for token in block] == seen


def of_a_rank(folder: Path) -> list[tuple[int, ...]]:
    """The blocks that accelerate gives to this rank, as in HF's Trainer."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True)
    loader = torch.utils.data.DataLoader(
        stream(folder), batch_size=2, collate_fn=lambda rows: torch.tensor([list(row["input_ids"]) for row in rows])
    )
    batches = [batch for batch, _ in zip(accelerator.prepare(loader), range(BLOCKS // 2), strict=False)]
    AcceleratorState._reset_state(True)
    return [tuple(row) for row in torch.cat(batches).tolist()]


def test_every_rank_sees_other_blocks_of_a_stream_and_none_is_left_out(ranks: Ranks, tmp_path: Path) -> None:
    wanted = first(tmp_path, BLOCKS * WORLD)
    seen = ranks.run(of_a_rank, tmp_path)
    assert [len(blocks) for blocks in seen] == [BLOCKS] * WORLD
    assert sorted(block for blocks in seen for block in blocks) == sorted(wanted)


# -- texts -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", ["a[1]", "b*", "c?d"])
def test_names_of_files_are_no_patterns(tmp_path: Path, name: str) -> None:
    from common.texts import load_texts

    for folder in (name, "b", "cad"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "texts.txt").write_text(f"{folder} one\n\ntwo\n\nthree\n")
    whole = load_texts(str(tmp_path / name))
    streamed = load_texts(str(tmp_path / name), held_out=1, streaming=True)
    assert [*whole.train["text"], *whole.held_out["text"]] == [f"{name} one", "two", "three\n"]
    assert [row["text"] for row in streamed.train] == ["two", "three\n"]


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("column", ["text", "words"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_as_the_hub_has_them(tmp_path: Path, column: str, streaming: bool) -> None:
    """Its own validation split is held out, else some of its rows."""
    from common.texts import load_texts
    from datasets import Dataset

    (tmp_path / "set").mkdir()
    Dataset.from_dict({"id": [1, 2, 3], column: ["a", "b", "c"]}).to_parquet(tmp_path / "set" / "train.parquet")
    held_out = 1 if streaming else 0.3
    split = load_texts(str(tmp_path / "set"), column=column, held_out=held_out, streaming=streaming)
    assert sorted([row["text"] for row in split.train] + [row["text"] for row in split.held_out]) == ["a", "b", "c"]
    Dataset.from_dict({"id": [4], column: ["d"]}).to_parquet(tmp_path / "set" / "validation.parquet")
    own = load_texts(str(tmp_path / "set"), column=column, held_out=held_out, streaming=streaming)
    assert ([row["text"] for row in own.train], list(own.held_out)) == (["a", "b", "c"], [{"text": "d"}])


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
    from common.resuming import find_checkpoint

    for update in (2, 4, 10, 12, 14, 16):
        checkpoint(tmp_path, update)
    (tmp_path / "checkpoint-16" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-14" / "rng_state_1.pth").unlink()
    torn = tmp_path / "checkpoint-12" / "global_step12" / "zero_optim_states.pt"
    torn.write_bytes(torn.read_bytes()[:-30])
    assert find_checkpoint("latest", tmp_path, WORLD) == tmp_path / "checkpoint-10"
    for ranks in (WORLD - 1, WORLD + 1):
        with pytest.raises(InputError, match=rf"checkpoint-10: no complete checkpoint of {ranks} rank\(s\)"):
            find_checkpoint(str(tmp_path / "checkpoint-10"), tmp_path, ranks)


def test_a_checkpoint_without_options_beside_it_is_taken_as_it_is(tmp_path: Path) -> None:
    from common import resuming

    made = checkpoint(tmp_path, 2)
    resuming.refuse_another(made, {"seed": 1})
    resuming.keep_options(tmp_path, {"seed": 1, "tokenizer": None})
    resuming.refuse_another(made, {"seed": 1})
    with pytest.raises(InputError, match=r'another run: seed: then 1, now 2; tokenizer: then null, now "mine"\.'):
        resuming.refuse_another(made, {"seed": 2, "tokenizer": "mine"})


# -- errors ------------------------------------------------------------------------------------------------------------


def test_the_first_rank_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, code in (("0", "me: error: so"), ("1", 1)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as end:
            give_up("me", "so")
        assert end.value.code == code


def test_a_process_that_no_launcher_has_started_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.deepspeed_config.find_spec", lambda name: None)  # no mpi4py
    monkeypatch.setenv("RANK", "0")
    assert read_config("{}") == {}
    monkeypatch.delenv("RANK")
    with pytest.raises(InputError, match="write `deepspeed --num_gpus N`"):
        read_config("{}")
