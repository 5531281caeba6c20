"""What a layer is: canonical parameter names, and which parameter belongs to which layer."""

from __future__ import annotations

import difflib
import fnmatch
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

_COMPILED = "_orig_mod"

logger = logging.getLogger("ds_lena")


def named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """`named_parameters()` of the user's own model, without the wrappers of DDP, DataParallel and torch.compile.

    A tied parameter is listed once, under its first name.
    """
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif _COMPILED in model._modules:
            model = model.get_submodule(_COMPILED)
        else:
            break
    return [(without_compiled(name), parameter) for name, parameter in model.named_parameters()]


def without_compiled(name: str) -> str:
    """The name without the parts that torch.compile inserts."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def canonical_names(names: Sequence[str]) -> list[str]:
    """The user's names, without `module.` if all of them start with it, as the names of a DDP model do."""
    names = [without_compiled(name) for name in names]
    while names and all(name.startswith("module.") for name in names):
        names = [name.removeprefix("module.") for name in names]
    return names


def layer_name(parameter_name: str, granularity: str) -> str:
    """The name of the layer of one parameter. `granularity`: the key `"layer"`, see docs/keys.md.

    A block is the shortest prefix of the module's path that ends in a number; without a number it is the module. A
    parameter of the outermost module itself belongs to the module `root`.
    """
    if granularity == "model":
        return "model"
    if granularity == "tensor":
        return parameter_name
    path = parameter_name.split(".")[:-1]
    if granularity == "block":
        for end, part in enumerate(path, start=1):
            if part.isdigit():
                return ".".join(path[:end])
    return ".".join(path) or "root"


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a parameter's name matches one of the fnmatch patterns. Case matters."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def unmatched_patterns(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The patterns that match no name. Most likely they are a mistake."""
    return [pattern for pattern in patterns if not any(fnmatch.fnmatchcase(name, pattern) for name in names)]


def nearest_name(names: Sequence[str], pattern: str) -> str:
    """The name that a pattern was most likely meant for."""
    return difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)[0]


def warn_of_patterns(names: Sequence[str], key: str, patterns: Sequence[str], told: set[tuple[str, str]]) -> None:
    """Warn of patterns of a key that match no name, each once. `told`: those that were told, which grow here."""
    for pattern in unmatched_patterns(names, patterns):
        if (key, pattern) not in told:  # a client optimizer gets its engine's names, too
            told.add((key, pattern))
            logger.warning(
                'LENA: "%s": the pattern "%s" matches no parameter. The nearest name is "%s".',
                key,
                pattern,
                nearest_name(names, pattern),
            )


class Member(NamedTuple):
    """A parameter as a member of a layer. `numel`: of the whole tensor. `left_out`: it takes no part.

    `spread`: the number of micro-batches in one of its micro-gradients, see `Placement`.
    """

    name: str
    numel: int
    left_out: bool
    spread: int = 1


@dataclass(frozen=True)
class LayerTable:
    """The L layers of a model, in the order of their first parameters.

    `names`: the name of each layer. `numel`: its number of elements, in whole tensors. `of_parameter[i]`: the layer of
    parameter i, or L for a parameter that takes no part (`exclude`, or a group with `"lena": false`).
    """

    names: tuple[str, ...]
    numel: tuple[int, ...]
    of_parameter: tuple[int, ...]

    @property
    def count(self) -> int:
        """L. As an index it means "no layer"."""
        return len(self.names)


def build_table(members: Sequence[Member], granularity: str) -> LayerTable:
    """Group parameters, given in the model's order, into layers."""
    sizes: dict[str, int] = {}
    owner: list[str | None] = []
    for name, numel, left_out, _ in members:
        layer = None if left_out else layer_name(name, granularity)
        owner.append(layer)
        if layer is not None:
            sizes[layer] = sizes.get(layer, 0) + numel
    index = {name: i for i, name in enumerate(sizes)}
    return LayerTable(
        names=tuple(sizes),
        numel=tuple(sizes.values()),
        of_parameter=tuple(len(sizes) if name is None else index[name] for name in owner),
    )
