"""LENA under a DeepSpeed engine: what is supported, how LENA is attached, and where DeepSpeed keeps its tensors."""

from .monitor import write_layers

__all__ = ["write_layers"]
