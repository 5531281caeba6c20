"""What LENA remembers of a run, and how one update changes it: clock, layer states, base batch, counters.

An update is first proposed (nothing changes), then committed if the surroundings applied it, or skipped if they threw
it away, as DeepSpeed does with a non-finite gradient norm. No distributed code: the same call on every rank gives the
same result.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import algorithm, authors_code
from .algorithm import Clock, LayerState, Measurement
from .config import LenaConfig
from .errors import ConfigError, StateError
from .layers import LayerTable

logger = logging.getLogger("ds_lena")

STATE_VERSION = 1
_VECTORS = ("weight", "progress", "gain", "warmup", "capped")


@dataclass(frozen=True)
class Plan:
    """What the surroundings say at an update: `total_steps` T, `planned_n`, `micro_batch_size`; None if unknown."""

    total_steps: int | None
    planned_n: int | None
    micro_batch_size: int | None


@dataclass(frozen=True)
class Proposal:
    """One update that is not applied yet. `factor` (L + 1,): multiplies the learning rate; the last entry is 1."""

    state: LayerState
    clock: Clock
    planned_for: Tensor
    measured: Measurement
    k: float
    plan: Plan
    factor: Tensor


class Tracker:
    """The memory of one optimizer. All of it is saved in checkpoints, layer by layer under the layer's name.

    `updates` t: applied updates; `skipped`: updates thrown away by the surroundings; `nonfinite` (): statistics of
    single layers that were left out because they were not finite.
    """

    def __init__(self, config: LenaConfig, table: LayerTable, device: torch.device) -> None:
        self.config = config
        self.table = table
        self.device = device
        self.numel = torch.tensor(table.numel, dtype=torch.float64, device=device)
        self.state = LayerState.start(table.count, 1.0 if config.warmup == "none" else 0.0, device)
        self.updates = 0
        self.skipped = 0
        self.nonfinite = torch.zeros((), dtype=torch.long, device=device)
        self.n = self._scalar(0.0)
        self.done = self._scalar(0.0)
        self.planned: Tensor | None = None
        self.planned_for = self._scalar(0.0)
        self.plan = Plan(None, None, None)
        self.k = 1.0
        self.base_samples: float | None = config.base_batch_size
        self._just_loaded = False

    def _scalar(self, value: float) -> Tensor:
        # A fill, not a copy from the host, which would wait for the GPU.
        return torch.full((), value, dtype=torch.float64, device=self.device)

    # -- one update ---------------------------------------------------------------------------------------------------

    def propose(self, measured: Measurement, plan: Plan) -> Proposal:
        """The update that these measurements ask for; nothing is changed yet."""
        k = self.base_in_micro_batches(plan.micro_batch_size)
        largest = self._largest(measured.n, k)
        planned, planned_for = self._planned(measured.n, largest, k, plan)
        clock = Clock(done=self.done + largest, planned=planned)
        state = self._state_in_samples_of(plan.micro_batch_size)
        if self.config.variant == "authors-code":
            state = authors_code.advance(state, measured, clock, self.config)
        else:
            state = algorithm.advance(state, measured, clock, k, self.numel, self.config)
        factor = torch.cat((algorithm.step_factor(state, self.config), self._scalar(1.0).unsqueeze(0)))
        return Proposal(state, clock, planned_for, measured, k, plan, factor)

    def commit(self, proposal: Proposal) -> None:
        """The proposed update was applied."""
        self.state = proposal.state
        self.done, self.planned, self.planned_for = proposal.clock.done, proposal.clock.planned, proposal.planned_for
        self.n, self.k, self.plan = proposal.measured.n, proposal.k, proposal.plan
        self.nonfinite = self.nonfinite + (~proposal.measured.finite).sum()
        if self.base_samples is None and proposal.plan.micro_batch_size is not None:
            self.base_samples = proposal.k * proposal.plan.micro_batch_size
        self.updates += 1
        self._just_loaded = False
        self._log_cap_once()

    def skip(self) -> None:
        """The proposed update was thrown away."""
        self.skipped += 1

    def base_in_micro_batches(self, micro_batch_size: int | None) -> float:
        """k. 1 unless a base batch is given, or the micro-batch size changed since the run began."""
        if self.config.base_batch_size is not None and micro_batch_size is None:
            raise ConfigError(
                f'LENA: "base_batch_size": {self.config.base_batch_size} is in samples, and nobody says how many a '
                'micro-batch holds. Give "micro_batch_size" too (under DeepSpeed it is known).'
            )
        if self.base_samples is None or micro_batch_size is None:
            return 1.0
        return self.base_samples / micro_batch_size

    def _planned(self, n: Tensor, largest: Tensor, k: float, plan: Plan) -> tuple[Tensor, Tensor]:
        """H, and the n that it was planned for: T x R at the start, anew where a run is resumed with another n, k or T.

        n is another one if the configured one is (a window that is short by chance changes nothing); where there is no
        configuration to ask, if that of the first update after the resume is.
        """
        if plan.total_steps is None:
            return self._scalar(math.inf), n
        if self.planned is None:
            return plan.total_steps * largest, n
        if not self._just_loaded:
            return self.planned, self.planned_for
        same_run = (plan.total_steps, k) == (self.plan.total_steps, self.k)
        if plan.planned_n is None:
            same = (n == self.planned_for) & same_run
        elif same_run and plan.planned_n == self.plan.planned_n:
            return self.planned, self.planned_for
        else:
            n = self._scalar(float(plan.planned_n))
            largest = self._largest(n, k)
            same = torch.zeros_like(n, dtype=torch.bool)
        anew = self.done + max(plan.total_steps - self.updates, 0) * largest
        return torch.where(same, self.planned, anew), torch.where(same, self.planned_for, n)

    def _largest(self, n: Tensor, k: float) -> Tensor:
        """Base-batch iterations that one update of n micro-batches is worth at most."""
        return n if self.config.variant == "authors-code" else algorithm.largest_gain(n, k)

    def _state_in_samples_of(self, micro_batch_size: int | None) -> LayerState:
        """The state with its noise in the present micro-batches: noise per micro-batch falls as 1 / its size."""
        old = self.plan.micro_batch_size
        if old is None or micro_batch_size is None or old == micro_batch_size:
            return self.state
        return algorithm.rescale_noise(self.state, old / micro_batch_size)

    def _log_cap_once(self) -> None:
        cap, total = self.config.warmup_cap, self.plan.total_steps
        by_cap = self.config.warmup == "layer" and self.config.scaling == "gain" and self.config.variant == "default"
        if by_cap and cap is not None and total is not None and self.updates == math.ceil(cap * total):
            # The one host synchronisation of a run that stock DeepSpeed does not make.
            ended, capped = int((self.state.warmup >= 1).sum()), int(self.state.capped.sum())
            logger.info(
                "LENA: update %d: the warm-up of %d of %d layers has ended, of %d by warmup_cap=%g",
                self.updates,
                ended,
                self.table.count,
                capped,
                cap,
            )

    # -- what users see -----------------------------------------------------------------------------------------------

    def noise_and_signal(self) -> Tensor:
        """(2, L): debiased noise and signal, not floored; 0 for a layer without averages."""
        if self.config.variant == "authors-code":
            return authors_code.averaged_noise_and_signal(self.state.averages, self.n)
        return algorithm.debiased(self.state.averages, self.state.weight)

    def report(self) -> dict[str, Any]:
        """See `ds_lena.report`."""
        state = self.state
        noise, signal = self.noise_and_signal()
        all_noise, all_signal = (float(x) for x in algorithm.model_noise_and_signal(noise, signal, state.weight))
        model_gain = algorithm.model_gain(noise, signal, state.weight, self.n.clamp(min=1), self.k)
        columns = {
            "gain": state.gain.tolist(),
            "factor": algorithm.step_factor(state, self.config).tolist(),
            "warmup": state.warmup.tolist(),
            "state": state.progress.tolist(),
            "noise": noise.tolist(),
            "signal": signal.tolist(),
            "noise_scale": [_noise_scale(s, m) for s, m in zip(noise.tolist(), signal.tolist(), strict=True)],
            "capped": state.capped.tolist(),
        }
        layers = {name: {key: column[i] for key, column in columns.items()} for i, name in enumerate(self.table.names)}
        return {
            "update": self.updates,
            "n": int(self.n),
            "base": self.k,
            "skipped": self.skipped,
            "nonfinite": int(self.nonfinite),
            "noise_scale": _noise_scale(all_noise, all_signal),
            "gain": float(model_gain),
            "layers": layers,
        }

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers by layer name, O(L). Holds everything that this object remembers."""
        vectors = {name: getattr(self.state, name).tolist() for name in _VECTORS}
        averages = self.state.averages.T.tolist()
        layers = {
            name: {"averages": averages[i], **{key: vectors[key][i] for key in _VECTORS}}
            for i, name in enumerate(self.table.names)
        }
        return {
            "version": STATE_VERSION,
            "variant": self.config.variant,
            "base": self.config.base,
            "update": self.updates,
            "skipped": self.skipped,
            "nonfinite": int(self.nonfinite),
            "n": float(self.n),
            "done": float(self.done),
            "planned": None if self.planned is None else float(self.planned),
            "planned_for": float(self.planned_for),
            "base_in_micro_batches": self.k,
            "base_samples": self.base_samples,
            "total_steps": self.plan.total_steps,
            "planned_n": self.plan.planned_n,
            "micro_batch_size": self.plan.micro_batch_size,
            "layers": layers,
        }

    def require_loadable(self, saved: dict[str, Any]) -> None:
        """Raise `StateError` for a saved state that this run cannot go on from."""
        if saved.get("version") != STATE_VERSION:
            raise StateError(
                f"LENA: the checkpoint's LENA state has version {saved.get('version')!r}; this ds_lena reads version "
                f"{STATE_VERSION}. Load it with the ds_lena that wrote it."
            )
        if saved["variant"] != self.config.variant:
            raise StateError(
                f'LENA: the checkpoint was written with "variant": "{saved["variant"]}", this run has '
                f'"{self.config.variant}", whose averages are others. Set "variant" as in the checkpoint.'
            )

        if saved["base"] != self.config.base:
            raise StateError(
                f'LENA: the checkpoint was written with "base": "{saved["base"]}", this run has "{self.config.base}", '
                'whose state is another. Set "base" as in the checkpoint, or load the model\'s weights only.'
            )

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from a saved state. Layers are matched by name; unknown ones start fresh, with a warning."""
        self.require_loadable(saved)
        self.updates, self.skipped = saved["update"], saved["skipped"]
        self.nonfinite = torch.tensor(saved["nonfinite"], dtype=torch.long, device=self.device)
        self.n, self.done = self._scalar(saved["n"]), self._scalar(saved["done"])
        self.planned = None if saved["planned"] is None else self._scalar(saved["planned"])
        self.planned_for = self._scalar(saved["planned_for"])
        self.k = saved["base_in_micro_batches"]
        if self.config.base_batch_size is None:
            self.base_samples = saved["base_samples"]
        self.plan = Plan(saved["total_steps"], saved["planned_n"], saved["micro_batch_size"])
        self._just_loaded = True
        self._load_layers(saved["layers"])

    def _load_layers(self, saved: dict[str, dict[str, Any]]) -> None:
        missing = [name for name in self.table.names if name not in saved]
        unused = sorted(saved.keys() - set(self.table.names))
        if missing or unused:
            logger.warning(
                "LENA: the checkpoint does not fit the model's layers. Not in the checkpoint, start fresh: %s. Not in "
                'the model, ignored: %s. Were "layer", "exclude" or the names of the parameters changed?',
                missing or "none",
                unused or "none",
            )
        found = [(i, saved[name]) for i, name in enumerate(self.table.names) if name in saved]
        for key in ("averages", *_VECTORS) if found else ():
            vector = getattr(self.state, key)
            values = torch.tensor([layer[key] for _, layer in found], dtype=vector.dtype, device=self.device)
            vector[..., [i for i, _ in found]] = values.T if key == "averages" else values


def _noise_scale(noise: float, signal: float) -> float:
    return noise / signal if signal > 0 else math.inf
