"""Loads an ordinary DeepSpeed checkpoint that was saved in another layout: by more or fewer ranks, at another ZeRO
stage, with other sub-groups or another order of parameters.

LENA's state in each optimizer file says which pieces of which parameters lie in the tensors of that file. From these
maps every rank fills the tensors that its own engine would have saved, and DeepSpeed loads those as its own. Before
DeepSpeed changes anything, all ranks have read all that they need, or all raise one error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ...controller import Controller
from ...errors import StateError
from ...layers import named_parameters, without_compiled
from ...layouts.pieces import Copy, Piece, copies, pieces_from
from ...optimizer import LENA
from ...schedule import checkpoint
from ._internals import saved
from ._internals.engine import EngineView, logical_shapes
from .exchange import from_all, together

T = TypeVar("T")


@dataclass(frozen=True)
class Loaded:
    """What this rank takes from a checkpoint of another layout.

    `state`: what its own engine would have saved. `masters`: the master weights in it that hold parameters, by number.
    `frozen`: its parts of frozen weights. `buffers`: by their names in the module.
    """

    files: saved.Files
    state: dict[str, Any]
    masters: dict[int, Tensor]
    frozen: list[tuple[Tensor, Tensor]]
    buffers: dict[str, Any]


class Resharding:
    """Saves the map of pieces with one engine's checkpoints, and loads those of other layouts into it."""

    def __init__(self, view: EngineView, controller: Controller, lena: LENA) -> None:
        self._view, self._controller, self._lena = view, controller, lena
        self._everything = view.grid.everything
        placements = controller.binding.placements
        self._sizes = {placement.name: placement.shape.numel() for placement in placements}
        lena.register_state_dict_post_hook(self._add_pieces)
        if not (view.grid.is_split or view.facts.experts):
            view.around_load(self._loading)

    def _add_pieces(self, lena: torch.optim.Optimizer, packed: dict[str, Any]) -> None:
        names = [placement.name for placement in self._controller.binding.placements]
        pieces = {
            id(flat): [[names[s.parameter], s.start, s.length, s.offset] for s in segments]
            for flat, segments in self._controller.binding.layout.segments()
        }
        packed["lena"]["pieces"] = [pieces.get(id(p), []) for group in lena.param_groups for p in group["params"]]

    @contextmanager
    def _loading(self, folder: str, tag: str | None) -> Iterator[None]:
        loaded = together(self._everything, lambda: self._read(Path(folder), tag))
        if loaded is None:
            yield
            return

        def load_module() -> None:
            for parameter, values in loaded.frozen:
                saved.write_window(parameter, values)
            self._view.module.load_state_dict(loaded.buffers, strict=False)

        with saved.loading(self._view.engine, loaded.files, load_module, loaded.state):
            yield
        if self._view.facts.stage == 0:
            live = [p for group in self._lena.param_groups for p in group["params"]]
            saved.write_masters(self._view.wrapper, loaded.masters, live)

    # -- what is in the checkpoint ------------------------------------------------------------------------------------

    def _read(self, folder: Path, tag: str | None) -> Loaded | None:
        """None if DeepSpeed can load the checkpoint as it is, or will say itself that it cannot."""
        if tag is None:
            latest = folder / "latest"
            tag = latest.read_text().strip() if latest.is_file() else None
        place = folder / (tag or "")
        files = None if tag is None else _reading(place, lambda: saved.files_in(place))
        weights: dict[str, Tensor] = dict(named_parameters(self._view.module))
        own = saved.shard_of(self._view.wrapper.state_dict(), weights)
        kinds = set(from_all(self._everything, "foreign" if files is None else self._kind(files, own)))
        if kinds <= {"foreign"} or files is None:
            return None
        if kinds <= {"same"}:
            self._check_own(files, own)
            return None
        return self._resharded(files, own)

    def _check_own(self, files: saved.Files, own: saved.Shard) -> None:
        """Each rank loads its own file: all of them are whole and of one save, or every rank says which is not."""
        model = _reading(files.model, lambda: saved.read_file(files.model))
        path = files.optimizer.get(dist.get_rank(self._everything), files.model)
        found = self._found([path], model)
        _check(path, found.first, copies(pieces_from(own.inner["lena"]["pieces"]), found.maps, self._sizes), found.keys)
        of_ranks = from_all(self._everything, (str(path), found.numbers))
        _require_one_save(of_ranks)

    def _kind(self, files: saved.Files, own: saved.Shard) -> str:
        """How the file of this rank, or the first one, stands to what the engine would save.

        "foreign": it is not known which pieces it holds. "same", "other": whether they are the engine's.
        """
        rank, ranks = dist.get_rank(self._everything), dist.get_world_size(self._everything)
        model = _reading(files.model, lambda: saved.read_file(files.model))
        if len(files.optimizer) == 1 and files.optimizer[0] == files.model:
            path, is_same_number = files.model, True
        else:
            path = files.optimizer.get(rank, next(iter(files.optimizer.values())))
            is_same_number = _reading(files.model, lambda: saved.ranks_in(model)) == ranks
        shard = self._shard(path, model)
        if not isinstance(shard.inner.get("lena"), dict) or "pieces" not in shard.inner["lena"]:
            return "foreign"
        is_same_form = shard.outer.keys() == own.outer.keys() and is_same_number
        return "same" if is_same_form and shard.inner["lena"]["pieces"] == own.inner["lena"]["pieces"] else "other"

    @staticmethod
    def _shard(path: Path, model: Mapping[str, Any]) -> saved.Shard:
        return _reading(path, lambda: saved.optimizer_in(saved.read_file(path), saved.weights_in(model)))

    # -- from its layout to the engine's ------------------------------------------------------------------------------

    def _resharded(self, files: saved.Files, own: saved.Shard) -> Loaded:
        model = _reading(files.model, lambda: saved.read_file(files.model))
        paths = self._paths(files, _reading(files.model, lambda: saved.ranks_in(model)))
        found = self._found(paths, model)
        first = found.first
        pieces = pieces_from(own.inner["lena"]["pieces"])
        plan = copies(pieces, found.maps, self._sizes)
        if len(first.inner["param_groups"]) != len(own.inner["param_groups"]):
            raise StateError(
                f"LENA: {files.model.parent} was saved with {len(first.inner['param_groups'])} parameter groups, and "
                f"this optimizer has {len(own.inner['param_groups'])}. Make the groups as in the saved run."
            )
        masters = self._own_masters()
        filled = _Filled(masters, pieces)
        for file, wanted in plan.items():
            if wanted:
                path, shard = Path(file), self._shard(Path(file), model)
                _check(path, shard, {file: wanted}, found.keys)
                filled.take(path, shard, wanted)
        groups = [
            old | {key: new[key] for key in ("params", "param_names") if key in new}
            for old, new in zip(first.inner["param_groups"], own.inner["param_groups"], strict=True)
        ]
        inner = {"state": filled.state, "param_groups": groups, "lena": first.inner["lena"]}
        return Loaded(
            files=files,
            state=own.with_state(inner, filled.masters, first),
            masters={number: filled.masters[number] for number, held in enumerate(pieces) if held},
            frozen=self._frozen(files, model),
            buffers=self._buffers(files, model),
        )

    def _own_masters(self) -> list[Tensor]:
        """The tensors that hold the engine's master weights, by number, with their padding."""
        if self._view.facts.stage:
            return [flat for flat, _ in self._controller.binding.layout.segments()]
        return [p for group in self._lena.param_groups for p in group["params"]]

    def _paths(self, files: saved.Files, ranks: int) -> list[Path]:
        if files.optimizer.get(0) == files.model:
            return [files.model]
        missing = [rank for rank in range(ranks) if rank not in files.optimizer]
        if missing:
            raise StateError(
                f"LENA: the checkpoint {files.model.parent} was saved by {ranks} ranks, and the optimizer file of rank "
                f"{missing[0]} is not there (*zero_pp_rank_{missing[0]}_mp_rank_00_optim_states.pt). Restore it, or "
                "load an earlier checkpoint."
            )
        return [files.optimizer[rank] for rank in range(ranks)]

    def _found(self, paths: list[Path], model: Mapping[str, Any]) -> _Found:
        """What is in the files, after a look at all of them."""
        maps: dict[str, list[list[Piece]]] = {}
        keys: set[str] = set()
        numbers: list[tuple[str, str]] = []
        first = None
        for path in paths:
            shard = self._shard(path, model)
            first = first or shard
            lena = shard.inner.get("lena")
            if not isinstance(lena, dict):
                raise StateError(f"LENA: {path} holds no LENA state. Restore it, or load an earlier checkpoint.")
            try:
                checkpoint.require_loadable(lena, self._controller.config)
            except StateError as error:
                raise StateError(f"{error} The file is {path}.") from error
            maps[str(path)] = _reading(path, lambda lena=lena: pieces_from(lena["pieces"]))  # type: ignore[misc]
            keys |= _reading(path, lambda shard=shard: saved.state_keys(shard))  # type: ignore[misc]
            own = {key: value for key, value in lena.items() if key != "pieces"}
            numbers.append((str(path), json.dumps(own, sort_keys=True)))
        _require_one_save(numbers)
        assert first is not None, "there is a file at least"
        return _Found(maps, first, keys, numbers[0][1])

    def _frozen(self, files: saved.Files, model: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """This rank's part of each frozen weight, with the saved values."""
        found = [(name, p) for name, p in named_parameters(self._view.module) if name not in self._sizes]
        if not found:
            return []
        sizes = {name: logical_shapes([p])[0].numel() for name, p in found}
        own, held = [], {}
        for name, parameter in found:
            first, length = saved.window_of(parameter)
            own.append([Piece(name, 0, length, first)] if length else [])
        is_cut = files.model_of(1) != files.model
        ranks = saved.ranks_in(model) if is_cut else 1
        sources: dict[str, Callable[[], dict[str, Tensor]]] = {}
        for rank in range(ranks):
            path = files.model_of(rank)

            def read(path: Path = path) -> dict[str, Tensor]:
                content = _reading(path, lambda: saved.read_file(path))
                return _reading(path, lambda: saved.frozen_in(content) if is_cut else saved.weights_in(content))

            sources[str(path)] = read
            held[str(path)] = [_part(name, sizes[name], read().get(name), rank) for name in sizes]
        values = [torch.zeros(sum(piece.length for piece in pieces)) for pieces in own]
        for file, wanted in copies(own, held, sizes).items():
            content, names = sources[file](), list(sizes)
            for copy in wanted:
                source = content[names[copy.source]]
                values[copy.target] = values[copy.target].to(source.dtype)
                _copy(copy, source, values[copy.target])
        return [(parameter, value) for (_, parameter), value in zip(found, values, strict=True)]

    def _buffers(self, files: saved.Files, model: Mapping[str, Any]) -> dict[str, Any]:
        module = self._view.module
        parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        names = [name for name in module.state_dict() if name not in parameters]
        there = saved.weights_in(model)
        missing = [name for name in names if without_compiled(name) not in there]
        if missing:
            raise StateError(f'LENA: {files.model} lacks the buffer "{missing[0]}" of this model.')
        return {name: there[without_compiled(name)] for name in names}


def _part(name: str, size: int, held: Tensor | None, rank: int) -> list[Piece]:
    """The piece of a frozen weight that the file of one rank holds. ZeRO-3 pads the last one."""
    if held is None:
        return []
    offset = rank * held.numel()
    length = min(held.numel(), size - offset)
    return [Piece(name, 0, length, offset)] if length > 0 else []


@dataclass(frozen=True)
class _Found:
    """What is in the optimizer files: the pieces in each, what the first one holds, the names in the base rule's state,
    and LENA's own state as text, which is the same in all of them.
    """

    maps: dict[str, list[list[Piece]]]
    first: saved.Shard
    keys: set[str]
    numbers: str


def _require_one_save(of_files: list[tuple[str, str]]) -> None:
    """Raise `StateError` if LENA's state is not the same in all files. `of_files`: each with its state as text."""
    first, known = of_files[0]
    for path, numbers in of_files[1:]:
        if numbers != known:
            raise StateError(
                f"LENA: {path} and {first} are of different saves: LENA's state in them differs. Restore the one that "
                "was replaced, or load an earlier checkpoint."
            )


def _check(path: Path, shard: saved.Shard, plan: Mapping[str, list[Copy]], keys: set[str]) -> None:
    """Raise `StateError` if a file lacks something of what is to be copied from it."""
    for copy in plan[str(path)]:
        state = shard.inner["state"].get(copy.source, {})
        lacking = sorted(keys - state.keys())
        if lacking and (state or not shard.may_lack_state):
            what = f'"{lacking[0]}"'
        elif not _reaches(shard.masters[copy.source], copy):
            what = "the master weights"
        else:
            short = sorted(key for key, value in state.items() if key != "step" and not _reaches(value, copy))
            if not short:
                continue
            what = f'"{short[0]}"'
        raise StateError(f'LENA: {path} lacks {what} of "{copy.name}". Restore it, or load an earlier checkpoint.')


def _reaches(tensor: object, copy: Copy) -> bool:
    return isinstance(tensor, Tensor) and tensor.numel() >= copy.begin + copy.length


class _Filled:
    """Master weights and the base rule's state in the engine's layout, filled from one file after the other."""

    def __init__(self, like: list[Tensor], pieces: list[list[Piece]]) -> None:
        self._like = like
        self.masters = [
            torch.zeros(tensor.shape, dtype=tensor.dtype) if held else tensor.detach()
            for tensor, held in zip(like, pieces, strict=True)
        ]
        self.state: dict[int, dict[str, Any]] = {}
        self._steps: dict[int, tuple[float, str, Path]] = {}

    def take(self, path: Path, shard: saved.Shard, wanted: list[Copy]) -> None:
        for copy in wanted:
            _copy(copy, shard.masters[copy.source], self.masters[copy.target])
            for key, value in shard.inner["state"].get(copy.source, {}).items():
                if key == "step":
                    self._take_step(path, copy, value)
                    continue
                target = self.state.setdefault(copy.target, {})
                if key not in target:
                    target[key] = torch.zeros(self._like[copy.target].shape, dtype=value.dtype)
                _copy(copy, value, target[key])

    def _take_step(self, path: Path, copy: Copy, step: Any) -> None:
        number = float(step)
        known, name, other = self._steps.setdefault(copy.target, (number, copy.name, path))
        if known != number:
            raise StateError(
                f'LENA: "{copy.name}" in {path} has had {number:g} updates, and "{name}" in {other} {known:g}. In this '
                "layout both lie in one tensor, which has one count. Load the checkpoint at ZeRO 0."
            )
        self.state.setdefault(copy.target, {})["step"] = torch.as_tensor(step).clone()


def _copy(copy: Copy, source: Any, target: Tensor) -> None:
    values = source.detach().reshape(-1).narrow(0, copy.begin, copy.length)
    target.view(-1).narrow(0, copy.start, copy.length).copy_(values)


def _reading(path: Path, read: Callable[[], T]) -> T:
    """What `read()` returns. Whatever ends it is an error that names the file."""
    try:
        return read()
    except StateError:
        raise
    except Exception as error:
        raise StateError(
            f"LENA: {path} cannot be read as a file of a checkpoint ({type(error).__name__}: {error}). Restore it, or "
            "load an earlier checkpoint."
        ) from error
