"""Finds the files of a DeepSpeed checkpoint, and reads them safely. It needs torch alone.

A save into a folder of files leaves those of more ranks, of more parts of the model and of another ZeRO stage. So the
model file says which of them belong to the save.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import StateError

_WAY_OUT = "Restore it, or take an earlier checkpoint."
_ASK = "Write the name of a checkpoint's folder into it, or ask for a checkpoint by its tag."


SAVE = "ds_lena_save"
"""Where a model file has the name of the save that it is of. LENA's state has it under "save"."""


@dataclass(frozen=True)
class Files:
    """The files of one save, for one part of the model.

    `optimizer`: by rank; at ZeRO 0 it is `model`. `model`: that of the first rank.
    """

    optimizer: dict[int, Path]
    model: Path

    @property
    def is_cut(self) -> bool:
        """Whether each rank has a model file, as ZeRO-3 has."""
        return self.model.name.startswith("zero_")

    def model_of(self, rank: int) -> Path:
        """The file with the frozen weights of one rank."""
        return self.model.with_name(self.model.name.replace("zero_pp_rank_0_", f"zero_pp_rank_{rank}_"))

    def models(self, parts: int) -> list[str]:
        """The model files of all parts of the model."""
        names = [re.sub(r"mp_rank_\d+", f"mp_rank_{part:02d}", self.model.name) for part in range(parts)]
        return [str(self.model.with_name(name)) for name in names]

    def of_ranks(self, ranks: int) -> list[Path]:
        """The optimizer files that these ranks have saved. Raises `StateError` if one is missing."""
        if self.optimizer.get(0) == self.model:
            return [self.model]
        missing = [rank for rank in range(ranks) if rank not in self.optimizer]
        if missing:
            part = re.search(r"mp_rank_\d+", self.model.name)
            raise StateError(
                f"LENA: the checkpoint {self.model.parent} was saved by {ranks} ranks, and the optimizer file of rank "
                f"{missing[0]} is not there (*rank_{missing[0]}_{part and part[0]}_optim_states.pt). {_WAY_OUT}"
            )
        return [self.optimizer[rank] for rank in range(ranks)]


class Empty:
    """Stands for an object of a package that is not needed. `given`: what it was made of."""

    def __new__(cls, *given: Any, **_: Any) -> Empty:
        made = super().__new__(cls)
        made.given = given
        return made

    given: tuple[Any, ...]

    def __setstate__(self, state: Any) -> None:
        pass


