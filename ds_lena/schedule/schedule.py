"""What LENA remembers of a run, and how one update changes it.

An update is first proposed, which changes nothing. It is committed if it was applied. It is skipped if it was thrown
away, as DeepSpeed does when the gradient's norm is not finite. There is no distributed code here: equal input gives
equal output on every rank.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import LenaConfig
from ..errors import ConfigError
from ..grad_stats.measurement import Measurement
from ..layers import LayerTable
from . import algorithm, authors_code, clock
from .algorithm import LayerState
from .clock import ClockState, RunPlan, scalar
from .noise import Tally

logger = logging.getLogger("ds_lena")


@dataclass(frozen=True)
class Proposal:
    """One update that is not applied yet.

    `factor` (L + 1,): what multiplies the learning rate of each layer. The last entry is 1, for parameters of no layer.
    `nonfinite` (): how often a layer has been left out by then. `tally`: of the model as a whole.
    """

    state: LayerState
    clock: ClockState
    measured: Measurement
    factor: Tensor
    nonfinite: Tensor
    tally: Tally


@dataclass(frozen=True)
class Memory:
    """What a proposal follows from, beside the measurement: `Schedule` has it by these names."""

    state: LayerState
    clock: ClockState
    nonfinite: Tensor
    tally: Tally


class Schedule:
    """The memory of one optimizer. Checkpoints hold all of it, each layer under its name.

    `state`: by layer. `clock`: of the run. `n` (): micro-batches of the last update. `skipped`: updates thrown away.
    `nonfinite` (): how often a layer was left out of an update because its statistics were not finite.
    `base_samples`: the base batch in samples, None while it is not known. `tally`: noise and signal of the model as one
    layer with their spread, and what was counted; the decision does not use it.
    """

    def __init__(self, config: LenaConfig, table: LayerTable, device: torch.device) -> None:
        self.config, self.table, self.device = config, table, device
        self._numel = torch.tensor(table.numel, dtype=torch.float64, device=device)
        self.state = LayerState.start(table.count, 1.0 if config.warmup == "none" else 0.0, device)
        self.clock = ClockState.start(device)
        self.n = scalar(0.0, device)
        self.skipped = 0
        self.nonfinite = torch.zeros((), dtype=torch.long, device=device)
        self.base_samples: float | None = config.base_batch_size
        self.tally = Tally.start(device)

    @property
    def updates(self) -> int:
        """t: applied updates."""
        return self.clock.updates

    @property
    def weight(self) -> Tensor:
        """(L,): W."""
        return self.state.weight

    @property
    def micro_batch_size(self) -> int | None:
        """Samples in a micro-batch of the last update, None if nobody says."""
        return self.clock.plan.micro_batch_size

    # -- one update ---------------------------------------------------------------------------------------------------

    def memory(self, plan: RunPlan) -> Memory:
        """What `propose` needs. The averages are those of micro-batches of the size at present."""
        return Memory(self._state_in_samples_of(plan.micro_batch_size), self.clock, self.nonfinite, self.tally)

    def propose(self, measured: Measurement, plan: RunPlan, memory: Memory | None = None) -> Proposal:
        """The update that follows from these measurements. Nothing changes yet."""
        config = self.config
        memory = self.memory(plan) if memory is None else memory
        state, k = memory.state, self.base_in_micro_batches(plan.micro_batch_size)
        now, after = clock.advance(memory.clock, measured.n, k, plan, config.variant)
        if config.variant == "authors-code":
            state = authors_code.advance(state, measured, now, config)
        else:
            state = algorithm.advance(state, measured, now, k, self._numel, config)
        factor = torch.cat((algorithm.step_factor(state, config), scalar(1.0, self.device).unsqueeze(0)))
        size, before = plan.micro_batch_size, memory.clock.plan.micro_batch_size
        tally = memory.tally.after(measured, config.smoothing, size, before)
        return Proposal(state, after, measured, factor, memory.nonfinite + (~measured.finite).sum(), tally)

    def commit(self, proposal: Proposal) -> None:
        """The proposed update was applied."""
        self.state, self.clock, self.n = proposal.state, proposal.clock, proposal.measured.n
        self.nonfinite, self.tally = proposal.nonfinite, proposal.tally
        micro_batch_size = self.clock.plan.micro_batch_size
        if self.base_samples is None and micro_batch_size is not None:
            self.base_samples = self.clock.k * micro_batch_size
        self._log_cap_once()
        self._warn_past_plan_once()

    def skip(self) -> None:
        """The proposed update was thrown away."""
        self.skipped += 1

    def base_in_micro_batches(self, micro_batch_size: int | None) -> float:
        """k. It is 1 unless a base batch is given, or the micro-batch size has changed since the run began."""
        if self.config.base_batch_size is not None and micro_batch_size is None:
            raise ConfigError(
                f'LENA: "base_batch_size": {self.config.base_batch_size} is in samples, and nobody says how many a '
                'micro-batch holds. Give "micro_batch_size" too (under DeepSpeed it is known).'
            )
        if self.base_samples is None or micro_batch_size is None:
            return 1.0
        return self.base_samples / micro_batch_size

    def noise_and_signal(self) -> Tensor:
        """(2, L): debiased noise and signal. Signal may be negative. Both are 0 for a layer without averages."""
        if self.config.variant == "authors-code":
            return authors_code.averaged_noise_and_signal(self.state.averages, self.n)
        return algorithm.debiased(self.state.averages, self.state.weight)

    def _state_in_samples_of(self, micro_batch_size: int | None) -> LayerState:
        """The state with the noise of a micro-batch of this size. Noise falls as 1 / size."""
        old = self.clock.plan.micro_batch_size
        if old is None or micro_batch_size is None or old == micro_batch_size:
            return self.state
        return algorithm.rescale_noise(self.state, old / micro_batch_size)

    def _warn_past_plan_once(self) -> None:
        planned = self.clock.plan.total_steps
        if planned is not None and self.config.warmup != "none" and self.updates == planned + 1:
            logger.warning(
                "LENA: update %d is past the end of the run, which was planned for %d updates. So the warm-up was too "
                'short. Give "total_steps", or the right total_num_steps to the scheduler: accelerate divides that of '
                "a DummyScheduler by the number of ranks.",
                self.updates,
                planned,
            )

    def _log_cap_once(self) -> None:
        config, total = self.config, self.clock.plan.total_steps
        by_cap = config.warmup == "layer" and config.scaling == "gain" and config.variant == "default"
        if not by_cap or config.warmup_cap is None or total is None:
            return
        if self.updates == math.ceil(config.warmup_cap * total):
            # This waits for the device, once in a run.
            ended, capped = int((self.state.warmup >= 1).sum()), int(self.state.capped.sum())
            logger.info(
                "LENA: update %d: the warm-up of %d of %d layers has ended, of %d by warmup_cap=%g",
                self.updates,
                ended,
                self.table.count,
                capped,
                config.warmup_cap,
            )
