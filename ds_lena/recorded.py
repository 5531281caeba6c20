"""A function of a few small tensors, recorded as a CUDA graph: a call is one launch, whatever the function does.

A decision for L layers is some hundred operations on vectors of L numbers. On a GPU each costs a launch, and together
they would cost more than the norms of all gradients.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

logger = logging.getLogger("ds_lena")

MOST_RECORDINGS = 32
"""Beyond that the function is called as it is: its keys change too often for a recording to pay."""

T = TypeVar("T")


class Recorded:
    """Calls of one `function(key, *inputs)`, which waits for no device. Inputs and result: tensors, or dataclasses with
    tensors.

    `key`: all that the function reads beside tensors. A result on CUDA is overwritten by a later call, but not by one
    that has it among its inputs.
    `keeps`: the first so many input tensors keep their memory from call to call. The others are copied, unless they are
    results of this function.
    """

    def __init__(self, keeps: int = 0) -> None:
        self._keeps = keeps
        self._recordings: dict[Hashable, tuple[Any, Any]] = {}
        self._results: list[list[Tensor]] = []
        self._copies: dict[int, Tensor] = {}
        self._is_off = False

    def __call__(self, function: Callable[..., T], key: Hashable, *inputs: Any) -> T:
        tensors = list(tensors_in(inputs))
        if self._is_off or not can_record(tensors):
            return function(key, *inputs)
        tensors = [self._lasting(place, tensor) for place, tensor in enumerate(tensors)]
        known = key, tuple((tensor.data_ptr(), tensor.shape) for tensor in tensors)
        if known not in self._recordings:
            try:
                if len(self._recordings) >= MOST_RECORDINGS:
                    raise RuntimeError(f"its settings have changed {MOST_RECORDINGS} times")
                self._recordings[known] = self._record(function, key, with_tensors(inputs, iter(tensors)), tensors)
            except RuntimeError as error:
                self._is_off = True
                self._recordings.clear()
                logger.warning("LENA: a part of its update is no longer one CUDA graph, and takes longer: %s.", error)
                return function(key, *inputs)
        graph, result = self._recordings[known]
        graph.replay()
        return result

    def _lasting(self, place: int, tensor: Tensor) -> Tensor:
        """An input in memory that stays."""
        if place < self._keeps or any(tensor is result for results in self._results for result in results):
            return tensor
        copy = self._copies.get(place)
        if copy is None or copy.shape != tensor.shape:
            copy = self._copies[place] = torch.empty_like(tensor)
        return copy.copy_(tensor)

    def _record(
        self, function: Callable[..., T], key: Hashable, inputs: Sequence[Any], tensors: Sequence[Tensor]
    ) -> tuple[Any, T]:
        """The graph, and its result. It is written to one of two sets of tensors, of which no input is a part."""
        given = {id(tensor) for tensor in tensors}
        free = [results for results in self._results if given.isdisjoint(map(id, results))]
        is_new = len(self._results) < 2
        if not is_new and not free:
            raise RuntimeError("the inputs are results of two calls")

        def run() -> T:
            found = function(key, *inputs)
            if is_new:
                return with_tensors(found, (tensor.clone() for tensor in tensors_in(found)))  # an input is no result
            for result, new in zip(free[0], tensors_in(found), strict=True):
                result.copy_(new)
            return with_tensors(found, iter(free[0]))

        graph, result = capture(run, tensors[0].device)
        if is_new:
            self._results.append(list(tensors_in(result)))
        return graph, result


class Number:
    """A number on a device, () float64, which is sent only when it has changed."""

    def __init__(self, device: torch.device) -> None:
        self._there = torch.zeros((), dtype=torch.float64, device=device)
        self._value = 0.0

    def set(self, value: float) -> Tensor:
        """The tensor, always the same one, with this value."""
        if value != self._value:
            self._there.fill_(value)
            self._value = value
        return self._there


def can_record(tensors: Sequence[Tensor]) -> bool:
    """Whether these tensors are on a GPU, and nobody records already."""
    return len(tensors) > 0 and all(t.is_cuda for t in tensors) and not torch.cuda.is_current_stream_capturing()


def capture(run: Callable[[], T], device: torch.device) -> tuple[Any, T]:
    """A graph of what `run` does, and its result. Nothing has been done yet."""
    graph, aside, here = torch.cuda.CUDAGraph(), torch.cuda.Stream(device), torch.cuda.current_stream(device)
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        graph.capture_begin(capture_error_mode="thread_local")  # other threads may go on with CUDA
        try:
            result = run()
        finally:
            graph.capture_end()
    here.wait_stream(aside)
    return graph, result


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a tuple, in the fields of a dataclass, and in tuples and dataclasses in it."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors_in(part)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same with other tensors, in the order of `tensors_in`."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, tuple):
        return tuple(with_tensors(part, tensors) for part in value)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = dataclasses.fields(value)
    return dataclasses.replace(value, **{f.name: with_tensors(getattr(value, f.name), tensors) for f in fields})
