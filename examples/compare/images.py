"""A small ResNet on Fashion-MNIST, the setting of the LENA paper as near as it can be had without its data.

50,000 images are trained on, the last 10,000 of the training file are the validation split, the 10,000 of the test file
the test split. The files come with Debian's package `dataset-fashion-mnist`.
"""

from __future__ import annotations

import gzip
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from ..common.errors import InputError
from .order import micro_batch
from .plan import Task

FOLDER = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
_TRAINED_ON = 50_000
_EVALUATION_ROWS = 1000


@dataclass(frozen=True, kw_only=True)
class Images(Task):
    """A ResNet: `width` of the first stage, twice that of the next, and so on; `depths` of all stages."""

    width: int = 16
    depths: tuple[int, ...] = (1, 1, 1)
    rows_per_micro_batch: int = 32
    measure: ClassVar[str] = "share of errors"

    def problem(self, seed: int) -> _Problem:
        return _Problem(self, seed)


class _Problem:
    def __init__(self, task: Images, seed: int) -> None:
        images, labels = _read("train")
        self._train = images[:_TRAINED_ON], labels[:_TRAINED_ON]
        self._held_out = {"validation": (images[_TRAINED_ON:], labels[_TRAINED_ON:]), "test": _read("t10k")}
        self._size, self._seed = task.rows_per_micro_batch, seed
        torch.manual_seed(seed)
        config = ResNetConfig(
            num_channels=1,
            num_labels=10,
            embedding_size=task.width,
            hidden_sizes=[task.width * 2**stage for stage in range(len(task.depths))],
            depths=list(task.depths),
            layer_type="basic",
        )
        self.model: nn.Module = ResNetForImageClassification(config)
        self._compiled = torch.compile(self.model)

    def loss(self, index: int) -> Tensor:
        images, labels = self._train
        rows = micro_batch(index, _TRAINED_ON, self._size, self._seed)
        self.model.train()
        return nn.functional.cross_entropy(self._compiled(images[rows]).logits, labels[rows])

    @torch.no_grad()
    def evaluate(self, split: str) -> float:
        """Share of the images that are taken for something else."""
        self.model.eval()
        wrong = 0
        for images, labels in zip(*(part.split(_EVALUATION_ROWS) for part in self._held_out[split]), strict=True):
            wrong += int((self.model(images).logits.argmax(1) != labels).sum())
        return wrong / len(self._held_out[split][1])


def _read(name: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28), about normal, and labels (N,), from the IDX files of a split."""
    images = _idx(FOLDER / f"{name}-images-idx3-ubyte.gz", header=16).reshape(-1, 1, 28, 28)
    labels = _idx(FOLDER / f"{name}-labels-idx1-ubyte.gz", header=8)
    return (images.float() / 255 - 0.286) / 0.353, labels.long()


def _idx(path: Path, header: int) -> Tensor:
    if not path.exists():
        raise InputError(
            f"{path}: no such file. Install Debian's dataset-fashion-mnist, or set FASHION_MNIST to the folder of "
            "its four *-ubyte.gz files (https://github.com/zalandoresearch/fashion-mnist)"
        )
    return torch.from_numpy(np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header).copy())
