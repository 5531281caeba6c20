"""Finds and reads the files of a DeepSpeed checkpoint. It needs torch alone.

A save into a folder of files leaves those of more ranks, of more parts of the model and of another ZeRO stage. So the
model file says which of them belong to the save.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import StateError

_WAY_OUT = "Restore it, or inspect an earlier checkpoint."


@dataclass(frozen=True)
class SavedFiles:
    """The files of one save. `models`: what each model file holds, one for each part of the model. `optimizers`: the
    files with the optimizer's state; at ZeRO 0 the model files.
    """

    models: dict[Path, Mapping[str, Any]]
    optimizers: list[Path]


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
            "damaged, or was not written by torch.save. Restore it, or inspect an earlier checkpoint."
        ) from error


def files_in(folder: Path) -> SavedFiles:
    """The files of the save that the model file is of.

    Raises:
        StateError: a file is missing, or it is not to be told which of two saves is the newer one.
    """
    files = _of_part(folder, 0)
    (first,) = files.models.values()
    for part in range(1, first.get("mp_world_size") or 1):
        other = _of_part(folder, part)
        files = SavedFiles(files.models | other.models, files.optimizers + other.optimizers)
    return files


def stage_of(optimizer_file: object) -> int | None:
    """The ZeRO stage of the wrapper that saved the content of an optimizer file. None if it does not say."""
    state = optimizer_file.get("optimizer_state_dict") if isinstance(optimizer_file, Mapping) else None
    stage = state.get("zero_stage") if isinstance(state, Mapping) else None
    stage = stage.given[0] if isinstance(stage, Empty) and stage.given else stage  # an enum of DeepSpeed's
    return stage if isinstance(stage, int) else None


def _of_part(folder: Path, part: int) -> SavedFiles:
    end = f"mp_rank_{part:02d}"
    whole, cut = folder / f"{end}_model_states.pt", folder / f"zero_pp_rank_0_{end}_model_states.pt"
    models = {path: _model(path) for path in (whole, cut) if path.exists()}
    if not models:
        raise StateError(
            f"LENA: {folder} holds no model file of part {part} of the model ({whole.name}, or at ZeRO 3 {cut.name}), "
            f"which says by how many ranks it was saved. {_WAY_OUT}"
        )
    kind, shards = _shards(folder, end, models)
    if shards and whole in models and models[whole].get("optimizer") is not None:
        raise StateError(
            f"LENA: {folder} holds the files of two saves, at ZeRO 0 ({whole.name}) and above (*optim_states.pt). Move "
            "the files of the older one away."
        )
    model = cut if cut in models else whole
    if shards and len(models) == 2:
        model = cut if stage_of(read(shards[min(shards)])) == 3 else whole
    return SavedFiles({model: models[model]}, _optimizers(model, models[model], end, kind, shards))


def _shards(folder: Path, end: str, models: Mapping[Path, Mapping[str, Any]]) -> tuple[str, dict[int, Path]]:
    """How the names of optimizer files of ZeRO 1 to 3 begin, and those that are there, by rank."""
    found = {kind: _by_rank(folder, kind, end) for kind in ("zero_pp", "bf16_zero_pp")}
    is_bf16 = _is_bf16(models[max(models, key=lambda path: path.stat().st_mtime)])
    if all(found.values()) and is_bf16 is None:
        raise StateError(
            f"LENA: {folder} holds the files of two saves: bf16_zero_* are of one in bf16, zero_* of another one. "
            "Move the optimizer files of the older one away."
        )
    of_save, other = ("bf16_zero_pp", "zero_pp") if is_bf16 else ("zero_pp", "bf16_zero_pp")
    return (other, found[other]) if found[other] and not found[of_save] else (of_save, found[of_save])


def _optimizers(model: Path, content: Mapping[str, Any], end: str, kind: str, shards: Mapping[int, Path]) -> list[Path]:
    """The optimizer files that belong to a model file."""
    if content.get("optimizer") is not None:  # ZeRO 0
        if not content.get("num_experts"):
            return [model]
        kind, shards = "expp", _by_rank(model.parent, "expp", end)
        ranks: Any = max(shards, default=0) + 1  # each rank of experts has a file, and nothing says how many there are
    elif shards or content.get("param_shapes") is not None:
        ranks = content.get("dp_world_size")
    else:  # of a model without an optimizer
        return [model]
    if type(ranks) is not int or ranks < 1:
        raise StateError(f'LENA: "dp_world_size" in {model} is {ranks!r}, and should be a whole number. {_WAY_OUT}')
    for rank in range(ranks):
        names = [f"{kind}_rank_{rank}_{end}_optim_states.pt"]
        if model.name.startswith("zero_pp_rank_0_"):
            names.append(model.name.replace("zero_pp_rank_0_", f"zero_pp_rank_{rank}_"))
        for name in names:
            if not model.with_name(name).exists():
                raise StateError(
                    f"LENA: {model.parent} was saved by {ranks} ranks, and {name} is not there. {_WAY_OUT}"
                )
    return [shards[rank] for rank in range(ranks)]


def _by_rank(folder: Path, kind: str, end: str) -> dict[int, Path]:
    pattern = rf"{kind}_rank_(\d+)_{end}_optim_states\.pt"
    matches = ((re.fullmatch(pattern, path.name), path) for path in folder.glob(f"{kind}_rank_*_{end}_optim_states.pt"))
    return {int(match[1]): path for match, path in matches if match}


def _model(file: Path) -> Mapping[str, Any]:
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
