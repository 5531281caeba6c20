"""LENA (WWW 2022), layer-wise learning rates from gradient variance, as an optimizer for DeepSpeed.

A script needs `import ds_lena`, and `"optimizer": {"type": "LENA", "params": {…}}` in the DeepSpeed JSON.
"""

from ._registration import register
from .batch import grow
from .errors import ConfigError, LenaError, StateError, UnsupportedError
from .growth import BatchGrowth
from .noise import watch
from .optimizer import LENA
from .reporting import report
from .sample_schedules import SampleSchedule, cosine, linear, warmup_stable_decay
from .version import __version__

__all__ = [
    "LENA",
    "BatchGrowth",
    "ConfigError",
    "LenaError",
    "SampleSchedule",
    "StateError",
    "UnsupportedError",
    "__version__",
    "cosine",
    "grow",
    "linear",
    "report",
    "warmup_stable_decay",
    "watch",
]

register()
