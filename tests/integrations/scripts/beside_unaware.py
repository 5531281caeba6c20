"""Imported by `unaware.py` from its own folder."""

import torch


class Model(torch.nn.Linear):
    def __init__(self):
        super().__init__(3, 1)

    def forward(self, x):
        return super().forward(x).square().mean()
