"""LENA (WWW 2022), layer-wise learning rates from gradient variance, as an optimizer for DeepSpeed.

A script needs `import ds_lena`, and `"optimizer": {"type": "LENA", "params": {…}}` in the DeepSpeed JSON.
"""

from ._registration import register
from .errors import ConfigError, LenaError, StateError, UnsupportedError
from .noise import watch
from .optimizer import LENA
from .reporting import report
from .version import __version__

__all__ = ["LENA", "ConfigError", "LenaError", "StateError", "UnsupportedError", "__version__", "report", "watch"]

register()
