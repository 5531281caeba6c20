"""Loads an ordinary DeepSpeed checkpoint that was saved in another layout: by more or fewer ranks, at another ZeRO
stage, with other sub-groups or another order of parameters.

LENA's state in each optimizer file says which pieces of which parameters lie in the tensors of that file. From these
maps every rank fills the tensors that its own engine would have saved, and DeepSpeed loads those as its own. Before
DeepSpeed changes anything, all ranks have read all that they need, or all raise one error.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...alike import require_alike
from ...controller import Controller
from ...errors import StateError
from ...keys import group_keys
from ...layers import without_compiled
from ...layouts.pieces import copies, pieces_from
from ...optimizer import LENA
from ...saved_files import SAVE, Files, latest_tag
from ._internals import saved
from ._internals.engine import Asked, EngineView, logical_shapes
from ._internals.saved import reading
from .differences import require_same_groups, tell_of_fresh_start, tell_of_keys, tell_of_moved
from .exchange import from_all, together
from .filling import Filled, frozen_weights, names_of_rest
from .finding import Found, find, kind_of, require_same_shapes, tag_of
from .fitting import module_misfit, require_wrapper_state
from .reading import Content, content_of, groups_of, require_one_save, require_there, shard_at


@dataclass(frozen=True)
class Loaded:
    """What this rank takes from a checkpoint of another layout.

    `state`: what its own engine would have saved. `masters`: the master weights in it that hold parameters, by number.
    `frozen`: its parts of frozen weights. `buffers`: by their names in the module.
    """

    files: Files
    state: dict[str, Any]
    masters: dict[int, Tensor]
    frozen: list[tuple[Tensor, Tensor]]
    buffers: dict[str, Any]


class Resharding:
    """Saves the map of pieces with one engine's checkpoints, and loads those of other layouts into it."""

    def __init__(self, view: EngineView, controller: Controller, lena: LENA) -> None:
        self._view, self._controller, self._lena = view, controller, lena
        self._everything = view.grid.everything
        names = [placement.name for placement in controller.binding.placements]
        shapes = logical_shapes(controller.parameters)
        self._sizes = {name: shape.numel() for name, shape in zip(names, shapes, strict=True)}
        # A pipeline and experts have files of their own for the module.
        self._can_reshard = not (view.facts.pipelined or view.facts.experts)
        self._save = ""
        lena.register_state_dict_post_hook(self._add_map)
        view.around_load(self._loading)
        view.in_checkpoints(SAVE, self._name_save)

    def _name_save(self) -> str:
        """A name that all files of one save have, and no other: so files that are left of another one are noticed."""
        self._save = from_all(self._everything, secrets.token_hex(8))[0]
        return self._save

    def _add_map(self, lena: torch.optim.Optimizer, packed: dict[str, Any]) -> None:
        names = [placement.name for placement in self._controller.binding.placements]
        pieces = {
            id(flat): [[names[s.parameter], s.start, s.length, s.offset] for s in segments]
            for flat, segments in self._controller.binding.layout.segments()
        }
        packed["lena"]["save"] = self._save
        packed["lena"]["pieces"] = [pieces.get(id(p), []) for group in lena.param_groups for p in group["params"]]

    @contextmanager
    def _loading(self, asked: Asked) -> Iterator[bool]:
        loaded = together(self._everything, lambda: reading(asked.folder, lambda: self._read(asked)))
        view = self._view
        if loaded is None:
            yield False
            if view.facts.stage == 0 and not asked.wants_state:
                saved.refresh_masters(view.wrapper)
            return

        def load_module() -> None:
            for parameter, values in loaded.frozen:
                saved.write_window(parameter, values)
            view.module.load_state_dict(loaded.buffers, strict=False)

        with saved.loading(view.engine, loaded.files.models(view.parts), load_module, loaded.state, asked.wants_state):
            yield True
        if view.facts.stage == 0:
            live = [p for group in self._lena.param_groups for p in group["params"]]
            saved.write_masters(view.wrapper, loaded.masters, live)

    # -- what is in the checkpoint ------------------------------------------------------------------------------------

    def _read(self, asked: Asked) -> Loaded | None:
        """None if DeepSpeed can load the checkpoint as it is, or if there is none."""
        tag = tag_of(self._view, asked)
        if tag is None:
            return None  # DeepSpeed warns
        found = find(self._view, asked, tag)
        require_same_shapes(self._view.module, found.files.model, found.model)
        kind, rank = kind_of(self._view, found), dist.get_rank(self._view.grid.data)

        def reshards() -> bool:
            return self._can_reshard and found.has_map

        misfit = ""
        if not asked.loads_module and (kind != "other" or not (asked.wants_state or reshards())):
            misfit = module_misfit(self._view, asked.folder / tag, found.files, rank, found.own_model, asked.is_strict)
        of_ranks = from_all(self._everything, (kind, misfit))
        kinds, misfits = {kind for kind, _ in of_ranks}, [misfit for _, misfit in of_ranks if misfit]
        if misfits and reshards():
            return self._resharded(found, asked)
        by_deepspeed = not asked.wants_state and not reshards() and kinds != {"same"}
        if by_deepspeed:
            self._require_deepspeed_loads(found, asked, tag, is_own=kinds == {"foreign"})
        if misfits:
            raise StateError(
                f"LENA: {misfits[0]}. Restore it, or load the checkpoint into the model that was saved. If names alone "
                "differ, load_module_strict=False of load_checkpoint leaves such weights as they are."
            )
        if by_deepspeed:
            self._tell(found.live, found, asked)
            return None
        if len(kinds) == 1 and "other" not in kinds and (asked.wants_state or not reshards()):
            self._tell(self._check_own(found, asked), found, asked)
            return None
        return self._resharded(found, asked)

    def _check_own(self, found: Found, asked: Asked) -> saved.Shard:
        """Each rank loads its own file: all of them are whole and of one save, or every rank says which is not.

        Returns what is in this rank's.
        """
        path, rank = found.own_file, dist.get_rank(self._view.grid.data)
        shard = shard_at(path, found.model)
        contents = self._of_all({path: self._content(found, rank, path, shard)})
        own_keys, has_lena = contents[path].keys, contents[path].has_lena
        all_keys = {key for content in contents.values() for keys in content.keys.values() for key in keys}
        keys = own_keys if has_lena else dict.fromkeys(own_keys, all_keys)
        own = pieces_from(found.live.inner["lena"]["pieces"])  # those of the file are the same, if it has any
        held = contents[path].pieces
        wanted = copies(own, {str(path): own if held is None else held}, self._sizes)[str(path)]
        largest = {number: tensor.numel() for number, tensor in enumerate(self._own_masters())}
        require_there(path, shard, wanted, keys, largest, has_masters=self._can_reshard and held is not None)
        if self._can_reshard and not asked.loads_module:
            self._missing(found, asked)
        return shard

    def _content(self, found: Found, rank: int, path: Path, shard: saved.Shard) -> Content:
        """What is in the optimizer file of one data-parallel rank, which was saved with this model file."""
        beside = found.files.model_of(rank)
        model = found.model if beside == found.files.model else saved.read_file(beside)
        reading(path, lambda: require_wrapper_state(path, shard, found.live))
        return content_of(path, shard, model, self._controller.config)

    def _of_all(self, mine: dict[Path, Content]) -> dict[Path, Content]:
        """What all ranks have read, all of it of one save. In a pipeline the stages' numbers are their own."""
        everything: dict[Path, Content] = {}
        alike: dict[Path, dict[str, Any]] = {}
        for part, of_rank in from_all(self._everything, (self._view.part, mine)):
            everything |= of_rank
            if part == self._view.part or not self._view.facts.pipelined:
                alike |= {path: content.alike for path, content in of_rank.items()}
        require_one_save(everything)
        require_alike(alike)
        return everything

    def _missing(self, found: Found, asked: Asked) -> set[str]:
        """The frozen weights and buffers that the checkpoint lacks and that need not be in it."""
        frozen, buffers = names_of_rest(self._view.module, self._sizes)
        weights, files = saved.weights_in(found.model), found.files
        cut = reading(files.model, lambda: saved.frozen_in(found.model)) if files.is_cut else weights
        missing = [name for name in frozen if cut.get(name) is None] + [
            name for name in buffers if weights.get(name) is None
        ]
        live = {without_compiled(name) for name in saved.module_of(self._view.engine)}
        unknown = sorted(weights.keys() - live)
        if unknown and asked.is_strict:
            raise StateError(
                f'LENA: {files.model} holds "{unknown[0]}", which this model lacks. Load the checkpoint into the model '
                "that was saved, or give load_checkpoint load_module_strict=False: it is left out."
            )
        if missing and asked.is_strict:
            raise StateError(
                f'LENA: {files.model} lacks "{missing[0]}" of this model, which is not trained. If it was saved with '
                "exclude_frozen_parameters=True, or is to stay as it is in the model, give load_checkpoint "
                "load_module_strict=False."
            )
        return set(missing)

    def _require_deepspeed_loads(self, found: Found, asked: Asked, tag: str, is_own: bool) -> None:
        """Refuse the weights alone where DeepSpeed loads nothing or waits for ever. `is_own`: the layout is its own."""
        files = found.files
        if (self._view.facts.stage == 3 or files.is_cut) and (asked.module_only or not is_own):
            raise StateError(
                f"LENA: {files.model.parent} does not say which pieces of the parameters lie where: another optimizer "
                "or an older ds_lena wrote it. Of such files DeepSpeed loads no weights alone at ZeRO-3. In the layout "
                "that it was saved in, use load_optimizer_states=False without load_module_only. In others, make one "
                "file of it by zero_to_fp32.py, and load that into the model before deepspeed.initialize."
            )

        if self._view.facts.stage == 3 and latest_tag(asked.folder) != tag:
            raise StateError(
                f"LENA: of files without a map DeepSpeed loads the weights alone from the checkpoint that "
                f'{asked.folder / "latest"} names, whatever tag is asked for. Write "{tag}" into it.'
            )

    # -- from its layout to the engine's ------------------------------------------------------------------------------

    def _resharded(self, found: Found, asked: Asked) -> Loaded:
        contents = self._contents(found)
        if not self._can_reshard:
            raise StateError(
                f"LENA: {found.files.model.parent} was saved in another layout, and a model with pipeline stages or "
                "experts is loaded in its own only: use the number of ranks, the ZeRO stage and the order of "
                "parameters that it was saved with."
            )
        if asked.loads_module:
            raise StateError(
                f"LENA: custom_load_fn cannot be used with {found.files.model.parent}, which was saved in another "
                "layout: its weights come from the optimizer's files. Leave it out, or load the checkpoint in the "
                "layout that it was saved in."
            )
        pieces = pieces_from(found.live.inner["lena"]["pieces"])
        plan = copies(pieces, {str(path): content.pieces or [] for path, content in contents.items()}, self._sizes)
        first = shard_at(next(iter(contents)), found.model)
        if asked.wants_state:
            require_same_groups(found.files.model.parent, first, found.live)
            old = {name: group for content in contents.values() for name, group in content.group_of.items()}
            own = groups_of(found.live.inner["param_groups"], pieces)
            tell_of_moved({n: g for of_rank in from_all(self._everything, own) for n, g in of_rank.items()}, old)
        filled = Filled(self._own_masters(), pieces)
        for file, wanted in plan.items():
            if wanted:
                path, shard = Path(file), shard_at(Path(file), found.model)
                require_there(path, shard, wanted, contents[path].keys if asked.wants_state else {})
                filled.take(path, shard, wanted, asked.wants_state)
        missing = self._missing(found, asked)
        _, buffers = names_of_rest(self._view.module, self._sizes)
        weights = saved.weights_in(found.model)
        self._tell(first, found, asked)
        return Loaded(
            files=found.files,
            state=self._state(found.live, first, filled, asked),
            masters={number: filled.masters[number] for number, held in enumerate(pieces) if held},
            frozen=frozen_weights(self._view.module, missing | self._sizes.keys(), found.files, found.model),
            buffers={name: weights[plain] for plain, name in buffers.items() if plain not in missing},
        )

    @staticmethod
    def _state(live: saved.Shard, first: saved.Shard, filled: Filled, asked: Asked) -> dict[str, Any]:
        """What the engine would have saved: with the state of the checkpoint, or with its own where that stays."""
        if not asked.wants_state:
            return live.with_state(live.inner, filled.masters, live)
        groups = [
            old | {key: new[key] for key in ("params", "param_names") if key in new}
            for old, new in zip(first.inner["param_groups"], live.inner["param_groups"], strict=True)
        ]
        inner = {"state": filled.state, "param_groups": groups, "lena": first.inner["lena"]}
        return live.with_state(inner, filled.masters, first)

    def _tell(self, shard: saved.Shard, found: Found, asked: Asked) -> None:
        """Say what the checkpoint replaces, or that it leaves the optimizer as it is."""
        if asked.wants_state:
            keys = group_keys(self._controller.config.base)
            tell_of_keys([key for key in keys if key != "lr" or not self._view.is_scheduled], shard, found.live)
        elif not asked.module_only:
            tell_of_fresh_start(self._controller.schedule.updates)

    def _own_masters(self) -> list[Tensor]:
        """The tensors that hold the engine's master weights, by number, with their padding."""
        if self._view.facts.stage:
            return [flat for flat, _ in self._controller.binding.layout.segments()]
        return [p for group in self._lena.param_groups for p in group["params"]]

    def _contents(self, found: Found) -> dict[Path, Content]:
        """What is in the optimizer files of this part of the model. The ranks share the work of reading them."""
        ranks = reading(found.files.model, lambda: saved.ranks_in(found.model))
        paths, data = found.files.of_ranks(ranks), self._view.grid.data
        mine = {
            path: self._content(found, rank, path, shard_at(path, found.model))
            for rank, path in list(enumerate(paths))[dist.get_rank(data) :: dist.get_world_size(data)]
        }
        everything = self._of_all(mine)
        contents = {path: everything[path] for path in paths}
        if any(content.pieces is None for content in contents.values()):
            raise StateError(
                f"LENA: {found.files.model.parent} was saved in another layout (by {ranks} ranks), and does not say "
                "which pieces of the parameters lie where: another optimizer or an older ds_lena wrote it. Load it "
                "once with the number of ranks, the ZeRO stage and the entries that it was saved with, save it there "
                "with this version, and load that checkpoint anywhere."
            )
        return contents
