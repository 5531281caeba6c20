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
    def form(self) -> tuple[frozenset[str], list[int | None], list[int]]:
        """What tells one wrapper from another: its keys, the sizes of its tensors, how many there are in each group.

        Not what LENA adds.
        """
        sizes = [None if master is None else master.numel() for master in self.masters]
        groups = [len(group["params"]) for group in self.inner["param_groups"]]
        return frozenset(self.outer) - {"lena"}, [] if self.outer is self.inner else sizes, groups

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


def module_in(engine: Any, folder: Path, model_file: Mapping[str, Any]) -> dict[str, Any]:
    """What `load_checkpoint` gives to the engine's module, by name: from the model file, and from those of layers and
    experts.
    """
    if hasattr(engine.module, "ckpt_layer_path_list"):
        return _layers_in(engine.module, folder)
    found: dict[str, Any] = dict(model_file["module"])
    if engine.has_moe_layers:
        engine.load_moe_state_dict(
            str(folder.parent),
            folder.name,
            found,
            not isinstance(model_file["num_experts"], list),
            model=engine.module,
            num_experts=engine.num_experts,
            checkpoint_engine=engine.checkpoint_engine,
            checkpoint_mp_rank=engine.checkpoint_mp_rank,
        )
    return found


def _layers_in(module: Any, folder: Path) -> dict[str, Any]:
    """Of the layers of this rank's stage of a pipeline."""
    found: dict[str, Any] = {}
    for number, layer in enumerate(module.forward_funcs):
        if hasattr(layer, "load_state_dict"):
            paths = [Path(path) for path in module.ckpt_layer_path_list(str(folder), number)]
            if not paths:
                raise FileNotFoundError(f"the file of layer {number + module._local_start} is not there")
            contents = [read_file(path) for path in paths]  # a part for each tensor-parallel rank
            found |= {f"{number}.{name}": value for name, value in contents[0].items()}
    return found


def module_of(engine: Any) -> dict[str, Any]:
    """The engine's module in the form of `module_in`. Of a layer in parts the shapes are left out."""
    module = engine.module
    if not hasattr(module, "ckpt_layer_path_list"):
        return dict(module.state_dict())
    layers = [(n, layer) for n, layer in enumerate(module.forward_funcs) if hasattr(layer, "load_state_dict")]
    states = {f"{n}.{name}": value for n, layer in layers for name, value in layer.state_dict().items()}
    return states if engine.mp_world_size == 1 else dict.fromkeys(states)


def frozen_sizes(engine: Any) -> dict[str, int]:
    """The elements of this rank's part of each frozen weight, by the engine's name for it."""
    frozen = [parameter for parameter in engine.module.parameters() if not parameter.requires_grad]
    return {engine.param_names[p]: getattr(p, "ds_tensor", p).numel() for p in frozen if p in engine.param_names}


def own_entries(shard: Shard) -> dict[str, Any]:
    """What a wrapper saves of its own, beside masters and the optimizer's state. None without a wrapper."""
    return {} if shard.outer is shard.inner else {key: shard.outer[key] for key in _GLOBAL if key in shard.outer}


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
    return {without_compiled(name): value for name, value in (fragments_in(model_file) or {}).items()}


def fragments_in(model_file: Mapping[str, Any]) -> Any:
    """The same by the engine's own names, as they are in the file. None if the file has none."""
    return model_file.get("frozen_param_fragments")


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
