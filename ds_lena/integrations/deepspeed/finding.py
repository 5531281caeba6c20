"""Finds the files of a checkpoint, and how they stand to what an engine would save."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from ...errors import StateError
from ...layers import named_parameters
from ...saved_files import Files, files_in, latest_tag
from ._internals import saved
from ._internals.engine import Asked, EngineView, logical_shapes
from ._internals.saved import reading
from .exchange import from_all
from .fitting import require_engine_state
from .reading import shard_at


@dataclass(frozen=True)
class Found:
    """A checkpoint as this rank sees it. `model`: what its model file holds. `own_model`: what that of this rank holds,
    if there is one for each. `live`: what the engine would save.
    """

    files: Files
    own_file: Path
    model: dict[str, Any]
    own_model: dict[str, Any]
    live: saved.Shard

    @cached_property
    def has_map(self) -> bool:
        """Whether the checkpoint says which pieces lie where. It may be without an optimizer's state."""
        if not self.files.optimizer:
            return False
        path = min(self.files.optimizer.items())[1]
        if path == self.files.model and self.model.get("optimizer") is None:
            return False
        lena = shard_at(path, self.model).inner.get("lena")
        return isinstance(lena, dict) and "pieces" in lena


def require_same_shapes(module: nn.Module, path: Path, model: dict[str, Any]) -> None:
    """Raise `StateError` if a weight or buffer of the checkpoint has another shape in this model."""
    before = reading(path, lambda: saved.shapes_in(model))
    parameters = named_parameters(module)
    now = {name: tuple(value.shape) for name, value in module.named_buffers()}
    shapes = logical_shapes([parameter for _, parameter in parameters])
    now |= {name: tuple(shape) for (name, _), shape in zip(parameters, shapes, strict=True)}
    for name, shape in now.items():
        if before.get(name, shape) != shape:
            was = "is no tensor" if before[name] is None else f"has the shape {before[name]}"
            raise StateError(
                f'LENA: "{name}" {was} in {path}, and has the shape {shape} in this model. Load the '
                "checkpoint into the model that was saved."
            )


def tag_of(view: EngineView, asked: Asked) -> str | None:
    """The tag of the checkpoint that is asked for, the same on all ranks. None if there is no checkpoint."""
    tag = latest_tag(asked.folder) if asked.tag is None else asked.tag
    tags = from_all(view.grid.everything, None if tag is None else str(tag))
    if len(set(tags)) > 1:
        seen = ", ".join(sorted({"none" if one is None else f'"{one}"' for one in tags}))
        raise StateError(
            f"LENA: the ranks see different checkpoints in {asked.folder}: {seen}. Give all ranks the same tag, "
            "and a folder that all of them see."
        )
    return tags[0]


def find(view: EngineView, asked: Asked, tag: str) -> Found:
    """Open a checkpoint.

    Raises:
        StateError: it is not there, is damaged, or of a model in another number of parts.
    """
    folder = asked.folder
    place = folder / tag
    files = reading(place, lambda: files_in(place, view.part, saved.read_file))
    if files is None:
        there = sorted(path.name for path in folder.glob("*") if path.is_dir()) if folder.is_dir() else []
        raise StateError(
            f"LENA: {place} holds no model file (*mp_rank_{view.part:02d}_model_states.pt). Give load_checkpoint the "
            f"tag of a checkpoint that is there. Folders in {folder}: {', '.join(there) or 'none'}."
        )
    model = saved.read_file(files.model)
    parts = reading(files.model, lambda: saved.parts_in(model))
    if parts not in (view.parts, None):
        raise StateError(
            f"LENA: {place} is of a model in {parts} parts, and this run has it in {view.parts} (tensor-parallel "
            "ranks). The parts are not put together: load it with as many as it was saved "
            "with. The number of data-parallel ranks may differ."
        )
    own_path = files.model_of(dist.get_rank(view.grid.data))
    own_model = saved.read_file(own_path) if own_path != files.model and own_path.exists() else model
    for path, content in {files.model: model, own_path: own_model}.items() if not asked.module_only else ():
        require_engine_state(path, content, view, asked)
    live = saved.shard_of(view.wrapper.state_dict(), dict(named_parameters(view.module)))
    return Found(files, saved.own_file(view.engine, folder, tag), model, own_model, live)


def kind_of(view: EngineView, found: Found) -> str:
    """How the checkpoint stands to what the engine would save.

    "foreign": it is of the same form, and does not say which pieces it holds. "same": with the same pieces.
    "other": neither.
    """
    path, live, stage = found.own_file, found.live, view.facts.stage
    names = {file.name for file in found.files.optimizer.values()}
    is_apart = stage == 0 and view.facts.experts
    if not path.is_file() or (path.name not in names and not is_apart):
        return "other"
    ranks = reading(found.files.model, lambda: saved.ranks_in(found.model))
    if (stage and ranks != view.grid.data_ranks) or not saved.has_order_of(found.model, view.engine):
        return "other"
    if stage == 0 and not is_apart and found.model.get("optimizer") is None:
        return "other"
    shard = shard_at(path, found.model)
    if reading(path, lambda: shard.form) != live.form:
        return "other"
    lena = shard.inner.get("lena")
    if not isinstance(lena, dict) or "pieces" not in lena:
        return "foreign"
    return "same" if lena["pieces"] == live.inner["lena"]["pieces"] else "other"
