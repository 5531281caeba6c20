"""A grid in which both ranks hold parts of one model."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from tests.integrations._ranks import WORLD


class TwoParts:
    """An mpu of the old kind: both ranks hold parts of one model. `averages`: they also average gradients."""

    def __init__(self, averages: bool = False) -> None:
        alone = [dist.new_group([rank]) for rank in range(WORLD)][dist.get_rank()]
        self.data_parallel_group = dist.group.WORLD if averages else alone

    def get_model_parallel_world_size(self) -> int:
        return WORLD

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_model_parallel_group(self) -> Any:
        return dist.group.WORLD

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.data_parallel_group)

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.data_parallel_group)

    def get_data_parallel_group(self) -> Any:
        return self.data_parallel_group
