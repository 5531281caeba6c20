"""Which checkpoint to resume from, and whether a run may write where it is told to."""

import re
import tempfile
import zipfile
from pathlib import Path

from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from . import same_run
from .errors import InputError


def choose_checkpoint(args: TrainingArguments, options: same_run.Options) -> str | None:
    """What `--resume_from_checkpoint` stands for. The first rank looks, and all ranks take what it found.

    Args:
        options: of this run, which must be those of the checkpoint's.

    Raises:
        InputError: on every rank; no complete checkpoint of this run there, or the output directory cannot be used.
    """
    found: list[str | None] = [None, None]  # the checkpoint, or what is wrong
    if args.process_index == 0:
        try:
            found[0] = _look(args, options)
        except InputError as error:
            found[1] = str(error)
    broadcast_object_list(found)
    if found[1] is not None:
        raise InputError(found[1])
    return found[0]


def _look(args: TrainingArguments, options: same_run.Options) -> str | None:
    asked, output_dir = args.resume_from_checkpoint, Path(str(args.output_dir))
    checkpoint = None
    if asked is not None:
        # With `save_on_each_node` the other nodes' files are elsewhere.
        checkpoint = find_checkpoint(asked, output_dir, None if args.save_on_each_node else args.world_size)
        same_run.refuse_another(Path(checkpoint), options)
    refuse_mixture(output_dir, checkpoint)
    require_writable(output_dir)
    return checkpoint


def refuse_mixture(output_dir: Path, checkpoint: str | None) -> None:
    """Raise where ``output_dir`` holds another run's checkpoints: `latest` could later take one of them.

    Args:
        checkpoint: what is resumed; None for a run that starts.
    """
    begun = numbered(output_dir)
    if begun and (checkpoint is None or Path(checkpoint).resolve().parent != output_dir.resolve()):
        raise InputError(
            f"{output_dir} holds {begun[0].name} of an earlier run: go on with --resume_from_checkpoint latest, "
            "give another --output_dir, or delete its checkpoints"
        )


def require_writable(output_dir: Path) -> None:
    """Make the folder; a file that comes and goes tells whether one can be written."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise InputError(
            f"output_dir {output_dir}: cannot write there: {error.strerror}; give another --output_dir"
        ) from error


def find_checkpoint(asked: str, output_dir: Path, ranks: int | None) -> str:
    """The checkpoint ``asked`` for: a path, or ``latest`` for the newest complete one in ``output_dir``.

    Args:
        ranks: how many must have written it; None if that cannot be seen here.

    Raises:
        InputError: no complete checkpoint there.
    """
    by = f" of {ranks} rank(s)" if ranks else ""
    if asked != "latest":
        if not is_complete(Path(asked), ranks):
            raise InputError(f"{asked}: no complete checkpoint{by} here")
        return asked
    for folder in numbered(output_dir):
        if is_complete(folder, ranks):
            return str(folder)
    raise InputError(f"{output_dir}: no complete checkpoint{by} to resume from")


def numbered(output_dir: Path) -> list[Path]:
    """The checkpoints in a folder, complete or not, the newest first."""
    found = [folder for folder in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)]
    return sorted(found, key=lambda folder: int(folder.name.split("-")[1]), reverse=True)


def is_complete(folder: Path, ranks: int | None) -> bool:
    """Whether all ranks were done with writing this checkpoint.

    The first rank writes the Trainer's state last, but does not wait for the others' random states. What torch writes
    is a zip file, whose table of contents comes at its end.
    """
    random_states = len(list(folder.glob("rng_state*.pth")))
    if not (folder / TRAINER_STATE_NAME).is_file() or random_states != (ranks or random_states):
        return False
    return all(zipfile.is_zipfile(file) for file in folder.rglob("*") if file.suffix in (".pt", ".pth"))
