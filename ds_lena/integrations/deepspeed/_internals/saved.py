"""What DeepSpeed writes into the files of a checkpoint, and where an engine loads it from them.

`state_dict()` of a live wrapper has the form of a saved one, so both are read alike.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ....errors import StateError
from ....layers import without_compiled

T = TypeVar("T")
_MASTERS = ("single_partition_of_fp32_groups", "fp32_flat_groups", "fp32_groups")
_INNER = ("base_optimizer_state", "optimizer_state_dict")
_GLOBAL = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad", "cur_scale", "cur_iter", "last_overflow_iter")


@dataclass(frozen=True)
class Shard:
    """The optimizer's part of one file, or of a live engine.

    `outer`: what the wrapper saves. `inner`: what the optimizer in it saves. `masters[i]`: the tensor whose state is
    `inner["state"][i]`; None if nothing is known of it.
    """

    outer: dict[str, Any]
    inner: dict[str, Any]
    masters: list[Tensor | None]

    @property
    def may_lack_state(self) -> bool:
        """Whether a parameter may have no state: before the first update, and without a gradient.

        In a flat tensor a parameter without a gradient has one of zeros.
        """
        is_new = (self.inner.get("lena") or {}).get("update") == 0
        return is_new or not any(key in self.outer for key in _MASTERS[:2])

    @property
    def form(self) -> tuple[frozenset[str], list[int | None]]:
        """What tells one wrapper from another: its keys, and the sizes of its tensors. Not what LENA adds."""
        sizes = [None if master is None else master.numel() for master in self.masters]
        return frozenset(self.outer) - {"lena"}, [] if self.outer is self.inner else sizes

    def with_state(self, inner: dict[str, Any], masters: list[Tensor], of: Shard) -> dict[str, Any]:
        """What this wrapper would save with another state and other masters. Its other entries are those of `of`."""
        if self.outer is self.inner:
            return inner
        known = {key: of.outer[key] for key in _GLOBAL if key in self.outer and key in of.outer}
        flat: list[Any] = masters
        if "fp32_groups" in self.outer:
            rest = iter(masters)
            flat = [[next(rest) for _ in group] for group in self.outer["fp32_groups"]]
        return self.outer | known | {_key(_MASTERS, self.outer): flat, _key(_INNER, self.outer): inner}


def shard_of(outer: dict[str, Any], weights: Mapping[str, Tensor]) -> Shard:
    """Read what a wrapper saves. `weights`: the model's, by name. Without a wrapper they are the master weights.

    Raises:
        KeyError, TypeError, ValueError: it is in another form.
    """
    if "param_groups" in outer:
        inner, numbers = outer, [i for group in outer["param_groups"] for i in group["params"]]
        pieces = (outer.get("lena") or {}).get("pieces") or [[] for _ in numbers]
        return Shard(outer, inner, [weights.get(tensor[0][0]) if tensor else None for tensor in pieces])
    masters = outer[_key(_MASTERS, outer)]
    if "fp32_groups" in outer:
        masters = [master for group in masters for master in group]
    return Shard(outer, outer[_key(_INNER, outer)], list(masters))


def state_keys(shard: Shard) -> set[str]:
    """The names in the state of any tensor."""
    return {key for state in shard.inner["state"].values() for key in state}


def steps_in(shard: Shard) -> dict[str, float]:
    """How many updates each tensor has had, where its state says so."""
    states = shard.inner["state"].items()
    return {
        f"the number of updates of tensor {number}": float(state["step"]) for number, state in states if "step" in state
    }


def _key(keys: tuple[str, ...], outer: Mapping[str, Any]) -> str:
    return next(key for key in keys if key in outer)


def own_file(engine: Any, folder: Path, tag: str) -> Path:
    """The file that the engine loads its optimizer's state from."""
    if engine.zero_optimization():
        return Path(engine._get_zero_ckpt_name(str(folder), tag))
    if engine.has_moe_layers:
        from deepspeed.utils import groups

        largest = groups._get_max_expert_size_name()
        return Path(engine._get_optimizer_ckpt_name(str(folder), tag, groups._get_expert_parallel_rank(largest)))
    return Path(engine._get_ckpt_name(str(folder), tag))


def reading(path: Path, read: Callable[[], T]) -> T:
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


def read_file(path: Path) -> dict[str, Any]:
    """A file of a checkpoint. Its tensors stay on disk until they are used.

    All but their numbers is compared with its checksum, if it was saved with one. torch does not do so with mmap.
    """

    def read() -> dict[str, Any]:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith("/data.pkl") and entry.CRC:
                    archive.read(entry)
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False)

    return reading(path, read)


def weights_in(model_file: Mapping[str, Any]) -> dict[str, Tensor]:
    """The model's weights and buffers, by name. At ZeRO-3 the weights are empty, in a pipeline none is there."""
    return {without_compiled(name): value for name, value in (model_file["module"] or {}).items()}