def read(file: Path) -> Any:
    """What was saved by `torch.save`, with an `Empty` for each object of a package. Nothing in it is executed.

    Raises:
        StateError: the file cannot be read. All but the numbers in tensors is compared with its checksum.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                for entry in archive.infolist():
                    if entry.filename.endswith("/data.pkl") and entry.CRC:  # 0: saved without checksums
                        archive.read(entry)
        with torch.serialization.safe_globals([(Empty, name) for name in names]):
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # of pickle, zip and torch: many kinds, and all mean the same
        raise StateError(
            f"LENA: {file} cannot be read: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}. It is "
            f"damaged, or was not written by torch.save. {_WAY_OUT}"
        ) from error


def files_in(folder: Path, part: int, read: Callable[[Path], Any] = read) -> Files | None:
    """The files of the newest save in a folder, for one part of the model. None if there is no model file.

    `read(file)`: what a file holds.

    Raises:
        StateError: it is not to be told which of two saves is the newer one.
    """
    end = f"mp_rank_{part:02d}"
    whole, cut = folder / f"{end}_model_states.pt", folder / f"zero_pp_rank_0_{end}_model_states.pt"
    there = sorted((path for path in (whole, cut) if path.exists()), key=lambda path: path.stat().st_mtime)
    if not there:
        return None
    newest = _dictionary(there[-1], read)
    if newest.get("optimizer") is not None:
        return Files({0: whole}, whole)  # a save at ZeRO 1 and 2 would have left none in this file
    found = {kind: _by_rank(folder, kind, end) for kind in ("zero_pp", "bf16_zero_pp")}
    if all(found.values()):
        bf16 = _is_bf16(newest)
        if bf16 is None:
            raise StateError(
                f"LENA: {folder} holds the files of two saves: bf16_zero_* are of one in bf16, zero_* of another one. "
                "Move the optimizer files of the older save away."
            )
        found["zero_pp" if bf16 else "bf16_zero_pp"] = {}
    optimizer = found["zero_pp"] or found["bf16_zero_pp"]
    model, has_shards = there[-1], newest.get("param_shapes") is not None
    if len(there) == 2 and optimizer:
        model = cut if stage_of(read(min(optimizer.items())[1])) == 3 else whole
    return Files(optimizer if optimizer or has_shards else {0: model}, model)


def latest_tag(folder: Path) -> str | None:
    """The tag of the newest checkpoint in a folder, as its file `latest` says. None without that file.

    Raises:
        StateError: it is empty, or no text.
    """
    latest = folder / "latest"
    if not latest.is_file():
        return None
    try:
        tag = latest.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StateError(f"LENA: {latest} cannot be read: {error}. {_ASK}") from error
    if not tag:
        raise StateError(f"LENA: {latest} is empty. A run was killed while it wrote it, perhaps. {_ASK}")
    return tag


def all_files_in(folder: Path) -> tuple[dict[Path, Mapping[str, Any]], list[Path]]:
    """What the model files of the newest save hold, and its optimizer files; of all parts of the model.

    Raises:
        StateError: a file is missing, or it is not to be told which of two saves is the newer one.
    """
    models: dict[Path, Mapping[str, Any]] = {}
    optimizers: list[Path] = []
    parts: Any = 1
    while len(models) < parts:
        files = files_in(folder, len(models))
        if files is None:
            raise StateError(
                f"LENA: {folder} holds no model file of part {len(models)} of the model "
                f"(*mp_rank_{len(models):02d}_model_states.pt), which says by how many ranks it was saved. {_WAY_OUT}"
            )
        content = _dictionary(files.model, read)
        parts = content.get("mp_world_size") or 1
        if type(parts) is not int:
            raise StateError(f'LENA: "mp_world_size" in {files.model} is {parts!r}. {_WAY_OUT}')
        models[files.model] = content
        optimizers += _optimizers(files, content)
    return models, optimizers


def stage_of(optimizer_file: object) -> int | None:
    """The ZeRO stage of the wrapper that saved the content of an optimizer file. None if it does not say."""
    state = optimizer_file.get("optimizer_state_dict") if isinstance(optimizer_file, Mapping) else None
    stage = state.get("zero_stage") if isinstance(state, Mapping) else None
    stage = stage.given[0] if isinstance(stage, Empty) and stage.given else stage  # an enum of DeepSpeed's
    return int(stage) if isinstance(stage, int) else None


def _optimizers(files: Files, content: Mapping[str, Any]) -> list[Path]:
    """The optimizer files that belong to a model file."""
    model = files.model
    if content.get("optimizer") is not None and content.get("num_experts"):
        shards = _by_rank(model.parent, "expp", model.name.removesuffix("_model_states.pt"))
        return Files(shards, model).of_ranks(max(shards, default=0) + 1)  # nothing says how many ranks of experts
    if files.optimizer == {0: model}:
        return [model]  # ZeRO 0, or a model without an optimizer
    ranks: Any = content.get("dp_world_size")
    if type(ranks) is not int or ranks < 1:
        raise StateError(f'LENA: "dp_world_size" in {model} is {ranks!r}, and should be a whole number. {_WAY_OUT}')
    optimizers = files.of_ranks(ranks)
    for rank in range(ranks):
        if not files.model_of(rank).exists():
            raise StateError(
                f"LENA: {model.parent} was saved by {ranks} ranks, and {files.model_of(rank).name} is not there. "
                f"{_WAY_OUT}"
            )
    return optimizers


def _by_rank(folder: Path, kind: str, end: str) -> dict[int, Path]:
    pattern = rf"{kind}_rank_(\d+)_{end}_optim_states\.pt"
    matches = ((re.fullmatch(pattern, path.name), path) for path in folder.glob(f"{kind}_rank_*_{end}_optim_states.pt"))
    return {int(match[1]): path for match, path in matches if match}


def _dictionary(file: Path, read: Callable[[Path], Any]) -> Mapping[str, Any]:
    content = read(file)
    if not isinstance(content, Mapping):
        raise StateError(f"LENA: {file} is no model file of DeepSpeed: it holds no dictionary. {_WAY_OUT}")
    return content


def _is_bf16(model: Mapping[str, Any]) -> bool | None:
    """Whether it was saved in bf16. None if it does not say."""
    entries = model.get("ds_config")
    if not isinstance(entries, Mapping):
        return None
    entry = entries.get("bf16", entries.get("bfloat16")) or {}
    return bool(entry.get("enabled", False))
