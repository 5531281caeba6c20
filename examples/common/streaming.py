"""Texts that are read while a model trains on them, and never all at once."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from datasets import Dataset, IterableDataset, load_dataset
from transformers import PreTrainedTokenizerFast

from .blocks import packer
from .errors import InputError
from .texts import hub_error, load_paragraphs, local_files, own_held_out, refuse_unless_text, require_column, sotu_split


class Streams(NamedTuple):
    """Two streams with one column, ``text``."""

    train: IterableDataset
    held_out: IterableDataset


class Endless(torch.utils.data.IterableDataset):
    """Blocks of ``length`` tokens, ``{"input_ids": ...}``, from the texts of a stream, over and over.

    Texts are drawn from a buffer of ``buffer`` texts, in another order every time round. What comes is a function of
    the stream, the numbers here and nothing else; so a resumed run, which reads past what it has seen, sees what an
    unbroken one does. Every rank may read it: accelerate gives each its own blocks.
    """

    def __init__(
        self, texts: IterableDataset, tokenizer: PreTrainedTokenizerFast, length: int, buffer: int, seed: int
    ) -> None:
        shuffled = texts.shuffle(seed=seed, buffer_size=buffer)
        self._blocks = shuffled.map(packer(tokenizer, length), batched=True, remove_columns=["text"])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for turn in itertools.count():
            self._blocks.set_epoch(turn)
            found = False
            for block in self._blocks:
                found = True
                yield block
            if not found:  # a worker of the loader that has no file of its own
                return


def open_streams(source: str, config: str | None, column: str, held_out_texts: int) -> Streams:
    """Open ``source``, as ``texts.load_texts`` understands it, without reading it.

    Held-out texts come from the source's own validation or test split, or are its first ``held_out_texts``.

    Raises:
        InputError: nothing there, or what is there is not UTF-8 text.
    """
    files = local_files(source)
    for file in files:
        refuse_unless_text(file)
    if source == "sotu":
        split = sotu_split(files)
        return Streams(load_paragraphs(split.train, streaming=True), load_paragraphs(split.held_out, streaming=True))
    if files:
        return _split_head(load_paragraphs(files, streaming=True), held_out_texts)
    return _from_hub(source, config, column, held_out_texts)


def read_rows(stream: IterableDataset, rows: int, source: str) -> Dataset:
    """The first ``rows`` rows, or as many as there are."""
    try:
        texts = [row["text"] for row in stream.take(rows)]
    except (OSError, ValueError) as error:  # no network; not UTF-8
        raise InputError(f"{source}: cannot read the texts: {str(error).splitlines()[0]}") from error
    return Dataset.from_dict({"text": texts})


def _from_hub(name: str, config: str | None, column: str, held_out_texts: int) -> Streams:
    try:
        splits = load_dataset(name, config, streaming=True)
        train = splits["train"] if "train" in splits else next(iter(splits.values()))
        columns = train.column_names or list(next(iter(train)))
    except (OSError, ValueError) as error:
        raise hub_error(name, error) from error
    require_column(name, column, columns)
    held_out = own_held_out(splits)
    streams = Streams(train, held_out) if held_out else _split_head(train, held_out_texts)
    return Streams(*(stream.select_columns([column]).rename_column(column, "text") for stream in streams))


def _split_head(stream: IterableDataset, rows: int) -> Streams:
    return Streams(stream.skip(rows), stream.take(rows))