def shapes_in(model_file: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """The shapes of weights and buffers, by name; None of what is no tensor. At ZeRO-3 the weights themselves are cut,
    and their shapes apart.
    """
    found = {name: getattr(value, "shape", None) for name, value in weights_in(model_file).items() if value is not None}
    groups = [*(model_file.get("param_shapes") or []), model_file.get("frozen_param_shapes") or {}]
    found |= {without_compiled(name): shape for group in groups for name, shape in group.items()}
    return {name: None if shape is None else tuple(shape) for name, shape in found.items()}


def require_counts(path: Path, model_file: Mapping[str, Any], needs_schedule: bool) -> None:
    """Raise `StateError` if a model file lacks what `load_checkpoint` takes from it for the engine itself."""
    if needs_schedule and not isinstance(model_file.get("lr_scheduler"), Mapping):
        raise StateError(
            f"LENA: {path} was saved without a learning-rate scheduler, and this engine has one. Give load_checkpoint "
            "load_lr_scheduler_states=False: the scheduler stays where it is."
        )
    for key in ("global_steps", "skipped_steps", "mp_world_size"):
        value = model_file.get(key)
        if type(value) is not int or value < 0:
            raise StateError(
                f'LENA: {path} is damaged: "{key}" is {value!r}. Restore it, or load an earlier checkpoint.'
            )


def optimizer_in(file: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Shard:
    """The optimizer's part of a file. Raises what `shard_of` does."""
    return shard_of(file["optimizer_state_dict" if "optimizer_state_dict" in file else "optimizer"], weights)


def ranks_in(model_file: Mapping[str, Any]) -> int:
    """The number of ranks that each part of the model was saved by."""
    return int(model_file["dp_world_size"])


def parts_in(model_file: Mapping[str, Any]) -> int | None:
    """The number of parts that the model was cut into, by tensor parallelism. None if the file does not say."""
    return model_file.get("mp_world_size")


def has_order_of(model_file: Mapping[str, Any], engine: Any) -> bool:
    """Whether the engine has the same parameters in the same order. ZeRO 0 does not say, and has that of the model."""
    saved = model_file.get("param_shapes")
    return saved is None or not engine.zero_optimization() or saved == engine._get_zero_param_shapes()


def frozen_in(model_file: Mapping[str, Any]) -> dict[str, Tensor]:
    """This rank's parts of frozen weights, by name. At ZeRO 0 and 1 none are apart from the model's weights."""
    return {without_compiled(name): value for name, value in (model_file["frozen_param_fragments"] or {}).items()}


def window_of(parameter: Any) -> tuple[int, int]:
    """The elements of a parameter that this rank holds, (first, number), from 0 elements on."""
    if not hasattr(parameter, "ds_tensor"):
        return 0, parameter.numel()
    part = parameter.partition_numel()
    first = part * torch.distributed.get_rank(parameter.ds_process_group)
    return first, max(0, min(part, parameter.ds_numel - first))


def write_window(parameter: Tensor, values: Tensor) -> None:
    """Set the elements of a parameter that this rank holds."""
    held: Tensor = getattr(parameter, "ds_tensor", parameter)
    if held is parameter:
        parameter.data.copy_(values.reshape(parameter.shape))
    else:
        held.data.reshape(-1).narrow(0, 0, values.numel()).copy_(values)


@contextmanager
def loading(
    engine: Any, models: list[str], load_module: Callable[[], None], state: dict[str, Any], wants_state: bool
) -> Iterator[None]:
    """Within it `load_checkpoint` of the engine takes counts and schedules of `models`, and the optimizer's `state`.

    `models`: the model files of all parts of the model. `load_module()`: sets buffers and frozen weights.
    `wants_state`: else the master weights in `state` alone are taken.
    """
    wrapper = engine.optimizer
    load_state = wrapper.load_state_dict

    def load_zero(*_: Any, **__: Any) -> bool:
        ranks = torch.distributed.get_world_size(wrapper.dp_process_group)
        load_state([state] * ranks, load_optimizer_states=wants_state, load_from_fp32_weights=True)
        if hasattr(wrapper, "update_lp_params"):  # ZeRO 3 does so by itself
            wrapper.update_lp_params()
        return True

    def load_plain(_: Any, **keys: Any) -> None:
        if wants_state:
            load_state(state, **keys)

    instead: dict[tuple[Any, str], Callable[..., Any]] = {
        (engine, "_get_all_ckpt_names"): lambda *_: models,
        (engine, "load_module_state_dict"): lambda *_, **__: load_module(),
    }
    if engine.zero_optimization():
        instead[engine, "_load_zero_checkpoint"] = load_zero
        instead[wrapper, "_restore_from_bit16_weights"] = load_zero  # where it is asked for the module alone
    else:
        instead[wrapper, "load_state_dict"] = load_plain
    for (owner, name), function in instead.items():
        setattr(owner, name, function)
    try:
        yield
    finally:
        for owner, name in instead:
            delattr(owner, name)


def write_masters(wrapper: Any, masters: Mapping[int, Tensor], live: list[Tensor]) -> None:
    """Set masters and weights at ZeRO 0, where a wrapper does not do so. By number; `live`: what `step()` moves."""
    low = [p for group in getattr(wrapper, "fp16_groups", ()) for p in group] or live
    for number, master in masters.items():
        live[number].data.copy_(master)
        low[number].data.copy_(master)


def refresh_masters(wrapper: Any) -> None:
    """Set the masters from the weights at ZeRO 0, if it has any. DeepSpeed forgets it without optimizer states."""
    if hasattr(wrapper, "refresh_fp32_params"):
        wrapper.refresh_fp32_params()
